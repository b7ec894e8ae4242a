"""Lengths of rows: computed from the data where a recipe leaves them out, and checked where not.

Four numbers depend on each other and on the data: `text_slots` of the sources and of the model,
`data.length` and `max_position_embeddings`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerFast

from data_pipelines.sources.image_text import ImageText
from data_pipelines.sources.vision_samples import SeenCaption
from data_pipelines.text_tokenizer import token_counts
from mmdlm.models.auto import PretrainedDenoiser
from mmdlm.templates.infill import shortened
from mmdlm.templates.prompt_template import PromptTemplate
from mmdlm.vision.tokenizers.base import ImageTokenizer
from train.stages.denoising import Data, positions_of
from train.stages.document_lengths import LONGEST, Measured, measure
from train.stages.model_shape import USUAL_POSITIONS, Shape

LEAST_SLOTS = 16  # tokens of a text, its end among them, that are chosen at least
MOST_SLOTS = {True: 64, False: LONGEST}  # and at most, where longer texts are cut, and where not
MARKERS = 2  # tokens around the codes of an image


def slots_for(longest: int, *, cut: bool) -> int:
    """Return the text slots for texts of up to so many tokens, their end counted.

    Args:
        longest: Tokens of the longest text with its end.
        cut: Whether longer texts are cut.

    Returns:
        The slots of a text.
    """
    return min(MOST_SLOTS[cut], max(LEAST_SLOTS, longest))


def row_length(codes: int, text_slots: int) -> int:
    """Return the tokens of an image of so many codes with its text."""
    return codes + MARKERS + text_slots


def settle(
    data: Data,
    model: Shape | None,
    denoiser: PretrainedDenoiser,
    tokenizer: PreTrainedTokenizerFast,
    images: ImageTokenizer | None,
    prompt_template: PromptTemplate,
    *,
    prompts: Sequence[str] = (),
) -> tuple[Data, Shape | None, str]:
    """Compute the numbers of rows that a recipe leaves out, and check those that it gives.

    Documents of each source are laid out: all, or the first 10,000 of a random order of shards.
    What is computed of a new model is written into its config, too.

    Args:
        data: Sources, and the tokens of a row where they are given.
        model: Shape of a new model; None: the numbers of `denoiser` stay as they are.
        denoiser: Model to train.
        tokenizer: Of the texts.
        images: Image tokenizer; None for text only, and for images that are seen.
        prompt_template: Of the tasks of the model.
        prompts: Texts that sample sheets draw.

    Returns:
        Data and shape with all numbers, and a line that says what was computed; "" where nothing
        was.

    Raises:
        ValueError: Names all numbers, and some that would do, where those given do not fit the
            data or each other.
    """
    asked = _Asked(
        sources=measure(data, denoiser, tokenizer, images),
        length=data.length,
        of_model=denoiser.config.text_slots if model is None else model.text_slots,
        positions=(
            positions_of(denoiser, prompt_template)
            if model is None
            else model.max_position_embeddings
        ),
        is_new=model is not None,
        packed=data.packed,
        max_broken=data.max_broken,
        prompts=dict(
            zip(prompts, token_counts(tokenizer, [*map(str.strip, prompts)]), strict=True)
        ),
    )
    numbers = asked.numbers()
    asked.check(numbers)
    sources = [
        replace(source, to_sequence=replace(source.to_sequence, text_slots=numbers.text_slots))
        if isinstance(source.to_sequence, ImageText | SeenCaption)
        and source.to_sequence.text_slots is None
        else source
        for source in data.sources
    ]
    if model is not None:
        model = replace(
            model, text_slots=numbers.of_model, max_position_embeddings=numbers.positions
        )
        denoiser.config.text_slots = numbers.of_model
        denoiser.config.max_position_embeddings = numbers.positions
    return replace(data, sources=sources, length=numbers.length), model, asked.said(numbers)


@dataclass(frozen=True)
class _Numbers:
    """Numbers of a run.

    Attributes:
        text_slots: Of the sources that leave them out; None: there are none.
        of_model: Text slots of the model; None: texts have any length.
        length: Tokens of a row.
        positions: Tokens of the longest document that the model takes.
    """

    text_slots: int | None
    of_model: int | None
    length: int
    positions: int


@dataclass(frozen=True)
class _Asked:
    """Numbers as a recipe and a model give them, beside what the documents are like."""

    sources: tuple[Measured, ...]
    length: int | None
    of_model: int | None
    positions: int | None
    is_new: bool
    packed: bool
    max_broken: float
    prompts: Mapping[str, int]

    # ---- what is chosen --------------------------------------------------------------------------

    def numbers(self) -> _Numbers:
        """Return what is given, and beside it what fits it and the data.

        Returns:
            The numbers of the run, not yet checked.

        Raises:
            ValueError: For rows whose length does not follow from the data.
        """
        slots, of_model = self._slots(), self.of_model
        alike = all(one.has_slots and one.slots in (None, slots) for one in self.sources)
        if self.is_new and of_model is None and alike:
            of_model = slots
        length = self._longest(slots) if self.length is None else self.length
        positions = self.positions
        if positions is None:
            positions = max(length, USUAL_POSITIONS) if of_model is None else length
        return _Numbers(slots, of_model, length, positions)

    def _slots(self) -> int | None:
        """Return the text slots of sources that leave them out; None where none has any."""
        slotted = [one for one in self.sources if one.has_slots]
        if not slotted:
            return None
        given = [one.slots for one in slotted if one.slots is not None]
        if self.of_model is not None or given:
            return self.of_model or max(given)
        of_texts = (slots_for(max(one.texts, default=1), cut=one.cut) for one in slotted)
        return max(*of_texts, slots_for(self._longest_prompt, cut=False))

    def _longest(self, slots: int | None) -> int:
        """Return the tokens of the longest document."""
        if any(not one.beside for one in self.sources):
            raise ValueError(
                "data.length is null, but conversations are cut or left out by the length of a "
                "row; give it a number, such as 2048"
            )
        return max(max(one.lengths(slots)) for one in self.sources)

    @property
    def _longest_prompt(self) -> int:
        return max(self.prompts.values(), default=0) + 1

    # ---- what does not fit -----------------------------------------------------------------------

    def check(self, numbers: _Numbers) -> None:
        """Raise ValueError, in one sentence, for numbers that do not fit."""
        long_texts = [*self._long_texts(numbers)]
        wrong = [
            *self._other_slots(numbers),
            *long_texts,
            *self._long_prompts(numbers),
            *self._long_documents(numbers),
            *self._few_positions(numbers),
        ]
        if wrong:
            raise ValueError(
                f"the lengths of rows do not fit: {self._all(numbers)}; but {'; '.join(wrong)}; "
                f"{self._remedy()}{' (cut_long_text: true cuts longer texts)' * bool(long_texts)}"
            )

    def _other_slots(self, numbers: _Numbers) -> Iterator[str]:
        for one in self.sources:
            if one.slots and numbers.of_model not in (None, one.slots):
                yield f"{one.name} and the model differ in their text_slots"

    def _long_texts(self, numbers: _Numbers) -> Iterator[str]:
        for one in self.sources:
            slots = one.slots or numbers.text_slots or 0
            long = [tokens for tokens in one.texts if tokens > slots]
            if not one.cut and len(long) > self.max_broken * len(one.texts):
                yield (
                    f"{len(long)} of {len(one.texts)} texts of {one.name} take more than {slots} "
                    f"tokens with their end, up to {max(long)} ({one.longest})"
                )

    def _long_prompts(self, numbers: _Numbers) -> Iterator[str]:
        most = numbers.of_model
        long = [] if most is None else [one for one in self.prompts if self.prompts[one] >= most]
        if long:
            longest = max(long, key=self.prompts.__getitem__)
            yield (
                f"{len(long)} of {len(self.prompts)} prompts take more than {most} tokens with "
                f"their end, up to {self._longest_prompt} ({shortened(longest)!r})"
            )

    def _long_documents(self, numbers: _Numbers) -> Iterator[str]:
        for one in self.sources:
            lengths = one.lengths(numbers.text_slots)
            yield from self._too_long(one, lengths, numbers.length, "tokens of a row")

    def _few_positions(self, numbers: _Numbers) -> Iterator[str]:
        """Positions start again in each document, so that rows of several may be longer."""
        most = numbers.positions
        if numbers.length > most and not self.packed:
            yield f"rows of {numbers.length} tokens are longer than the {most} positions"
        for one in self.sources:
            lengths = one.lengths(numbers.text_slots)
            if self.packed and numbers.length > most:
                yield from self._too_long(one, lengths, most, "positions")

    def _too_long(self, one: Measured, lengths: list[int], most: int, what: str) -> Iterator[str]:
        long = [tokens for tokens in lengths if tokens > most]
        if len(long) > self.max_broken * len(lengths):
            yield (
                f"{len(long)} of {len(lengths)} documents of {one.name} take up to {max(long)} "
                f"tokens, more than the {most} {what}"
            )

    # ---- what is said ----------------------------------------------------------------------------

    def _all(self, numbers: _Numbers) -> str:
        """Return all numbers by their names."""
        said = [
            f"{one.name} has text_slots {one.slots or numbers.text_slots}"
            for one in self.sources
            if one.has_slots
        ]
        model = "model" if self.is_new else "the model to start from"
        if numbers.of_model is not None:
            said.append(f"{model} has text_slots {numbers.of_model}")
        said += [
            f"data.length is {numbers.length}",
            f"{model} has max_position_embeddings {numbers.positions}",
        ]
        return ", ".join(said)

    def _remedy(self) -> str:
        """Return numbers that would do."""
        slotted = [one for one in self.sources if one.has_slots]
        whole = [max(one.texts, default=1) for one in slotted if not one.cut]
        slots = max(LEAST_SLOTS, self._longest_prompt, *whole) if slotted else None
        if slots and self.of_model and not self.is_new:
            if slots > self.of_model:
                return "shorten texts and prompts, or train a new model"
            slots = self.of_model
        free = [replace(one, slots=None) for one in self.sources]
        row = max((max(one.lengths(slots)) for one in free if one.beside), default=1)
        if not self.is_new and row > (self.positions or 0):
            return "start from a model with more positions, or train a new one"
        parts = [] if slots is None else [f"text_slots {slots}"]
        parts.append(f"data.length {row}")
        if self.is_new:
            parts.append(f"model.shape.max_position_embeddings {row}")
        return f"{', '.join(parts)} would do, and so would leaving them out"

    def said(self, numbers: _Numbers) -> str:
        """Return a line about what was computed; "" where nothing was."""
        open_slots = any(one.has_slots and one.slots is None for one in self.sources)
        if not open_slots and None not in (self.length, self.positions):
            return ""
        whole = all(one.is_whole for one in self.sources)
        count = max((len(one.beside) for one in self.sources), default=0)
        parts = [] if numbers.text_slots is None else [f"text_slots {numbers.text_slots}"]
        parts += [
            f"data.length {numbers.length}",
            f"max_position_embeddings {numbers.positions}",
        ]
        texts = max((tokens for one in self.sources for tokens in one.texts), default=0)
        of_texts = f"; the longest text has {texts} tokens with its end" if texts else ""
        if texts and self._longest_prompt > texts:
            of_texts += f", the longest prompt {self._longest_prompt}"
        looked = f"all {count} documents" if whole else f"the first {count} documents of a source"
        return f"rows: {', '.join(parts)}, from {looked}{of_texts}{self._unfit(numbers)}"

    def _unfit(self, numbers: _Numbers) -> str:
        """Return what becomes of texts that do not fit."""
        said = ""
        for one in self.sources:
            long = sum(tokens > (one.slots or numbers.text_slots or 0) for tokens in one.texts)
            if long:
                fate = "cut" if one.cut else "left out"
                said += f"; {long} of {len(one.texts)} texts of {one.name} are {fate}"
        return said
