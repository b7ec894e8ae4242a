"""What a person looks at while a model trains: pictures from prompts, and what it says of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw
from transformers import PreTrainedTokenizerFast

from mmdlm.decoding import Defaults
from mmdlm.generate import Model
from mmdlm.models.transformer import MmdlmForMaskedDiffusion
from mmdlm.vision.image_tokenizer import ImageTokenizer

CELL, LINE, COLUMNS = 192, 16, 4
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
        """Write folder/step_N.png."""
        images = model.text_to_image(self.prompts)
        captions = model.caption(images)
        self.folder.mkdir(parents=True, exist_ok=True)
        sheet(images, self.prompts, captions).save(self.folder / f"step_{step:08d}.png")


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
