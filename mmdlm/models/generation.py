"""`generate` of our models as transformers' callers know it, by our one sampling loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from transformers import GenerationConfig

from mmdlm.core.denoiser import BlockDenoiser
from mmdlm.core.sampling.cache import FinishedBlocks
from mmdlm.core.sampling.generators import Generators
from mmdlm.core.sampling.output import SampleStep
from mmdlm.core.sampling.sampler import Sampler
from mmdlm.core.sampling.unmasking import Threshold, UniformTransfer, UnmaskingRule
from mmdlm.core.sequence import NO_DOCUMENT, Batch
from mmdlm.core.vocabulary import Modality, Vocabulary
from mmdlm.models.noisy_targets import default_generator, modality_of


class Streamer(Protocol):
    """A streamer of transformers. One that has `put_draft` is given what is not final, too."""

    def put(self, value: Tensor) -> None:
        """Take tokens that are final."""

    def end(self) -> None:
        """Take note that nothing follows."""


class Decoder(Protocol):
    """A tokenizer, of which only this is used."""

    def decode(self, token_ids: Any, **options: Any) -> str:
        """Return the text of ids."""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How `generate` writes.

    Attributes:
        max_new_tokens: Tokens that are written; what follows the end of a text is padding.
        max_length: The same, the prompt counted.
        num_inference_steps: Denoising steps; None: one for each token, or with a threshold at most
            as many.
        block_length: Finish this many tokens before the next are begun; None: all at once.
        threshold: Commit every token of at least this probability: fewer steps. None: do not.
        temperature: Of the draw of tokens; 0 takes the most likely one.
        top_k: Draw from this many most likely ids only.
        top_p: Draw from the most likely ids that have this probability together only.
        do_sample: False: temperature 0; True without a temperature: 1. None: as it says.
        suppress_tokens: Ids that are never written.
        eos_token_id: Ids that end a text; None: that of the vocabulary.
        stop_strings: Texts that end a text; they need `tokenizer`.
    """

    max_new_tokens: int = 128
    max_length: int | None = None
    num_inference_steps: int | None = None
    block_length: int | None = None
    threshold: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    do_sample: bool | None = None
    suppress_tokens: Sequence[int] | None = None
    eos_token_id: int | Sequence[int] | None = None
    stop_strings: str | Sequence[str] | None = None

    @classmethod
    def of(cls, generation_config: object, options: dict[str, Any]) -> Self:
        """Take options from a config of transformers, or any object or dict with such fields.

        Args:
            generation_config: The object, the dict, or None.
            options: What counts more than it.

        Returns:
            The options.

        Raises:
            ValueError: For an option that `generate` does not have.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise ValueError(f"generate has no {name!r}; it takes {', '.join(known)}")
        read: Callable[[str], Any] = lambda name: getattr(generation_config, name, None)  # noqa: E731
        if isinstance(generation_config, dict):
            read = generation_config.get
        chosen = {name: read(name) for name in known if generation_config is not None}
        if "max_new_tokens" in options:
            chosen.pop("max_length", None)
        chosen |= options
        return cls(**{name: value for name, value in chosen.items() if value is not None})

    def new_tokens(self, prompt: int) -> int:
        """Return how many tokens are written behind a prompt of so many."""
        count = self.max_new_tokens if self.max_length is None else self.max_length - prompt
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(
                f"generate: {count} new tokens behind a prompt of {prompt}; max_new_tokens must be "
                "a whole number of at least 1, and max_length above the prompt"
            )
        return count

    def sampler(self, count: int, vocabulary: Vocabulary) -> Sampler:
        """Return the sampler for so many new tokens."""
        rule: UnmaskingRule = UniformTransfer()
        if self.threshold is not None:
            rule = Threshold(self.threshold, fallback=rule)
        temperature = self.temperature
        if temperature is None:
            temperature = 1.0 if self.do_sample else 0.0
        if self.do_sample is False:
            temperature = 0.0
        ends = self.eos_token_id
        ends = vocabulary.eos_id if ends is None else ends
        return Sampler(
            steps=count if self.num_inference_steps is None else self.num_inference_steps,
            block_length=self.block_length,
            unmasking=rule,
            temperature=float(temperature),
            top_k=self.top_k,
            top_p=self.top_p,
            suppress_tokens=tuple(self.suppress_tokens or ()),
            stop_ids=(ends,) if isinstance(ends, int) else tuple(ends),
        )

    def stops(self) -> tuple[str, ...]:
        """Return the texts that end a text."""
        if self.stop_strings is None:
            return ()
        return (self.stop_strings,) if isinstance(self.stop_strings, str) else (*self.stop_strings,)


class MaskedDiffusionGeneration:
    """`generate`, for a denoiser that is a model of transformers."""

    vocabulary: Vocabulary
    generation_config: GenerationConfig  # of calls that give none

    @classmethod
    def can_generate(cls) -> bool:
        """Return false: transformers means its own generation, token by token, and its config."""
        return False

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Raise ValueError: nothing is generated token by token. PEFT asks whether it is there."""
        raise ValueError(
            "a masked-diffusion model writes no token after the other; call generate(...)"
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        generation_config: object = None,
        tokenizer: Decoder | None = None,
        streamer: Streamer | None = None,
        generator: Generators | None = None,
        mm_token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        batch_num_images: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Write behind prompts, all new tokens at once or block by block.

        Args:
            input_ids: [B, L] prompts.
            attention_mask: [B, L], 0 at padding, best on the left; None: there is none.
            generation_config: A `GenerationConfig` of transformers, or any object or dict: its
                fields of `GenerationOptions` count, unless `options` has them.
            tokenizer: Decodes texts for `stop_strings`.
            streamer: Told the prompt, then tokens as soon as all before them are final, and, where
                it has `put_draft` (`TextDiffusionStreamer`), the open rest after each step.
            generator: Random numbers, or a list of one generator for each row; None: those of
                `torch.manual_seed`.
            mm_token_type_ids: [B, L], 1 at slots of images.
            pixel_values: See `forward`, as for the next two.
            image_sizes: See there.
            batch_num_images: See there.
            **options: See `GenerationOptions`.

        Returns:
            [B, L + N] prompts and what was written, padding behind the end of each text.

        Raises:
            ValueError: For an option that is not known or out of range, and stop strings without a
                tokenizer.
        """
        options.pop("token_type_ids", None)  # of a tokenizer, and all 0
        config = self.generation_config if generation_config is None else generation_config
        chosen = GenerationOptions.of(config, options)
        stops = chosen.stops()
        if stops and tokenizer is None:
            raise ValueError("stop_strings are looked for in decoded text; give tokenizer=")
        if streamer is not None and len(input_ids) > 1:
            raise ValueError(f"a streamer shows one text, but there are {len(input_ids)} prompts")
        count = chosen.new_tokens(input_ids.shape[1])
        batch = self._to_write(
            input_ids,
            attention_mask,
            count,
            mm_token_type_ids=mm_token_type_ids,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            batch_num_images=batch_num_images,
        )
        written = _Written(self.vocabulary, count, stops, tokenizer, streamer)
        sampler = chosen.sampler(count, self.vocabulary)
        if isinstance(self, BlockDenoiser) and self.block_length is not None:
            sampler = replace(sampler, cache=FinishedBlocks())
        written.begin(input_ids)
        steps = sampler.trajectory(
            self,  # type: ignore[arg-type]
            batch,
            generator=default_generator(input_ids.device) if generator is None else generator,
        )
        for step in steps:
            written.show(step, sampler.stop_ids)
            if written.all_stopped:
                break
        return torch.cat([input_ids, written.result(sampler.stop_ids)], dim=1)

    def _to_write(
        self, input_ids: Tensor, attention_mask: Tensor | None, count: int, **images: Any
    ) -> Batch:
        """Lay out prompts [B, L] and so many targets behind each."""
        if any(value is not None for value in images.values()):
            raise ValueError("this model sees no images; leave pixel_values out")
        return prompted(input_ids, attention_mask, count, self.vocabulary)


def prompted(
    input_ids: Tensor, attention_mask: Tensor | None, count: int, vocabulary: Vocabulary
) -> Batch:
    """Lay out prompts [B, L], with 0 in a mask [B, L] at padding, and N targets behind each."""
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} does not fit prompts of "
            f"{tuple(input_ids.shape)}; give one number for each token"
        )
    pad = torch.nn.functional.pad
    real = pad(attention_mask.bool(), (0, count), value=True)
    modality = pad(modality_of(input_ids, vocabulary), (0, count), value=int(Modality.TEXT))
    target = pad(torch.zeros_like(input_ids, dtype=torch.bool), (0, count), value=True)
    document = torch.where(real, 0, NO_DOCUMENT)
    return Batch(
        ids=pad(input_ids, (0, count), value=vocabulary.pad_id),
        modality=modality.masked_fill(~real, int(Modality.CONTROL)),
        target=target,
        document=document,
        segment=torch.where(real, target.long(), NO_DOCUMENT),
        position=(real.long().cumsum(-1) - 1).clamp(min=0),
    )


class _Written:
    """What was written so far, step by step: what is final, what was shown, which texts ended."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        count: int,
        stops: tuple[str, ...],
        tokenizer: Decoder | None,
        streamer: Streamer | None,
    ) -> None:
        self.vocabulary, self.count, self.stops = vocabulary, count, stops
        self.tokenizer, self.streamer = tokenizer, streamer
        self.shown = 0
        self.lengths: dict[int, int] = {}  # of rows that ended by a stop string
        self.ids = self.committed = torch.empty(0)

    def begin(self, prompt: Tensor) -> None:
        """Show the prompt [B, L]."""
        self.ids = prompt.new_full((len(prompt), self.count), self.vocabulary.mask_id)
        self.committed = torch.zeros_like(self.ids, dtype=torch.bool)
        if self.streamer is not None:
            self.streamer.put(prompt.cpu())

    def show(self, step: SampleStep, ends: tuple[int, ...]) -> None:
        """Look for stop strings after a step, and show what is new."""
        self.ids = step.ids[:, -self.count :]
        self.committed = step.committed[:, -self.count :]
        final = self.committed.long().cumprod(1).sum(1).tolist()
        if self.stops:
            for row, length in enumerate(final):
                if row not in self.lengths and (found := self._stop(self.ids[row, :length])):
                    self.lengths[row] = found
        if self.streamer is None:
            return
        length = min(final[0], self._length(0, ends))
        ids = self.ids[:1].cpu()
        if length > self.shown:
            self.streamer.put(ids[0, self.shown : length])
            self.shown = length
        if hasattr(self.streamer, "put_draft") and length == final[0] < self.count:
            self.streamer.put_draft(ids[:, length:])

    @property
    def all_stopped(self) -> bool:
        """Whether a stop string has ended every row."""
        return len(self.lengths) == len(self.ids)

    def result(self, ends: tuple[int, ...]) -> Tensor:
        """Return what was written [B, N], padding behind the end of each text."""
        if self.streamer is not None:
            self.streamer.end()
        lengths = [self._length(row, ends) for row in range(len(self.ids))]
        place = torch.arange(self.count, device=self.ids.device)
        behind = place >= torch.tensor(lengths, device=self.ids.device)[:, None]
        return self.ids.masked_fill(behind, self.vocabulary.pad_id)

    def _length(self, row: int, ends: tuple[int, ...]) -> int:
        """Return the tokens of a row's text, its end counted."""
        ended = torch.isin(self.ids[row], torch.tensor(ends, device=self.ids.device))
        ended &= self.committed[row].long().cumprod(0).bool()
        found = ended.nonzero()
        length = int(found[0]) + 1 if len(found) else self.count
        return min(length, self.lengths.get(row, self.count))

    def _stop(self, ids: Tensor) -> int | None:
        """Return the tokens up to the end of the first stop string, if there is one."""
        assert self.tokenizer is not None
        known = ids.tolist()
        if not any(stop in self.tokenizer.decode(known) for stop in self.stops):
            return None
        low, high = 1, len(known)
        while low < high:
            middle = (low + high) // 2
            text = self.tokenizer.decode(known[:middle])
            low, high = (low, middle) if any(s in text for s in self.stops) else (middle + 1, high)
        return low
