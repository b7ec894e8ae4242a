"""Call a model as a pipeline of diffusers is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Unpack

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mmdlm.pipeline.checks import check_choice, check_whole_number
from mmdlm.pipeline.generation_run import GenerationRun
from mmdlm.pipeline.inputs import Array, ImageLike, MaskLike, images_of, pillow_image
from mmdlm.pipeline.options import ImageOptions, check_options
from mmdlm.pipeline.repainting import RepaintTasks

OutputType = Literal["pil", "np", "pt", "latent"]
StepTensor = Literal["latents", "committed"]
Images = list[Image.Image] | Array | Tensor
# called as (model, step, timestep, {name: tensor})
StepCallback = Callable[[Any, int, float, dict[str, Tensor]], object]
ONLY_FROM_WORDS = ("height", "width", "negative_prompt", "think")


class ImageOutput(NamedTuple):
    """The result of a call: an object with `images`, and a tuple of them.

    Attributes:
        images: Pillow images; an array [B, H, W, 3] (np) or a tensor [B, 3, H, W] (pt) of values in
            [0, 1]; or codes [B, rows, columns] (latent).
    """

    images: Images


class PipelineOptions(ImageOptions, total=False):
    """Options of a call of a model: those of drawing, and these.

    Attributes:
        strength: With an image: share of its codes, or of the masked ones, that are drawn again;
            default: 0.5 without a mask, 1 with one.
        output_type: "pil", "np", "pt", or "latent" for codes.
        return_dict: Either: what is returned is a tuple that has `images`.
        callback_on_step_end: Called after each step as (model, step, timestep, tensors), where
            `timestep` is the share of codes that are still open. It may look and raise; it cannot
            change what is drawn.
        callback_on_step_end_tensor_inputs: What `tensors` holds: "latents", codes [B, rows,
            columns], -1 where open; "committed", [B, rows, columns] bool. Default: "latents".
    """

    strength: float | None
    output_type: OutputType
    return_dict: bool
    callback_on_step_end: StepCallback | None
    callback_on_step_end_tensor_inputs: Sequence[StepTensor]


@dataclass(frozen=True, eq=False)
class ImagePipeline(RepaintTasks):
    """Drawing under the names that it has in diffusers.

    Attributes:
        progress_bar: Keywords of tqdm for the bar of a call; see `set_progress_bar_config`.
    """

    progress_bar: dict[str, Any] = field(default_factory=dict)

    def set_progress_bar_config(self, **options: Any) -> None:
        """Set how the bar of a call of this model looks, by keywords of tqdm.

        By default there is a bar where stderr is a terminal; `disable=True` is for none.
        """
        self.progress_bar.clear()
        self.progress_bar.update(options)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        image: ImageLike | Sequence[ImageLike] | None = None,
        mask_image: MaskLike | None = None,
        **options: Unpack[PipelineOptions],
    ) -> ImageOutput:
        """Draw from words, from an image, or within a mask of an image.

        It is `text_to_image` without an image, `image_to_image` with one, and `inpaint` with a mask
        as well.

        Args:
            prompt: What to draw, or several prompts; with several images one for all, or one each.
            image: One to vary or to repaint, or several.
            mask_image: White where an image is repainted; the same for several images.
            **options: See `PipelineOptions` and `mmdlm.pipeline.options.ImageOptions`: strength,
                height, width, num_inference_steps, guidance_scale, negative_prompt,
                num_images_per_prompt, think, generator, output_type, return_dict,
                callback_on_step_end, callback_on_step_end_tensor_inputs.

        Returns:
            A tuple of one, which is its `images` as well.

        Raises:
            ValueError: As the three tasks, and for options that do not go together.
        """
        check_options(options, PipelineOptions, task="model")
        output_type = options.get("output_type", "pil")
        check_choice("output_type", output_type, OutputType)
        for name in options.get("callback_on_step_end_tensor_inputs", ()):
            check_choice("callback_on_step_end_tensor_inputs", name, StepTensor)
        if image is not None:
            parts = self._from_images(prompt, image, mask_image, options)
        elif mask_image is None and options.get("strength") is None:
            parts = self._from_words(prompt, options)
        else:
            stray = "strength" if mask_image is None else "mask_image"
            raise ValueError(f"{stray} belongs to an image, and there is none; give image=")
        codes, images = zip(*parts, strict=True)
        if output_type == "latent":
            result: Images = torch.cat(codes)
        else:
            result = _of_type([one for some in images for one in some], output_type)
        return ImageOutput(result)

    def _from_words(
        self, prompt: str | Sequence[str], options: PipelineOptions
    ) -> Iterator[tuple[Tensor, list[Image.Image]]]:
        """Yield codes [B, rows, columns] and images of all prompts."""
        names = ImageOptions.__optional_keys__
        drawing: ImageOptions = {name: options[name] for name in options if name in names}  # type: ignore[assignment, literal-required]
        run = self.drawing(prompt, drawing)
        codes = self._watched(run, options)
        images = self.decode(codes.flatten(1), run.grid, alone=run.alone)
        yield codes, images

    def _from_images(
        self,
        prompt: str | Sequence[str],
        image: ImageLike | Sequence[ImageLike],
        mask_image: MaskLike | None,
        options: PipelineOptions,
    ) -> Iterator[tuple[Tensor, list[Image.Image]]]:
        """Yield codes [1, rows, columns] and the image of each result."""
        for name in ONLY_FROM_WORDS:
            if options.get(name):
                raise ValueError(
                    f"{name}={options.get(name)!r} has no place where an image is given; leave it "
                    "out"
                )
        opened = [pillow_image(one, whole=True) for one in images_of(image)[0]]
        prompts = [prompt] * len(opened) if isinstance(prompt, str) else list(prompt)
        if not opened or len(prompts) != len(opened):
            raise ValueError(
                f"{len(prompts)} prompts for {len(opened)} images; give one for all, or one for "
                "each"
            )
        count = options.get("num_images_per_prompt", 1)
        check_whole_number("num_images_per_prompt", count, least=1)
        given = self.generators(options.get("generator"), count * len(opened))
        strength = options.get("strength")
        for number in range(count * len(opened)):
            one = opened[number // count]
            everywhere = torch.ones(one.height, one.width, dtype=torch.bool)
            usual = 0.5 if mask_image is None else 1.0
            repaint = self.repainting(
                one,
                everywhere if mask_image is None else mask_image,
                prompts[number // count],
                strength=usual if strength is None else strength,
                num_inference_steps=options.get("num_inference_steps"),
                guidance_scale=options.get("guidance_scale"),
                generator=given if isinstance(given, torch.Generator) else given[number],
            )
            codes = self._watched(repaint.run, options)
            (drawn,) = self.decode(codes.flatten(1), repaint.run.grid)
            yield codes, [repaint.finished(drawn)]

    def _watched(self, run: GenerationRun, options: PipelineOptions) -> Tensor:
        """Run to the end with a bar and the callback; return codes [B, rows, columns]."""
        callback = options.get("callback_on_step_end")
        names = options.get("callback_on_step_end_tensor_inputs", ("latents",))
        assert run.grid is not None
        codes = torch.empty(0)
        bar = tqdm(total=run.sampler.steps, **{"disable": None, "leave": False} | self.progress_bar)
        with bar:
            for state in run.trajectory():
                bar.update()
                codes = self.codes(run, state.ids).unflatten(1, run.grid)
                if callback is None:
                    continue
                fixed = state.committed | ~run.batch.target
                committed = torch.stack(run.results(fixed)).unflatten(1, run.grid)
                latents = codes.masked_fill(~committed, -1)
                tensors = {"latents": latents, "committed": committed}
                share = float((~state.committed & run.batch.target).sum() / run.batch.target.sum())
                callback(self, state.step, share, {name: tensors[name] for name in names})
        return codes


def _of_type(images: list[Image.Image], output_type: OutputType) -> Images:
    """Return images as a list, an array or a tensor."""
    if output_type == "pil":
        return images
    sizes = sorted({one.size for one in images})
    if len(sizes) > 1:
        shown = ", ".join(f"{width} x {height}" for width, height in sizes)
        raise ValueError(
            f"images of {shown} pixels have no common array; take output_type='pil', or give "
            "images of one size"
        )
    array = np.stack([np.asarray(one, dtype=np.float32) for one in images]) / 255
    return array if output_type == "np" else torch.from_numpy(array).permute(0, 3, 1, 2)
