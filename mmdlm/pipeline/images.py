"""Caption and draw: the tasks of a model that end or begin with an image.

All are one loop: a task is only the choice of which tokens of a document are targets. How a family
of models lays that document out is up to its `PromptTemplate`; nothing here depends on the family.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Unpack, overload

import torch
from PIL import Image
from torch import Tensor

from mmdlm.core.sampling.generators import Generators
from mmdlm.pipeline.engine import Engine
from mmdlm.pipeline.generation_run import GenerationRun, with_generated
from mmdlm.pipeline.inputs import (
    ImageLike,
    generation_config_with,
    images_of,
    negatives_of,
    pillow_image,
)
from mmdlm.pipeline.limits import MOST_IMAGES
from mmdlm.pipeline.options import ImageOptions, StepOptions, check_options, sampling_options
from mmdlm.templates.task_prompt import Codes, TaskPrompt
from mmdlm.vision.image_files import WHITE
from mmdlm.vision.pixels import to_image, to_pixels
from mmdlm.vision.tiles import tiled


@dataclass(frozen=True, eq=False)
class ImageTasks(Engine):
    """Tasks from images to words and back."""

    @overload
    def caption(  # type: ignore[overload-overlap]  # a path is a string, and so a sequence of paths
        self, image: ImageLike, **options: Unpack[StepOptions]
    ) -> str: ...

    @overload
    def caption(self, image: Sequence[ImageLike], **options: Unpack[StepOptions]) -> list[str]: ...

    @torch.no_grad()
    def caption(
        self, image: ImageLike | Sequence[ImageLike], **options: Unpack[StepOptions]
    ) -> str | list[str]:
        """Describe an image, or several in one pass.

        Args:
            image: One image, or several.
            **options: See `mmdlm.pipeline.options.StepOptions`.

        Returns:
            A text for one image, a list of texts for several.

        Raises:
            ValueError: For an image that cannot be read, or fewer than one step.
        """
        check_options(options, StepOptions, task="caption")
        self.prompt_template.require("caption", self.text_tokenizer)
        images, single = images_of(image)
        config = generation_config_with(self.defaults.caption, **sampling_options(options))
        if not images:
            return []
        codec = self.codec
        length = self.text_slots or min(self.defaults.max_text_tokens, self.longest_text + 1)
        task_prompts = [
            self.fitting(self.prompt_template.caption_prompt(codec, seen, length=length), length)
            for (seen,) in self.look([[pillow_image(one)] for one in images], "caption")
        ]
        captions = self.text_run(
            task_prompts, config, options.get("generator"), finish=str.strip
        ).texts()
        return captions[0] if single else captions

    @torch.no_grad()
    def text_to_image(
        self, prompt: str | Sequence[str], **options: Unpack[ImageOptions]
    ) -> list[Image.Image]:
        """Draw images of a prompt, or of several: all those of the first prompt come first.

        Args:
            prompt: What to draw.
            **options: See `mmdlm.pipeline.options.ImageOptions`: num_inference_steps,
                guidance_scale, negative_prompt, num_images_per_prompt, height, width, think,
                generator.

        Returns:
            `num_images_per_prompt` images for each prompt.

        Raises:
            ValueError: For an empty or too long prompt, or a number out of range.
        """
        check_options(options, ImageOptions, task="text_to_image")
        run = self.drawing(prompt, options)
        return self.decode(self.codes(run, run.run()), run.grid, alone=run.alone)

    def draw_trajectory(
        self, prompt: str | Sequence[str], **options: Unpack[ImageOptions]
    ) -> Iterator[list[Image.Image]]:
        """Yield the images of `text_to_image` after each denoising step; the last are its result.

        Codes that are still masked show as gray tiles.

        Args:
            prompt: What to draw.
            **options: Those of `text_to_image`.

        Returns:
            An iterator; each element is as many images as `text_to_image` returns.

        Raises:
            ValueError: As `text_to_image`, and at the call.
        """
        check_options(options, ImageOptions, task="draw_trajectory")
        return self.frames(self.drawing(prompt, options))

    # --- drawing ---

    def drawing(self, prompt: str | Sequence[str], options: ImageOptions) -> GenerationRun:
        """Prepare the run of a drawing: text is context, all codes are targets."""
        self.prompt_template.require("text_to_image", self.text_tokenizer)
        tokenizer = self.need_images()
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("there is no prompt; give at least one")
        for one in prompts:
            if not one.strip():
                raise ValueError(f"prompt {one!r} is empty; say in words what to draw")
        num_images_per_prompt = options.get("num_images_per_prompt", 1)
        if isinstance(num_images_per_prompt, bool) or not 1 <= num_images_per_prompt <= MOST_IMAGES:
            raise ValueError(
                f"num_images_per_prompt must be at least 1, and at most {MOST_IMAGES}, got "
                f"{num_images_per_prompt!r}"
            )
        config = generation_config_with(self.defaults.text_to_image, **sampling_options(options))
        negative_prompt = options.get("negative_prompt")
        against = negatives_of(
            negative_prompt, count=len(prompts), guided=config.guidance_scale != 1.0
        )
        height, width = self.prompt_template.drawn_size(
            (options.get("height"), options.get("width")),
            edge=tokenizer.image_size,
            cell=tokenizer.downsampling,
        )
        grid = height // tokenizer.downsampling, width // tokenizer.downsampling
        codes = Codes.blank(self.codec, grid, drawn=True)
        generator = options.get("generator")
        if options.get("think"):
            if any(negative.strip() for negative in against):
                raise ValueError(
                    f"negative_prompt {negative_prompt!r} has no place where the model thinks "
                    "before it draws; leave out one of both"
                )
            each = [one for one in prompts for _ in range(num_images_per_prompt)]
            task_prompts = self._reasoned(each, codes, generator)
        else:
            task_prompts = [
                self.fitting(
                    self.prompt_template.image_prompt(
                        self.codec, one, image=codes, negative=negative
                    )
                )
                for one, negative in zip(prompts, against, strict=True)
                for _ in range(num_images_per_prompt)
            ]
        return self.generation_run(
            task_prompts, generation_config=config, generator=generator, grid=grid
        )

    @torch.no_grad()
    def _reasoned(
        self, prompts: list[str], codes: Codes, generator: Generators | None
    ) -> list[TaskPrompt]:
        """Write what is to be drawn; return the prompts to draw it."""
        task_prompts = [
            self.fitting(self.prompt_template.thinking_prompt(self.codec, one, grid=codes.grid))
            for one in prompts
        ]
        room = max(
            int(segment.target.sum())
            for task_prompt in task_prompts
            for segment in task_prompt.sequence.segments
        )
        generation_config = self.writing(self.defaults.answer, room)
        generation_run = self.generation_run(
            task_prompts, generation_config=generation_config, generator=generator
        )
        return [
            self.fitting(
                self.prompt_template.image_prompt_after_thinking(
                    self.codec, with_generated(task_prompt.sequence, ids), image=codes
                )
            )
            for task_prompt, ids in zip(task_prompts, generation_run.run().cpu(), strict=True)
        ]

    def codes(self, generation_run: GenerationRun, ids: Tensor) -> Tensor:
        """Return the codes [B, K] of the images drawn in rows [B, L]."""
        codes = self.denoiser.vocabulary.codes(torch.stack(generation_run.results(ids)))
        return codes.to(self.device)

    def decode(
        self, codes: Tensor, grid: tuple[int, int] | None, *, alone: bool = False
    ) -> list[Image.Image]:
        """Decode codes [B, K] as B images.

        Args:
            codes: [B, K] int64.
            grid: (rows, columns) of K codes.
            alone: Decode one after the other, so that each is to the last bit what it is without
                the others.

        Returns:
            Images at the size of the image tokenizer.
        """
        tokenizer = self.need_images()
        parts = codes.split(1) if alone else [codes]
        return [to_image(one) for part in parts for one in tokenizer.decode(part, grid=grid)]

    @torch.no_grad()
    def frames(self, generation_run: GenerationRun) -> Iterator[list[Image.Image]]:
        """Yield the images after each denoising step, with tiles where codes are open."""
        tokenizer, grid = self.need_images(), generation_run.grid
        assert grid is not None
        blank = Image.new(
            "RGB", (grid[1] * tokenizer.downsampling, grid[0] * tokenizer.downsampling), WHITE
        )
        # decoding needs valid codes everywhere
        paper = tokenizer.encode(to_pixels(blank)[None].to(self.device))  # [1, K]
        for state in generation_run.trajectory():
            committed = torch.stack(generation_run.results(state.committed))  # [B, K]
            still_open = ~committed.to(self.device)
            codes = torch.where(still_open, paper, self.codes(generation_run, state.ids))
            yield [
                tiled(image, cells.tolist(), tokenizer.downsampling)
                for image, cells in zip(
                    self.decode(codes, grid, alone=generation_run.alone), still_open, strict=True
                )
            ]
