"""Run the sampler on prepared prompts and decode the results: what all tasks of a model share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Unpack

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mmdlm.core.denoiser import Denoiser
from mmdlm.core.kernels.linear import PackedLayers
from mmdlm.core.sampling.device_denoiser import DeviceDenoiser
from mmdlm.core.sampling.generators import Generators, check_generators
from mmdlm.core.sequence import Batch, Sequence, collate
from mmdlm.models.checkpoints.checkpoint import Origin
from mmdlm.pipeline.answer_blocks import block_sampler, with_whole_blocks
from mmdlm.pipeline.devices import sampling_device
from mmdlm.pipeline.generation_config import GenerationConfig
from mmdlm.pipeline.generation_run import GenerationRun, Runner
from mmdlm.pipeline.inputs import generation_config_with
from mmdlm.pipeline.offload import Offload
from mmdlm.pipeline.options import SamplingOptions
from mmdlm.pipeline.seeing import Seeing
from mmdlm.pipeline.task_defaults import Defaults
from mmdlm.pipeline.text_run import TextRun, with_masks
from mmdlm.templates.native import Native
from mmdlm.templates.prompt_template import PromptTemplate
from mmdlm.templates.task_prompt import Codes, ImageInput, TaskPrompt
from mmdlm.templates.text_codec import TextCodec
from mmdlm.vision.pixels import check_visible, to_pixels
from mmdlm.vision.tokenizers.base import ImageTokenizer

SEED = 0  # of every call that is given no generator, so that its output can be had again


@dataclass(frozen=True, eq=False)
class Engine:
    """The parts of a model and the steps that all tasks share; `Model` describes the fields."""

    denoiser: Denoiser
    text_tokenizer: PreTrainedTokenizerFast
    image_tokenizer: ImageTokenizer | None = None
    text_slots: int | None = None
    max_length: int = 2048
    defaults: Defaults = Defaults()
    device: torch.device = torch.device("cpu")
    prompt_template: PromptTemplate = Native()
    packed: PackedLayers | None = None
    origin: Origin | None = None
    runner: Runner | None = None

    def __post_init__(self) -> None:
        """Check that tokenizers, lengths and vocabulary fit together."""
        if self.packed is None or self.packed.module is not self.denoiser:
            object.__setattr__(self, "packed", PackedLayers(self.denoiser))
        vocabulary, tokenizer = self.denoiser.vocabulary, self.text_tokenizer
        # A tokenizer may give out the end of a turn for that of a text (Dimple's).
        if tokenizer.eos_token_id != vocabulary.eos_id and (
            tokenizer.eos_token_id
            not in self.prompt_template.stop_ids(TextCodec(tokenizer, vocabulary))
        ):
            has = (
                "no end of text (eos_token)"
                if tokenizer.eos_token_id is None
                else f"the end of text {tokenizer.eos_token!r} with id {tokenizer.eos_token_id}"
            )
            raise ValueError(
                f"the text tokenizer has {has}, but the model's end of text is id "
                f"{vocabulary.eos_id}; give it the tokenizer that it was trained with"
            )
        if len(tokenizer) > vocabulary.text[1]:
            raise ValueError(
                f"the text tokenizer has {len(tokenizer)} ids, but the model knows text ids up to "
                f"{vocabulary.text[1]} only; give it the tokenizer that it was trained with"
            )
        codes = None if self.image_tokenizer is None else self.image_tokenizer.codebook_size
        if codes is not None and codes != vocabulary.image_codes:
            raise ValueError(
                f"the image tokenizer has {codes} codes, but the model's vocabulary has "
                f"{vocabulary.image_codes}; give it the tokenizer that it was trained with"
            )
        if not isinstance(self.text_slots, int | None):
            raise ValueError(f"text_slots must be a whole number or None, got {self.text_slots!r}")
        if self.longest_text < 1:
            raise ValueError(
                f"text_slots {self.text_slots} and max_length {self.max_length} leave no room for "
                "text; at least one token and the end of text are needed"
            )

    # --- documents --------------------------------------------------------------------------------

    @property
    def codec(self) -> TextCodec:
        """The text tokenizer over the vocabulary, with the lengths of this model."""
        return TextCodec(
            self.text_tokenizer,
            self.denoiser.vocabulary,
            slots=self.text_slots,
            longest=self.longest_text,
            grid=self.square,
        )

    def generation_run(
        self,
        task_prompts: list[TaskPrompt],
        *,
        generation_config: GenerationConfig,
        generator: Generators | None,
        grid: tuple[int, int] | None = None,
        suppress_tokens: tuple[int, ...] = (),
    ) -> GenerationRun:
        """Lay out the documents, and those of the other branches of guidance in rows as long.

        Args:
            task_prompts: One for each row.
            generation_config: How their targets are filled.
            generator: Random numbers; None: a fresh generator of seed 0.
            grid: (rows, columns) of the results, if they are images.
            suppress_tokens: Further ids that are never generated.

        Returns:
            Batches, sampler and generators, ready to run.
        """
        vocabulary = self.denoiser.vocabulary
        lengths = tuple(len(task_prompt.open) for task_prompt in task_prompts)
        sampler = block_sampler(
            generation_config.sampler(suppress_tokens=suppress_tokens), self.denoiser, task_prompts
        )
        task_prompts = [with_whole_blocks(one, self.denoiser) for one in task_prompts]
        documents = [task_prompt.sequence for task_prompt in task_prompts]
        branches = list(
            zip(*(task_prompt.unconditional for task_prompt in task_prompts), strict=True)
        )
        length = max(map(len, [*documents, *(one for branch in branches for one in branch)]))

        def laid_out(rows: Iterable[Sequence]) -> Batch:
            seen = self._seen(collate(rows, vocabulary, length=length).to(self.device))
            return seen.to(sampling_device(self.device))

        return GenerationRun(
            sampler=sampler,
            denoiser=self._sampled,
            batch=laid_out(documents),
            unconditional=tuple(laid_out(branch) for branch in branches),
            generator=self.generators(generator, len(task_prompts)),
            output_segments=tuple(task_prompt.output_segments for task_prompt in task_prompts),
            lengths=lengths,
            grid=grid,
            packed=self.packed,
            runner=self.runner,
        )

    @property
    def _sampled(self) -> Denoiser:
        """The denoiser as a sampler sees it."""
        if sampling_device(self.device) == self.device:
            return self.denoiser
        return DeviceDenoiser(self.denoiser, self.device)

    def placed(self, module: object) -> None:
        """Put what computes next on the device, where parts of the model are kept off it."""
        if isinstance(self.runner, Offload):
            self.runner.use(module)

    def _seen(self, batch: Batch) -> Batch:
        """Return the batch with the features of its images in place of their views."""
        if batch.views is None:
            return batch
        self.placed(self.denoiser)
        assert isinstance(self.denoiser, Seeing), "views were cut for a model that sees"
        return self.denoiser.see(batch)

    def generators(self, given: Generators | None, count: int) -> Generators:
        """Return generators on the device of the model.

        Args:
            given: For all outputs, or a list of one for each; None: a fresh one of seed 0.
            count: Number of outputs.

        Returns:
            One generator, or a list of `count`.

        Raises:
            ValueError: If they are not generators, or not `count`.
        """
        if given is None:
            return torch.Generator(sampling_device(self.device)).manual_seed(SEED)
        check_generators(given, count)
        if isinstance(given, torch.Generator):
            return self._here(given)
        return [self._here(one) for one in given]

    def _here(self, generator: torch.Generator) -> torch.Generator:
        where = sampling_device(self.device)
        if generator.device.type == where.type:
            return generator
        seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device)
        return torch.Generator(where).manual_seed(int(seed))

    # --- generated text ---------------------------------------------------------------------------

    @property
    def longest_text(self) -> int:
        """Most tokens of a text, its end not counted."""
        if self.text_slots is not None:
            return self.text_slots - 1
        square = self.square
        return self.max_length - (0 if square is None else square[0] * square[1] + 2) - 1

    def text_run(
        self,
        task_prompts: list[TaskPrompt],
        generation_config: GenerationConfig,
        generator: Generators | None,
        *,
        decode: Callable[[int, Tensor], str] | None = None,
        show: Callable[[int, Tensor], str] | None = None,
        finish: Callable[[str], str] = str,
        stop: tuple[str, ...] = (),
        suppress_tokens: tuple[int, ...] = (),
    ) -> TextRun:
        """Prepare the run of task prompts whose results are texts.

        Args:
            task_prompts: One for each text.
            generation_config: How they are written.
            generator: Random numbers; None: a fresh generator of seed 0.
            decode: From the number of a text and its ids to the text; None: as the template does.
            show: See `TextRun`; None: as the template decodes what follows other tokens.
            finish: See `TextRun`.
            stop: See `TextRun`.
            suppress_tokens: Further ids that are never generated.

        Returns:
            What writes them.
        """
        run = self.generation_run(
            task_prompts,
            generation_config=generation_config,
            generator=generator,
            suppress_tokens=suppress_tokens,
        )
        ends = self.prompt_template.stop_ids(self.codec)
        run = replace(run, sampler=replace(run.sampler, stop_ids=ends))
        codec, template = self.codec, self.prompt_template

        def decoded(_: int, ids: Tensor) -> str:
            return template.decode(codec, ids)

        first = decode or decoded

        def shown(number: int, ids: Tensor) -> str:
            return with_masks(
                template.written(codec, ids),
                mask_id=codec.vocabulary.mask_id,
                first=partial(first, number),
                later=partial(template.continued, codec),
            )

        return TextRun(run, first, show or shown, finish=finish, stop=stop)

    @property
    def most_tokens(self) -> int:
        """Tokens of the longest document that the model takes."""
        return max(self.max_length, self.prompt_template.longest)

    def check_new_tokens(self, length: int) -> None:
        """Raise ValueError for more new tokens than the model takes in all."""
        most = self.most_tokens
        if length > most:
            raise ValueError(
                f"max_new_tokens is {length}, but the model takes {most} tokens at most; lower it"
            )

    def fitting(self, task_prompt: TaskPrompt, length: int = 0) -> TaskPrompt:
        """Return the task prompt, if the model takes its length.

        Args:
            task_prompt: To check.
            length: Tokens of it that are new text.

        Returns:
            `task_prompt`, unchanged.

        Raises:
            ValueError: If it is longer than the longest document of the model.
        """
        tokens, most = len(task_prompt.sequence), self.most_tokens
        if tokens > most and length:
            raise ValueError(
                f"the prompt takes {tokens - length} of the {most} tokens of this model "
                f"and leaves no room for {length} new ones; shorten it, or lower max_new_tokens"
            )
        if tokens > most:
            raise ValueError(
                f"this takes {tokens} tokens, but the model takes {most} at most; shorten the text "
                "or make the image smaller"
            )
        return task_prompt

    def writing(
        self,
        generation_config: GenerationConfig,
        length: int,
        **given: Unpack[SamplingOptions],
    ) -> GenerationConfig:
        """Return the config for `length` tokens; without steps its steps per token are kept.

        Args:
            generation_config: Of the task, for `max_new_tokens` of the defaults.
            length: Tokens to write.
            **given: What the caller gave; None leaves what is there.

        Returns:
            A new config; the given one stays as it is.
        """
        if given.get("num_inference_steps") is None:
            usual = self.defaults.max_new_tokens
            steps = math.ceil(generation_config.num_inference_steps * length / usual)
            block_length = given.get("block_length") or generation_config.block_length or length
            given["num_inference_steps"] = max(steps, math.ceil(length / block_length))
        return generation_config_with(generation_config, **given)

    def new_tokens(self, max_new_tokens: int | None) -> int:
        """Return the room for a text in tokens; None: the default, or all that the model takes.

        Args:
            max_new_tokens: As the caller gave it.

        Returns:
            At least 1.

        Raises:
            ValueError: If it is not a whole number of at least 1.
        """
        if max_new_tokens is None:
            return min(self.defaults.max_new_tokens, self.most_tokens)
        length = max_new_tokens
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ValueError(
                f"max_new_tokens must be a whole number of at least 1, got {max_new_tokens!r}"
            )
        self.check_new_tokens(length)  # before as many are laid out
        return length

    # --- images as the model meets them ---------------------------------------------------------

    def need_images(self) -> ImageTokenizer:
        """Return the image tokenizer.

        Returns:
            The one that `load` has found.

        Raises:
            ValueError: If the model has none.
        """
        if self.image_tokenizer is not None:
            self.placed(self.image_tokenizer)
            return self.image_tokenizer
        if self.denoiser.vocabulary.image_codes:
            raise ValueError(
                "this model has no image tokenizer here, though its vocabulary has "
                f"{self.denoiser.vocabulary.image_codes} image codes; put the one that it was "
                "published with into its folder as image_tokenizer/"
            )
        raise ValueError("this model knows only text; take one with an image tokenizer")

    @property
    def square(self) -> tuple[int, int] | None:
        """(rows, columns) of the codes of an image of the image tokenizer's own size."""
        if self.image_tokenizer is None:
            return None
        edge = self.image_tokenizer.image_size // self.image_tokenizer.downsampling
        return edge, edge

    def look(self, images: list[list[Image.Image]], task: str) -> list[list[ImageInput]]:
        """Turn the images of each document into what the prompt template puts into it.

        Args:
            images: Those of each document.
            task: Name of the task.

        Returns:
            An input for each image of each document.

        Raises:
            ValueError: If the model cannot look at images, or if an image is too small.
        """
        if not any(images):
            return [[] for _ in images]
        if self.prompt_template.sees == "nothing":
            number = sum(map(len, images))
            raise ValueError(
                f"this model ({self.prompt_template.family}) reads only text and was given "
                f"{number} image{'s' * (number > 1)}; take one that sees, or leave out what it "
                "cannot see"
            )
        if self.prompt_template.sees == "features":
            return [self._views(some) for some in images]
        codes = iter(self.encode([one for some in images for one in some], task))
        return [[next(codes) for _ in some] for some in images]

    def _views(self, images: list[Image.Image]) -> list[ImageInput]:
        """Cut the images of one document as the vision adapter wants them."""
        if not images:
            return []
        if not isinstance(self.denoiser, Seeing) or self.denoiser.vision is None:
            raise ValueError(
                f"this model ({self.prompt_template.family}) was loaded without its vision adapter "
                f"and cannot look at {len(images)} images; load it with its vision tower"
            )
        return [*self.denoiser.vision.config.tiling.views(images)]

    def encode(self, images: list[Image.Image], task: str) -> list[Codes]:
        """Encode images as codes; images of one size go through the tokenizer together.

        Args:
            images: Of any sizes.
            task: Name of the task, for the prompt template.

        Returns:
            Codes and grid of each image.

        Raises:
            ValueError: If the model has no image tokenizer, or if an image is too small.
        """
        tokenizer = self.need_images()
        for one in images:
            check_visible(*one.size)
        sizes = [
            self.prompt_template.canvas(one.size, edge=tokenizer.image_size, task=task)
            for one in images
        ]
        found: dict[int, Codes] = {}
        for size in dict.fromkeys(sizes):
            alike = [n for n, other in enumerate(sizes) if other == size]
            pixels = torch.stack(
                [to_pixels(images[n], size, fit=self.defaults.fit) for n in alike]
            ).to(self.device)
            ids = self.denoiser.vocabulary.image_ids(tokenizer.encode(pixels))
            grid = size[0] // tokenizer.downsampling, size[1] // tokenizer.downsampling
            found |= {n: Codes.given(one, grid) for n, one in zip(alike, ids.cpu(), strict=True)}
        return [found[n] for n in range(len(images))]
