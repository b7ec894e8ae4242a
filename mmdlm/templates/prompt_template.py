"""Define how a family lays out what users ask as documents with targets."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mmdlm.core.sequence import Sequence, text_segment
from mmdlm.templates.infill import shortened
from mmdlm.templates.task_prompt import (
    Codes,
    ImageInput,
    TaskPrompt,
    Turn,
    said,
)
from mmdlm.templates.text_codec import TextCodec

Tool = Mapping[str, Any] | Callable[..., Any]
Generation = Mapping[str, Any]  # what a family's generation_config.json would say
# name here -> its possible names in a tokenizer, and the id that it was published with
Specials = Mapping[str, tuple[tuple[str, ...], int]]


Sight = Literal["nothing", "codes", "features"]


class PromptTemplate:
    """How a family of models lays out its tasks.

    Attributes:
        family: Its name, as `config.published` has it.
        sees: How an image enters: not at all, as codes of the image tokenizer, or as features of
            the vision adapter.
        square: Whether all images of codes are squares of the image tokenizer's own size.
        tasks: The methods of `mmdlm.pipeline.model.Model` that the family was trained for.
        specials: Special tokens that its conversations need.
        longest: Longest document that it was trained on, in tokens, if config.json says less.
        generation: Sampling that the family was published with, in the form of a
            generation_config.json; guidance is in our convention, its published scale + 1.
        recorded: Sampling that a recipe records with weights that it trained, in the same form.
        chat_template: What a recipe for conversations saves with a tokenizer that has none; None:
            the family does not use that of the tokenizer.
    """

    family: ClassVar[str]
    sees: ClassVar[Sight] = "nothing"
    square: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]]
    specials: ClassVar[Specials] = {}
    longest: ClassVar[int] = 0
    generation: ClassVar[Generation] = {}
    recorded: ClassVar[Generation] = {}
    chat_template: ClassVar[str | None] = None

    def ids(self, codec: TextCodec, *names: str) -> dict[str, int]:
        """Return the ids of `specials`, or of those named; ValueError for one that is missing."""
        return codec.special({name: self.specials[name] for name in names or self.specials})

    def tasks_with(self, tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
        """Return the tasks of a model of the family with this text tokenizer."""
        return self.tasks

    def require(self, task: str, tokenizer: PreTrainedTokenizerFast) -> None:
        """Raise ValueError unless a model of the family with this tokenizer has the task."""
        tasks = self.tasks_with(tokenizer)
        if task not in tasks:
            self.unsupported(task, tasks)

    def unsupported(self, task: str, tasks: tuple[str, ...] = (), *, hint: str = "") -> NoReturn:
        """Say that the family lacks a task, and which it has; those of `tasks` where given."""
        *most, last = (name for name in tasks or self.tasks if name != "draw_trajectory")
        listed = f"{', '.join(most)} and {last}" if most else last
        raise ValueError(
            f"this model ({self.family}) was not trained for {task}; it is for {listed}{hint}"
        )

    # --- the tasks ---

    def caption_prompt(self, codec: TextCodec, image: ImageInput, *, length: int) -> TaskPrompt:
        """Ask for a caption of an image, of at most `length` tokens."""
        self.unsupported("caption")

    def image_prompt(
        self, codec: TextCodec, prompt: str, *, image: Codes, negative: str = ""
    ) -> TaskPrompt:
        """Ask for the open codes of an image.

        Args:
            codec: The text tokenizer.
            prompt: What to draw; "": whatever fits the rest of the image.
            image: Its codes.
            negative: Takes the place of the absent prompt in guidance; "": no words at all.

        Returns:
            The document, and what stands for it in guidance.
        """
        self.unsupported("text_to_image")

    def thinking_prompt(
        self, codec: TextCodec, prompt: str, *, grid: tuple[int, int]
    ) -> TaskPrompt:
        """Ask for more words on what is to be drawn: they are open, the image is unknown."""
        raise ValueError(
            f"this model ({self.family}) was not trained to think before it draws; leave out "
            "think=True"
        )

    def image_prompt_after_thinking(
        self, codec: TextCodec, reasoned: Sequence, *, image: Codes
    ) -> TaskPrompt:
        """Ask for the image of a document of `thinking_prompt` whose words are filled in."""
        self.unsupported("text_to_image")

    def edit_prompt(
        self, codec: TextCodec, instruction: str, *, sources: tuple[Codes, ...], image: Codes
    ) -> TaskPrompt:
        """Ask for the open codes of another image, by images and what is to change.

        Of the two other branches the first lacks the instruction, the second the images.
        """
        self.unsupported("edit")

    def infill_prompt(
        self, codec: TextCodec, text: str, *, image: ImageInput | None = None
    ) -> TaskPrompt:
        """Ask for what belongs into the holes of a text."""
        self.unsupported("infill")

    def completion_prompt(self, codec: TextCodec, text: str, *, length: int) -> TaskPrompt:
        """Ask for at most `length` tokens that follow the beginning of a text."""
        self.unsupported("complete")

    def chat_prompt(self, codec: TextCodec, turns: tuple[Turn, ...], *, length: int) -> TaskPrompt:
        """Ask for the next turn of the assistant, of at most `length` tokens."""
        self.unsupported("chat")

    def tool_prompt(
        self, codec: TextCodec, turns: tuple[Turn, ...], *, tools: tuple[Tool, ...], length: int
    ) -> TaskPrompt:
        """Ask for the next turn of an assistant that has tools, by the tokenizer's chat template.

        Args:
            codec: The text tokenizer.
            turns: The conversation, calls of tools and what they gave included.
            tools: JSON schemas, or functions with docstrings, as transformers takes them.
            length: Most tokens of the answer.

        Returns:
            The document, with its targets.

        Raises:
            ValueError: If the family, or the chat template, has no tools.
        """
        raise ValueError(
            f"this model ({self.family}) was published without tools; leave out tools and messages "
            "of tools"
        )

    def training_sequence(
        self, codec: TextCodec, turns: tuple[Turn, ...], *, answers: Collection[int]
    ) -> Sequence:
        """Lay out a conversation to learn from: up to each answer it is the prompt for it.

        Args:
            codec: The text tokenizer.
            turns: The conversation.
            answers: Numbers of the turns that are learned, each with what ends it.

        Returns:
            A sequence whose targets are the learned answers.

        Raises:
            ValueError: For a conversation that is never asked for in this way.
        """
        *asked, answer = turns
        if list(answers) != [len(asked)]:
            raise ValueError(
                f"this model ({self.family}) learns only the last answer of a conversation"
            )
        if edited := self.image_edit(turns):
            instruction, sources, image = edited
            return self.edit_prompt(codec, instruction, sources=sources, image=image).sequence
        if drawn := self.drawing(turns):
            prompt, thought, image = drawn
            if thought:
                raise ValueError(
                    f"this model ({self.family}) was not trained to think before it draws, but its "
                    f"answer has the words {shortened(thought)!r} beside an image"
                )
            return self.image_prompt(codec, prompt, image=image).sequence
        ids = [*codec.encode(said(answer)), *self.closing(codec)]
        task_prompt = self.chat_prompt(codec, tuple(asked), length=len(ids))
        (output_segments,) = task_prompt.output_segments
        return Sequence(
            (*task_prompt.sequence.segments[:output_segments], text_segment(ids, target=True))
        )

    def untemplated_sequence(self, codec: TextCodec, turns: tuple[Turn, ...]) -> Sequence:
        """Lay out one question and its answer as a task that is asked without a chat template.

        A text and what follows it is learned as `complete` asks for it, a prompt and an image as
        `text_to_image` does.

        Args:
            codec: The text tokenizer.
            turns: A question and its answer.

        Returns:
            A sequence whose target is the answer.

        Raises:
            ValueError: For anything else.
        """
        if [turn.role for turn in turns] != ["user", "assistant"]:
            raise ValueError(
                f"its {len(turns)} messages are not one question and its answer, as they must be "
                "without a template"
            )
        if drawn := self.drawing(turns):
            prompt, thought, image = drawn
            if thought:
                raise ValueError(
                    f"without a template an answer is an image or a text, but this one has the "
                    f"words {shortened(thought)!r} beside an image"
                )
            return self.image_prompt(codec, prompt, image=image).sequence
        question, answer = turns
        if any(not isinstance(part, str) for part in question.parts):
            return self.caption_sequence(codec, question, answer)
        # As it stands: what a text goes on with may begin with a space, or be indented.
        beginning, rest = ("".join(map(str, turn.parts)) for turn in turns)
        return self.completion_sequence(codec, beginning, rest)

    def completion_sequence(self, codec: TextCodec, beginning: str, rest: str) -> Sequence:
        """Lay out a text to be learned from where its beginning ends, as `complete` asks for it."""
        ids = [*codec.encode(rest), codec.vocabulary.eos_id]
        task_prompt = self.completion_prompt(codec, beginning, length=len(ids))
        (output_segments,) = task_prompt.output_segments
        return Sequence(
            (*task_prompt.sequence.segments[:output_segments], text_segment(ids, target=True))
        )

    def caption_sequence(self, codec: TextCodec, question: Turn, answer: Turn) -> Sequence:
        """Lay out an image and its caption, as `caption` asks for it."""
        raise ValueError(
            f"this model ({self.family}) is asked about images by its template; leave out "
            "template: false"
        )

    def drawing(self, turns: tuple[Turn, ...]) -> tuple[str, str, Codes] | None:
        """Return (prompt, words before it, image to be learned) of an answer that is an image.

        None for an answer in words.

        Args:
            turns: A conversation that ends with the answer.

        Returns:
            None where the answer is words.

        Raises:
            ValueError: If there is more than a prompt and one image.
        """
        *asked, answer = turns
        images = [part for part in answer.parts if not isinstance(part, str)]
        if not images:
            return None
        if len(asked) != 1 or asked[0].role != "user" or len(images) != 1:
            raise ValueError("an answer with an image has one, and one message of the user before")
        (image,) = images
        if not isinstance(image, Codes) or any(not isinstance(p, str) for p in asked[0].parts):
            raise ValueError(
                f"this model ({self.family}) learns to draw images of codes, from words only"
            )
        open_ = torch.ones(image.ids.shape, dtype=torch.bool)
        return said(asked[0]), said(answer), replace(image, open=open_)

    def image_edit(self, turns: tuple[Turn, ...]) -> tuple[str, tuple[Codes, ...], Codes] | None:
        """Return (instruction, images to edit, image to be learned) of a conversation that edits.

        It is one message of the user with images of codes and words, and one image for an answer;
        None for any other.
        """
        if [turn.role for turn in turns] != ["user", "assistant"]:
            return None
        asked, answer = turns
        images = [part for part in asked.parts if isinstance(part, Codes)]
        if not images or not said(asked) or len(answer.parts) != 1:
            return None
        (image,) = answer.parts
        if not isinstance(image, Codes):
            return None
        open_ = torch.ones(image.ids.shape, dtype=torch.bool)
        return said(asked), tuple(images), replace(image, open=open_)

    def closing(self, codec: TextCodec) -> tuple[int, ...]:
        """Return the ids that a model writes at the end of an answer that it has learned."""
        return (codec.vocabulary.eos_id,)

    def thinking(self, turns: tuple[Turn, ...], think: bool | None) -> tuple[Turn, ...]:
        """Return the conversation that asks for an answer with its reasons, or without them.

        Args:
            turns: The conversation.
            think: Whether to give reasons; None: as the conversation has it.

        Returns:
            The turns, with the family's words for thinking.
        """
        if think is not None:
            raise ValueError(
                f"this model ({self.family}) was not trained to think aloud or not; leave out "
                f"think={think}"
            )
        return turns

    # --- what the tasks have in common ---

    def stop_ids(self, codec: TextCodec) -> tuple[int, ...]:
        """Return the ids that end a text: what follows them is dropped."""
        return (codec.vocabulary.eos_id,)

    def suppress_tokens(self, codec: TextCodec) -> tuple[int, ...]:
        """Return the ids that never occur in an answer."""
        return ()

    def decode(self, codec: TextCodec, ids: Tensor) -> str:
        """Decode generated ids [T] up to the first that ends a text; spaces are kept."""
        kept = self.written(codec, ids)
        return str(codec.tokenizer.decode(kept.tolist(), skip_special_tokens=True))

    def written(self, codec: TextCodec, ids: Tensor) -> Tensor:
        """Return generated ids [T] up to the first that ends a text."""
        stop = torch.isin(ids, torch.tensor(self.stop_ids(codec), dtype=ids.dtype)).nonzero()
        return ids[: int(stop[0])] if len(stop) else ids

    def continued(self, codec: TextCodec, ids: Tensor) -> str:
        """Decode generated ids [T] that follow a text, with the space that they bring."""
        anchor = torch.tensor(codec.encode("a"), dtype=ids.dtype)
        before, both = (self.decode(codec, one) for one in (anchor, torch.cat([anchor, ids])))
        return both.removeprefix(before) if both.startswith(before) else self.decode(codec, ids)

    def completion(self, codec: TextCodec, text: str, ids: Tensor) -> str:
        """Decode what was generated after a text, so that both side by side are the whole."""
        return self.continued(codec, ids)

    def canvas(self, size: tuple[int, int], *, edge: int, task: str) -> tuple[int, int]:
        """Return the pixels (height, width) at which an image goes into the image tokenizer.

        Args:
            size: Of the image, (width, height).
            edge: Of the images that the image tokenizer was trained on, in pixels.
            task: Name of the task.

        Returns:
            (height, width), whole codes.
        """
        return edge, edge

    def drawn_size(
        self, size: tuple[int | None, int | None], *, edge: int, cell: int
    ) -> tuple[int, int]:
        """Return the pixels (height, width) of an image that is drawn from nothing.

        Args:
            size: (height, width); None: the family's own.
            edge: Of the images that the image tokenizer was trained on, in pixels.
            cell: Pixels of a code along one edge.

        Returns:
            (height, width), whole codes.

        Raises:
            ValueError: For a size that the family does not draw.
        """
        height, width = (edge if side is None else side for side in size)
        if (height, width) != (edge, edge):
            raise ValueError(
                f"this model ({self.family}) draws images of {edge} x {edge} pixels only, not "
                f"of height {height} and width {width}; leave height and width out"
            )
        return edge, edge
