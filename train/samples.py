"""What a person looks at while a model trains: pictures from prompts, and what it says of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from transformers import PreTrainedTokenizerFast

from mmdlm.decoding import Defaults
from mmdlm.generate import Model
from mmdlm.models.transformer import MmdlmForMaskedDiffusion
from mmdlm.vision.image_tokenizer import ImageTokenizer

log = logging.getLogger(__name__)
CELL, LINE, COLUMNS = 192, 16, 4
# In levels of 0 ... 255: less contrast in an image, or between images, than anybody would see.
CONTRAST, DIFFERENCE = 6.0, 4.0
OnSample = Callable[[int, Model], None]


class SampleSheet:
    """Draws every prompt, captions what it drew, and writes a PNG a step.

    defaults   how the model is asked: as its final weights will be
    on_sample  called with the step and the model in place of writing
    """

    def __init__(
        self,
        denoiser: MmdlmForMaskedDiffusion,
        words: PreTrainedTokenizerFast,
        pictures: ImageTokenizer,
        prompts: list[str],
        folder: Path,
        *,
        defaults: Defaults = Defaults(),
        on_sample: OnSample | None = None,
    ) -> None:
        self.denoiser, self.words, self.pictures = denoiser, words, pictures
        self.prompts, self.folder = prompts, folder
        self.defaults, self.on_sample = defaults, on_sample or self.write

    def __call__(self, step: int) -> None:
        """Ask the model with the weights as they are now; their mode is kept."""
        training = self.denoiser.training
        self.denoiser.eval()
        model = Model(
            self.denoiser,
            self.words,
            self.pictures,
            text_slots=self.denoiser.config.text_slots,
            max_length=self.denoiser.config.max_position_embeddings,
            defaults=self.defaults,
            device=self.denoiser.device,
        )
        self.on_sample(step, model)
        self.denoiser.train(training)

    def write(self, step: int, model: Model) -> None:
        """Write folder/step_N.png; warn where the images have lost their variety."""
        images = model.text_to_image(self.prompts)
        captions = model.caption(images)
        if lost := lost_variety(images):
            log.warning("step %d: %s; the learning rate may be too high: see samples", step, lost)
        self.folder.mkdir(parents=True, exist_ok=True)
        sheet(images, self.prompts, captions).save(self.folder / f"step_{step:08d}.png")


def lost_variety(images: list[Image.Image]) -> str | None:
    """Say that most images are nearly blank, or all nearly alike; None where they are neither."""
    small = [image.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR) for image in images]
    pixels = np.stack([np.asarray(one, dtype=np.float64) for one in small])  # [N, 32, 32, 3]
    blank = int((pixels.std(axis=(1, 2)).max(axis=-1) < CONTRAST).sum())
    if 2 * blank > len(images):
        return f"{blank} of {len(images)} samples are nearly blank"
    if len(images) > 1 and np.abs(pixels - pixels.mean(axis=0)).mean() < DIFFERENCE:
        return f"all {len(images)} samples look alike, whatever their prompts"
    return None


def sheet(images: list[Image.Image], prompts: list[str], captions: list[str]) -> Image.Image:
    """Pictures in rows; under each its prompt, and the caption that came back."""
    rows = -(-len(images) // COLUMNS)
    canvas = Image.new("RGB", (COLUMNS * CELL, rows * (CELL + 2 * LINE)), "white")
    pen = ImageDraw.Draw(canvas)
    for index, (image, prompt, caption) in enumerate(zip(images, prompts, captions, strict=True)):
        x, y = index % COLUMNS * CELL, index // COLUMNS * (CELL + 2 * LINE)
        canvas.paste(image.resize((CELL, CELL), Image.Resampling.LANCZOS), (x, y))
        pen.text((x + 4, y + CELL), prompt[:32], fill="black")
        pen.text((x + 4, y + CELL + LINE), f"> {caption}"[:32], fill="grey")
    return canvas
