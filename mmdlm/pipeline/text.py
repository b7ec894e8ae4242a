"""Answer, chat, complete and infill: the tasks of a model that write text."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, replace
from functools import partial
from typing import Unpack, cast, overload

import torch

from mmdlm.pipeline.engine import Engine
from mmdlm.pipeline.inputs import (
    ImageLike,
    generation_config_with,
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
from mmdlm.templates.conversation import Message, check_messages, turns_of
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
        self.prompt_template.require("answer", self.text_tokenizer)
        single = isinstance(question, str)
        questions = [question] if isinstance(question, str) else list(question)
        for one in questions:
            if not one.strip():
                raise ValueError(f"question {one!r} is empty; ask something")
        images = images_of_each(image, single=single, count=len(questions), what="questions")
        conversations = [
            [{"role": "user", "content": with_places(text, len(some))}]
            for text, some in zip(questions, images, strict=True)
        ]
        answers = self._replies(conversations, images, options)
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
                (first, or not at all), user and assistant. Or several such conversations.
            images: One for each `<image>`, in that order; for several conversations, a list of
                images for each.
            **options: See `mmdlm.pipeline.options.ChatOptions`: num_inference_steps,
                max_new_tokens, block_length, temperature, guidance_scale, think, generator.

        Returns:
            A text for one conversation, a list of texts for several.

        Raises:
            ValueError: For messages that are not a conversation, or as many images as none asks
                for.
        """
        check_options(options, ChatOptions, task="chat")
        self.prompt_template.require("chat", self.text_tokenizer)
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
        answers = self._replies(conversations, given, options)
        return answers[0] if single else answers

    @overload
    def complete(self, text: str, **options: Unpack[TextOptions]) -> str: ...

    @overload
    def complete(self, text: Texts, **options: Unpack[TextOptions]) -> list[str]: ...

    @torch.no_grad()
    def complete(self, text: str | Texts, **options: Unpack[TextOptions]) -> str | list[str]:
        """Return what follows the beginning of a text, or of several in one pass.

        Args:
            text: One beginning, or several.
            **options: See `mmdlm.pipeline.options.TextOptions`: num_inference_steps,
                max_new_tokens, block_length, temperature, guidance_scale, generator.

        Returns:
            A text for one beginning, a list of texts for several.

        Raises:
            ValueError: If a text is empty or too long.
        """
        check_options(options, TextOptions, task="complete")
        self.prompt_template.require("complete", self.text_tokenizer)
        texts, single = ([text], True) if isinstance(text, str) else (list(text), False)
        length = self.new_tokens(options.get("max_new_tokens"))
        config = self.writing(self.defaults.complete, length, **sampling_options(options))
        if not texts:
            return []
        for one in texts:
            if not one.strip():
                raise ValueError(f"text {one!r} is empty; give it a beginning")
        task_prompts = [
            self.fitting(
                self.prompt_template.completion_prompt(self.codec, one, length=length), length
            )
            for one in texts
        ]
        rows = self.generated(task_prompts, config, options.get("generator"))
        completions = [
            self.prompt_template.completion(self.codec, one, ids)
            for one, ids in zip(texts, rows, strict=True)
        ]
        return completions[0] if single else completions

    @overload
    def infill(
        self, text: str, *, image: ImageLike | None = None, **options: Unpack[StepOptions]
    ) -> str: ...

    @overload
    def infill(
        self, text: Texts, *, image: ImageLike | None = None, **options: Unpack[StepOptions]
    ) -> list[str]: ...

    @torch.no_grad()
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
        self.prompt_template.require("infill", self.text_tokenizer)
        texts, single = ([text], True) if isinstance(text, str) else (list(text), False)
        config = generation_config_with(self.defaults.infill, **sampling_options(options))
        if not texts:
            return []
        codec = self.codec
        for one in texts:
            codec.parse_infill_template(one)  # bad holes are found before an image is looked at
        seen = None
        if image is None:
            config = replace(config, guidance_scale=1.0)  # there is nothing to follow
        else:
            seen = self.look([[pillow_image(image)]], "infill")[0][0]
        task_prompts = [
            self.fitting(self.prompt_template.infill_prompt(codec, one, image=seen))
            for one in texts
        ]
        rows = self.generated(
            task_prompts,
            config,
            options.get("generator"),
            suppress_tokens=self.prompt_template.stop_ids(codec),
        )
        filled = [
            filled_text(
                text, ids[task_prompt.open], decode=partial(self.prompt_template.continued, codec)
            )
            for text, task_prompt, ids in zip(texts, task_prompts, rows, strict=True)
        ]
        return filled[0] if single else filled

    @torch.no_grad()
    def _replies(
        self,
        conversations: abc.Sequence[abc.Sequence[Message]],
        given: list[list[ImageLike]],
        options: ChatOptions,
    ) -> list[str]:
        """Write the assistant's next turn in each conversation; all prompts are context."""
        length = self.new_tokens(options.get("max_new_tokens"))
        config = self.writing(self.defaults.answer, length, **sampling_options(options))
        if not conversations:
            return []
        for conversation, some in zip(conversations, given, strict=True):
            check_messages(conversation, len(some))
        opened = [[pillow_image(one) for one in some] for some in given]
        images = self.look(opened, "answer")
        codec = self.codec
        template, think = self.prompt_template, options.get("think")
        task_prompts = []
        for conversation, seen in zip(conversations, images, strict=True):
            turns = template.thinking(turns_of(conversation, seen), think)
            task_prompt = template.chat_prompt(codec, turns, length=length)
            task_prompts.append(self.fitting(task_prompt, length))
        texts = self.written(
            task_prompts,
            config,
            options.get("generator"),
            suppress_tokens=template.suppress_tokens(codec),
        )
        return [text.strip() for text in texts]
