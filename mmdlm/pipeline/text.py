"""Answer, chat, complete and infill: the tasks of a model that write text."""

from __future__ import annotations

from collections import abc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Unpack, cast, overload

import torch
from torch import Tensor

from mmdlm.pipeline.checks import check_choice
from mmdlm.pipeline.engine import Engine
from mmdlm.pipeline.inputs import (
    ImageLike,
    generation_config_with,
    images_of,
    images_of_each,
    pillow_image,
    with_places,
)
from mmdlm.pipeline.options import (
    ChatOptions,
    StepOptions,
    TextOptions,
    check_options,
    sampling_options,
)
from mmdlm.pipeline.text_run import Draft, TextRun, stops_of, with_masks
from mmdlm.templates.conversation import TOOL, Message, check_messages, images_in, turns_of
from mmdlm.templates.infill import filled_text

Texts = list[str] | tuple[str, ...]
Images = ImageLike | abc.Sequence[ImageLike]


@dataclass(frozen=True, eq=False)
class TextTasks(Engine):
    """The tasks of a model that write text."""

    @overload
    def answer(
        self, question: str, image: Images | None = None, **options: Unpack[ChatOptions]
    ) -> str: ...

    @overload
    def answer(
        self,
        question: Texts,
        image: abc.Sequence[Images | None] | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[str]: ...

    def answer(
        self,
        question: str | Texts,
        image: ImageLike | abc.Sequence[Images | None] | None = None,
        **options: Unpack[ChatOptions],
    ) -> str | list[str]:
        """Answer a question, optionally about images; or several questions in one pass.

        Args:
            question: One, or several.
            image: One image or several; for several questions, a list with one of these (or None)
                for each. Images stand where the question says `<image>`, or else before it.
            **options: Those of `chat`.

        Returns:
            A text for one question, a list of texts for several.

        Raises:
            ValueError: If a question is empty, or an image cannot be read.
        """
        check_options(options, ChatOptions, task="answer")
        single = isinstance(question, str)
        questions = [question] if isinstance(question, str) else list(question)
        images = images_of_each(image, single=single, count=len(questions), what="questions")
        answers = _texts(self._answering(questions, images, options))
        return answers[0] if single else answers

    @overload
    def chat(
        self,
        messages: abc.Sequence[Message],
        images: Images | None = None,
        **options: Unpack[ChatOptions],
    ) -> str: ...

    @overload
    def chat(
        self,
        messages: abc.Sequence[abc.Sequence[Message]],
        images: abc.Sequence[abc.Sequence[ImageLike]] | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[str]: ...

    def chat(
        self,
        messages: abc.Sequence[Message] | abc.Sequence[abc.Sequence[Message]],
        images: Images | abc.Sequence[abc.Sequence[ImageLike]] | None = None,
        **options: Unpack[ChatOptions],
    ) -> str | list[str]:
        """Return the assistant's next turn in a conversation, or in several in one pass.

        Where num_inference_steps is not given, the model's own number of tokens per step is kept.

        Args:
            messages: [{"role": "user", "content": "What is this? <image>"}, ...]; roles are system
                (first, or not at all), user, assistant and tool. Content is a text or a list of
                parts, as OpenAI and transformers have it: {"type": "text", "text": ...}, {"type":
                "image", "image": ...}, {"type": "image_url", "image_url": {"url": "data:..."}}. Or
                several such conversations.
            images: One for each `<image>` and each part of an image that brings none, in that
                order; for several conversations, a list of images for each.
            **options: See `mmdlm.pipeline.options.ChatOptions`: num_inference_steps,
                max_new_tokens, stop, block_length, temperature, guidance_scale, think, tools,
                generator.

        Returns:
            A text for one conversation, a list of texts for several.

        Raises:
            ValueError: For messages that are not a conversation, or as many images as none asks
                for.
        """
        check_options(options, ChatOptions, task="chat")
        single = not (
            isinstance(messages, list | tuple)
            and len(messages) > 0
            and isinstance(messages[0], list | tuple)
        )
        conversations = cast(
            "list[abc.Sequence[Message]]", [messages] if single else list(messages)
        )
        given = images_of_each(
            images, single=single, count=len(conversations), what="conversations"
        )
        answers = _texts(self._chatting(conversations, given, options))
        return answers[0] if single else answers

    @overload
    def complete(self, text: str, **options: Unpack[TextOptions]) -> str: ...

    @overload
    def complete(self, text: Texts, **options: Unpack[TextOptions]) -> list[str]: ...

    def complete(self, text: str | Texts, **options: Unpack[TextOptions]) -> str | list[str]:
        """Return what follows the beginning of a text, or of several in one pass.

        Args:
            text: One beginning, or several.
            **options: See `mmdlm.pipeline.options.TextOptions`: num_inference_steps,
                max_new_tokens, stop, block_length, temperature, guidance_scale, generator.

        Returns:
            A text for one beginning, a list of texts for several.

        Raises:
            ValueError: If a text is empty or too long.
        """
        check_options(options, TextOptions, task="complete")
        texts, single = ([text], True) if isinstance(text, str) else (list(text), False)
        completions = _texts(self._completing(texts, options))
        return completions[0] if single else completions

    @overload
    def infill(
        self, text: str, *, image: ImageLike | None = None, **options: Unpack[StepOptions]
    ) -> str: ...

    @overload
    def infill(
        self, text: Texts, *, image: ImageLike | None = None, **options: Unpack[StepOptions]
    ) -> list[str]: ...

    def infill(
        self, text: str | Texts, *, image: ImageLike | None = None, **options: Unpack[StepOptions]
    ) -> str | list[str]:
        """Fill the holes of a text, or of several in one pass.

        Only the holes change, and line ends and indentation are kept; none of them ends the text.
        Names of special tokens in it are letters.

        Args:
            text: `[MASK]` is a hole of one token, `[MASK:3]` one of three; a word is one or a few
                tokens, and a token brings its own space: "woman [MASK:3] skin tone".
            image: An image that the text describes, the same for all texts.
            **options: See `mmdlm.pipeline.options.StepOptions`.

        Returns:
            A text for one text, a list of texts for several.

        Raises:
            ValueError: For a text without a hole or longer than the model's.
        """
        check_options(options, StepOptions, task="infill")
        texts, single = ([text], True) if isinstance(text, str) else (list(text), False)
        filled = _texts(self._infilling(texts, image, options))
        return filled[0] if single else filled

    def stream(
        self,
        task: Literal["answer", "chat", "complete", "infill"],
        asked: Any,
        images: Images | None = None,
        **options: Unpack[ChatOptions],
    ) -> Iterator[Draft]:
        """Yield a text after each denoising step; the last draft is what the task returns.

        Args:
            task: A method of this model that writes a text.
            asked: Its first argument: one question, one conversation, one text.
            images: Its images, where it looks at any.
            **options: Those of the task.

        Returns:
            An iterator of drafts: the text with `[MASK]` where it is open, what is committed, the
            step and their number.

        Raises:
            ValueError: As the task, and at the call; for a list of questions or texts.
            TypeError: For an option that the task does not have.
        """
        check_choice("task", task, Literal["answer", "chat", "complete", "infill"])
        kinds = {"answer": ChatOptions, "chat": ChatOptions, "complete": TextOptions}
        check_options(options, kinds.get(task, StepOptions), task=task)
        is_conversation = isinstance(asked, list | tuple) and not any(
            isinstance(one, list | tuple | str) for one in asked
        )
        if not (is_conversation if task == "chat" else isinstance(asked, str)):
            wanted = "conversation, a list of messages" if task == "chat" else "text"
            raise ValueError(f"stream writes one at a time; {task} takes one {wanted}")
        if task == "complete" and images is not None:
            raise ValueError("complete looks at no images; leave them out")
        given = [] if images is None else images_of(images)[0]
        if task == "chat":
            run = self._chatting([asked], [given], options)
        elif task == "answer":
            run = self._answering([asked], [given], options)
        elif task == "complete":
            run = self._completing([asked], options)
        else:
            if len(given) > 1:
                raise ValueError(f"infill looks at one image, and was given {len(given)}")
            run = self._infilling([asked], given[0] if given else None, options)
        assert run is not None
        return run.drafts()

    # --- the runs of the tasks; None where nothing is asked ---

    @torch.no_grad()
    def _answering(
        self, questions: list[str], images: list[list[ImageLike]], options: ChatOptions
    ) -> TextRun | None:
        self.prompt_template.require("answer", self.text_tokenizer)
        for one in questions:
            if not one.strip():
                raise ValueError(f"question {one!r} is empty; ask something")
        conversations = [
            [{"role": "user", "content": with_places(text, len(some))}]
            for text, some in zip(questions, images, strict=True)
        ]
        return self._replying(conversations, images, options)

    @torch.no_grad()
    def _chatting(
        self,
        conversations: list[abc.Sequence[Message]],
        given: list[list[ImageLike]],
        options: ChatOptions,
    ) -> TextRun | None:
        self.prompt_template.require("chat", self.text_tokenizer)
        return self._replying(conversations, given, options)

    @torch.no_grad()
    def _completing(self, texts: list[str], options: TextOptions) -> TextRun | None:
        self.prompt_template.require("complete", self.text_tokenizer)
        length = self.new_tokens(options.get("max_new_tokens"))
        config = self.writing(self.defaults.complete, length, **sampling_options(options))
        stop = stops_of(options.get("stop"))
        if not texts:
            return None
        for one in texts:
            if not one.strip():
                raise ValueError(f"text {one!r} is empty; give it a beginning")
        codec, template = self.codec, self.prompt_template
        task_prompts = [
            self.fitting(template.completion_prompt(codec, one, length=length), length)
            for one in texts
        ]
        return self.text_run(
            task_prompts,
            config,
            options.get("generator"),
            decode=lambda number, ids: template.completion(codec, texts[number], ids),
            stop=stop,
        )

    @torch.no_grad()
    def _infilling(
        self, texts: list[str], image: ImageLike | None, options: StepOptions
    ) -> TextRun | None:
        template = self.prompt_template
        template.require("infill", self.text_tokenizer)
        config = generation_config_with(self.defaults.infill, **sampling_options(options))
        if not texts:
            return None
        codec = self.codec
        for one in texts:
            codec.parse_infill_template(one)  # bad holes are found before an image is looked at
        seen = None
        if image is None:
            config = replace(config, guidance_scale=1.0)  # there is nothing to follow
        else:
            seen = self.look([[pillow_image(image)]], "infill")[0][0]
        task_prompts = [
            self.fitting(template.infill_prompt(codec, one, image=seen)) for one in texts
        ]
        decode = partial(template.continued, codec)
        show = partial(with_masks, mask_id=codec.vocabulary.mask_id, first=decode, later=decode)

        def filled(number: int, ids: Tensor, decode: abc.Callable[[Tensor], str] = decode) -> str:
            return filled_text(texts[number], ids[task_prompts[number].open], decode=decode)

        return self.text_run(
            task_prompts,
            config,
            options.get("generator"),
            decode=filled,
            show=partial(filled, decode=show),
            suppress_tokens=template.stop_ids(codec),
        )

    def _replying(
        self,
        conversations: abc.Sequence[abc.Sequence[Message]],
        given: list[list[ImageLike]],
        options: ChatOptions,
    ) -> TextRun | None:
        """Prepare the assistant's next turn in each conversation; all prompts are context."""
        length = self.new_tokens(options.get("max_new_tokens"))
        config = self.writing(self.defaults.answer, length, **sampling_options(options))
        stop, tools = stops_of(options.get("stop")), tuple(options.get("tools") or ())
        if not conversations:
            return None
        given = [
            images_in(conversation, some)
            for conversation, some in zip(conversations, given, strict=True)
        ]
        for conversation, some in zip(conversations, given, strict=True):
            check_messages(conversation, len(some))
        images = self.look([[pillow_image(one) for one in some] for some in given], "answer")
        codec, template = self.codec, self.prompt_template
        task_prompts = []
        for conversation, seen in zip(conversations, images, strict=True):
            turns = template.thinking(turns_of(conversation, seen), options.get("think"))
            if tools or any(turn.fields or turn.role == TOOL for turn in turns):
                task_prompt = template.tool_prompt(codec, turns, tools=tools, length=length)
            else:
                task_prompt = template.chat_prompt(codec, turns, length=length)
            task_prompts.append(self.fitting(task_prompt, length))
        return self.text_run(
            task_prompts,
            config,
            options.get("generator"),
            finish=str.strip,
            stop=stop,
            suppress_tokens=template.suppress_tokens(codec),
        )


@torch.no_grad()
def _texts(run: TextRun | None) -> list[str]:
    """Write the texts of a run."""
    return [] if run is None else run.texts()
