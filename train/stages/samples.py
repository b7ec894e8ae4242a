"""What a person looks at while a model trains: images from prompts or data, and what it says."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers import PreTrainedTokenizerFast

from data_pipelines.shards.shards import BrokenShard, expand_urls, read_shard
from data_pipelines.sources.source import BROKEN_CONTENT, Source, field_text
from data_pipelines.sources.vision_samples import IMAGE_FIELD, SeenCaption, numbered
from mmdlm.models.auto import PretrainedDenoiser
from mmdlm.pipeline.model import Model
from mmdlm.pipeline.task_defaults import Defaults
from mmdlm.templates.prompt_template import PromptTemplate
from mmdlm.vision.image_files import open_image
from mmdlm.vision.tokenizers.base import ImageTokenizer

log = logging.getLogger(__name__)
CELL, LINE, COLUMNS = 192, 16, 4
# In levels of 0 ... 255: less contrast in an image, or between images, than anybody would see.
CONTRAST, DIFFERENCE = 6.0, 4.0
OnSample = Callable[[int, Model], None]


class SampleSheet:
    """Draws prompts, captions what it drew and images of the data, and writes a PNG a step.

    Args:
        denoiser: The model, as it is trained.
        words: Its text tokenizer.
        images: Its image tokenizer, if any.
        folder: For the PNG files.
        prompt_template: Of the model.
        defaults: How the model is asked: as its final weights will be.
        prompts: What to draw.
        shown: Images of the data with their texts.
        on_sample: Called with the step and the model in place of writing.
    """

    def __init__(
        self,
        denoiser: PretrainedDenoiser,
        words: PreTrainedTokenizerFast,
        images: ImageTokenizer | None,
        folder: Path,
        *,
        prompt_template: PromptTemplate,
        defaults: Defaults,
        prompts: Sequence[str] = (),
        shown: Sequence[tuple[Image.Image, str]] = (),
        on_sample: OnSample | None = None,
    ) -> None:
        self.denoiser, self.words, self.images = denoiser, words, images
        self.folder, self.prompt_template, self.defaults = folder, prompt_template, defaults
        self.prompts, self.shown = list(prompts), list(shown)
        self.on_sample = on_sample or self.write

    def __call__(self, step: int) -> None:
        """Ask the model with the weights as they are now; their mode is kept."""
        training = self.denoiser.training
        self.denoiser.eval()
        model = Model(
            self.denoiser,
            self.words,
            self.images,
            text_slots=self.denoiser.config.text_slots,
            max_length=self.denoiser.config.max_position_embeddings,
            defaults=self.defaults,
            device=self.denoiser.device,
            prompt_template=self.prompt_template,
        )
        self.on_sample(step, model)
        self.denoiser.train(training)

    def write(self, step: int, model: Model) -> None:
        """Write folder/step_N.png; warn where the images drawn have lost their variety."""
        images = model.text_to_image(self.prompts) if self.prompts else []
        if step and images and (lost := lost_variety(images)):
            log.warning("step %d: %s; the learning rate may be too high: see samples", step, lost)
        images += [image for image, _ in self.shown]
        captions = model.caption(images)
        texts = [*self.prompts, *(text for _, text in self.shown)]
        self.folder.mkdir(parents=True, exist_ok=True)
        sheet(images, texts, captions).save(self.folder / f"step_{step:08d}.png")


def lost_variety(images: list[Image.Image]) -> str | None:
    """Say that most images are nearly blank, or all nearly alike; None where they are neither."""
    small = [image.resize((32, 32), Image.Resampling.BILINEAR) for image in images]
    pixels = np.stack([np.asarray(one, dtype=np.float64) for one in small])  # [N, 32, 32, 3]
    blank = int((pixels.std(axis=(1, 2)).max(axis=-1) < CONTRAST).sum())
    if 2 * blank > len(images):
        return f"{blank} of {len(images)} samples are nearly blank"
    if len(images) > 1 and np.abs(pixels - pixels.mean(axis=0)).mean() < DIFFERENCE:
        return f"all {len(images)} samples look alike, whatever their prompts"
    return None


def first_captions(sources: Iterable[Source], count: int) -> list[tuple[Image.Image, str]]:
    """Return the first images with captions that a model which sees is trained on.

    Args:
        sources: Those of `SeenCaption` are looked at, and samples that hold images.
        count: How many of each source, at most. Broken samples are left to the loader to report.

    Returns:
        Images, each with its caption.
    """
    found = []
    for source in sources:
        if isinstance(source.to_sequence, SeenCaption):
            found += list(islice(_captions(source, source.to_sequence), count))
    return found


def _captions(source: Source, made: SeenCaption) -> Iterable[tuple[Image.Image, str]]:
    generator = torch.Generator()
    for url in expand_urls(source.urls):
        try:
            for sample in read_shard(url):
                try:
                    names = numbered(sample, IMAGE_FIELD)
                    text = field_text(sample, made.text, generator=generator)
                    images = [open_image(sample[name]) for name in names[:1]]
                except BROKEN_CONTENT:
                    continue
                yield from ((image, text) for image in images)
        except BrokenShard:
            continue


def sheet(images: list[Image.Image], texts: list[str], captions: list[str]) -> Image.Image:
    """Images in rows; under each its prompt or text, and the caption that the model gives it."""
    rows = -(-len(images) // COLUMNS)
    canvas = Image.new("RGB", (COLUMNS * CELL, rows * (CELL + 2 * LINE)), "white")
    pen = ImageDraw.Draw(canvas)
    for index, (image, text, caption) in enumerate(zip(images, texts, captions, strict=True)):
        x, y = index % COLUMNS * CELL, index // COLUMNS * (CELL + 2 * LINE)
        canvas.paste(image.resize((CELL, CELL), Image.Resampling.LANCZOS), (x, y))
        pen.text((x + 4, y + CELL), text[:32], fill="black")
        pen.text((x + 4, y + CELL + LINE), f"> {caption}"[:32], fill="grey")
    return canvas
