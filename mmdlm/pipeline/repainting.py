"""Inpaint, vary and edit: the tasks of a model that go from images to images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from mmdlm.core.sampling.generators import Generators
from mmdlm.pipeline.checks import check_number
from mmdlm.pipeline.generation_run import GenerationRun
from mmdlm.pipeline.images import ImageTasks
from mmdlm.pipeline.inputs import (
    ImageLike,
    MaskLike,
    generation_config_with,
    hole_of,
    images_of,
    pillow_image,
)
from mmdlm.templates.task_prompt import Codes
from mmdlm.vision.frame import Frame


@dataclass(frozen=True)
class Repainting:
    """A prepared run that draws codes of an image again.

    Attributes:
        run: Of one row.
        frame: How the image lies on the model's canvas.
        original: The image, RGB.
        hole: [H, W] bool, its pixels that are repainted.
    """

    run: GenerationRun
    frame: Frame
    original: Image.Image
    hole: Tensor

    def finished(self, drawn: Image.Image) -> Image.Image:
        """Put what was drawn into the hole; all other pixels are those of the original."""
        inside = Image.fromarray(self.hole.numpy())
        return Image.composite(self.frame.take(drawn), self.original, inside)


@dataclass(frozen=True, eq=False)
class RepaintTasks(ImageTasks):
    """Tasks from images to images."""

    @torch.no_grad()
    def inpaint(
        self,
        image: ImageLike,
        mask: MaskLike,
        prompt: str = "",
        *,
        strength: float = 1.0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: Generators | None = None,
    ) -> Image.Image:
        """Draw a part of an image again, so that the whole shows the prompt.

        A code is drawn again if any pixel of its cell is masked; pixels outside the mask come back
        exactly as they were, at the image's own size. An image of another shape than the model's
        is set on white.

        Args:
            image: To repaint.
            mask: White (a tensor or an array: 1, or True) where the image is to be repainted, of
                its size, and nowhere transparent.
            prompt: What the whole shows; "": whatever fits the rest of the image.
            strength: Share of the masked codes that are drawn again, above 0 and up to 1; the
                others, chosen at random, stay. So many of the steps are taken as well.
            num_inference_steps: Denoising steps; None: the model's own.
            guidance_scale: How strongly to follow the prompt; 1 is off; None: the model's own.
            generator: Random numbers.

        Returns:
            An image of the same size.

        Raises:
            ValueError: For a mask without a hole or of another size, or a strength out of range.
        """
        repaint = self.repainting(
            image,
            mask,
            prompt,
            strength=strength,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generator,
        )
        codes = self.codes(repaint.run, repaint.run.run())
        return repaint.finished(self.decode(codes, repaint.run.grid)[0])

    def image_to_image(
        self,
        image: ImageLike,
        prompt: str = "",
        *,
        strength: float = 0.5,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: Generators | None = None,
    ) -> Image.Image:
        """Draw a variation of an image: some of its codes again, anywhere, as the prompt says.

        Args:
            image: To vary.
            prompt: What the result shows; "": whatever fits the codes that stay.
            strength: Share of the codes that are drawn again, above 0 and up to 1.
            num_inference_steps: Denoising steps at strength 1; None: the model's own.
            guidance_scale: How strongly to follow the prompt; 1 is off; None: the model's own.
            generator: Random numbers.

        Returns:
            An image of the same size.

        Raises:
            ValueError: As `inpaint`.

        Source: arXiv:2401.01808 (aMUSEd), variations by masking some tokens again.
        """
        opened = pillow_image(image, whole=True)
        return self.inpaint(
            opened,
            torch.ones(opened.height, opened.width, dtype=torch.bool),
            prompt,
            strength=strength,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generator,
        )

    @torch.no_grad()
    def edit(
        self,
        image: ImageLike | Sequence[ImageLike],
        instruction: str,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        generator: Generators | None = None,
    ) -> Image.Image:
        """Draw an image again as an instruction says: "make it night".

        The result has the size at which the model sees the (last) image.

        Args:
            image: One image, or several where the model edits one by the others.
            instruction: What is to change.
            num_inference_steps: Denoising steps; None: the model's own.
            guidance_scale: How strongly to follow the instruction; 1 is off; None: the model's own.
            image_guidance_scale: How strongly to stay with the image; 1 is off; None: the model's
                own.
            generator: Random numbers.

        Returns:
            The edited image.

        Raises:
            ValueError: If the instruction is empty or there is no image.
        """
        self.prompt_template.require("edit", self.text_tokenizer)
        if not instruction.strip():
            raise ValueError(f"instruction {instruction!r} is empty; say what is to change")
        generation_config = generation_config_with(
            self.defaults.edit, num_inference_steps=num_inference_steps
        )
        scales = generation_config.guidance_scale
        words, image_scale = scales if isinstance(scales, tuple) else (scales, 1.0)
        generation_config = replace(
            generation_config,
            guidance_scale=(
                words if guidance_scale is None else guidance_scale,
                image_scale if image_guidance_scale is None else image_guidance_scale,
            ),
        )
        opened = [pillow_image(one) for one in images_of(image)[0]]
        if not opened:
            raise ValueError("there is no image to edit; give one")
        sources = self.encode(opened, "edit")
        grid = sources[-1].grid
        blank = Codes.blank(self.codec, grid, drawn=True)
        generation_run = self.generation_run(
            [
                self.fitting(
                    self.prompt_template.edit_prompt(
                        self.codec, instruction, sources=tuple(sources), image=blank
                    )
                )
            ],
            generation_config=generation_config,
            generator=generator,
            grid=grid,
        )
        return self.decode(self.codes(generation_run, generation_run.run()), grid)[0]

    @torch.no_grad()
    def repainting(
        self,
        image: ImageLike,
        mask: MaskLike,
        prompt: str,
        *,
        strength: float = 1.0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: Generators | None = None,
    ) -> Repainting:
        """Prepare the run of `inpaint`, whose arguments these are."""
        self.prompt_template.require("inpaint", self.text_tokenizer)
        check_number("strength", strength)
        if not 0 < strength <= 1:
            raise ValueError(f"strength must lie above 0 and at most at 1, got {strength}")
        original = pillow_image(image, whole=True)
        hole = hole_of(mask, original.size)  # [H, W] bool
        config = generation_config_with(
            self.defaults.inpaint,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale if prompt.strip() else 1.0,  # there is nothing to follow
        )
        tokenizer = self.need_images()
        canvas = self.prompt_template.canvas(
            original.size, edge=tokenizer.image_size, task="inpaint"
        )
        frame = Frame.within(canvas, original.size)
        known = self.encode([frame.place(original)], "inpaint")[0]
        open_ = frame.cells(hole, tokenizer.downsampling).flatten()
        generators = self.generators(generator, 1)
        if strength < 1:
            one = generators if isinstance(generators, torch.Generator) else generators[0]
            open_ = _some(open_, strength, one)
            steps = max(1, round(config.num_inference_steps * strength))
            config = replace(config, num_inference_steps=steps)
        codes = replace(known, open=open_)
        run = self.generation_run(
            [self.prompt_template.image_prompt(self.codec, prompt, image=codes)],
            generation_config=config,
            generator=generators,
            grid=codes.grid,
        )
        return Repainting(run, frame, original, hole)


def _some(open_: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Keep a share of the open codes [K], at least one, chosen at random."""
    count = max(1, round(share * int(open_.sum())))
    key = torch.rand(open_.shape, generator=generator, device=generator.device).to(open_.device)
    chosen = key.masked_fill(~open_, -1).topk(count).indices
    return torch.zeros_like(open_).index_fill(0, chosen, True)
