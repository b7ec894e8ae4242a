"""What a model is asked of emoji, and what it answers: captions, drawings, reconstructions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from eval.emoji.gallery import SIZE, Gallery, to_levels
from mmdlm.pipeline.generation_config import GenerationConfig
from mmdlm.pipeline.model import Model
from mmdlm.vision.tokenizers.base import ImageTokenizer


@dataclass(frozen=True)
class Asked:
    """How the model is asked: its own settings, but for what the caller gave."""

    text_to_image: GenerationConfig
    caption: GenerationConfig
    drawings: int = 1
    seed: int = 0
    batch_size: int = 64

    @classmethod
    def of(
        cls,
        model: Model,
        steps: int | None,
        caption_steps: int | None,
        guidance_scale: float | None,
    ) -> Asked:
        """Check the numbers; ValueError for one out of range."""
        drawing, caption = model.defaults.text_to_image, model.defaults.caption
        given: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
        drawing = replace(drawing, **{k: v for k, v in given.items() if v is not None})
        if caption_steps is not None:
            caption = replace(caption, num_inference_steps=caption_steps)
        return cls(drawing, caption)

    def draw(
        self, model: Model, names: Sequence[str], *, generator: torch.Generator
    ) -> list[Image.Image]:
        """Draw an image of each name."""
        scale = self.text_to_image.guidance_scale
        assert not isinstance(scale, tuple)  # only edits have several
        return model.text_to_image(
            names,
            num_inference_steps=self.text_to_image.num_inference_steps,
            guidance_scale=scale,
            generator=generator,
        )

    def describe(
        self, model: Model, images: Sequence[Image.Image], *, generator: torch.Generator
    ) -> list[str]:
        """Return a caption of each image."""
        return model.caption(
            images, num_inference_steps=self.caption.num_inference_steps, generator=generator
        )


@dataclass(frozen=True)
class Answers:
    """What the model made of N emoji.

    Attributes:
        captions: Of their images.
        drawings: Of their names, K times [N, 3, SIZE, SIZE] uint8.
        originals: Their images at the tokenizer's size, [N, 3, H, H] uint8.
        reconstructions: Of those by the tokenizer, [N, 3, H, H] uint8.
    """

    captions: list[str]
    drawings: list[Tensor]
    originals: Tensor
    reconstructions: Tensor


def ask(model: Model, gallery: Gallery, places: list[int], asked: Asked, *, title: str) -> Answers:
    """Caption the images, draw the names, and reconstruct the images."""
    tokenizer = tokenizer_of(model)
    captions: list[str] = []
    drawings: list[Tensor] = []
    originals, reconstructions = [], []

    # Each pass starts from the seed, so that held-out answers do not depend on --limit.
    for some in batches(places, asked.batch_size, f"{title}: reconstructing"):
        original = to_levels([gallery.emoji[i].image for i in some], tokenizer.image_size)
        originals.append(original)
        reconstructions.append(reconstruct(tokenizer, original, model.device))
    generator = torch.Generator().manual_seed(asked.seed)
    for some in batches(places, asked.batch_size, f"{title}: captioning"):
        images = [gallery.emoji[i].image for i in some]
        captions += asked.describe(model, images, generator=generator)
    for number in range(asked.drawings):
        generator = torch.Generator().manual_seed(asked.seed + number)
        drawn: list[Image.Image] = []
        for some in batches(places, asked.batch_size, f"{title}: drawing"):
            drawn += asked.draw(model, [gallery.emoji[i].name for i in some], generator=generator)
        drawings.append(to_levels(drawn, SIZE))
    return Answers(
        captions=captions,
        drawings=drawings,
        originals=torch.cat(originals),
        reconstructions=torch.cat(reconstructions),
    )


@torch.no_grad()
def reconstruct(tokenizer: ImageTokenizer, levels: Tensor, device: torch.device) -> Tensor:
    """[N, 3, H, W] uint8 -> the same through the codes of the tokenizer, as an image stores it."""
    pixels = tokenizer.decode(tokenizer.encode(levels.to(device) / 127.5 - 1))
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def batches(places: Sequence[int], size: int, what: str) -> Iterator[Sequence[int]]:
    """Yield the places, `size` at a time, under a bar with rate and time left."""
    with tqdm(total=len(places), desc=f"{what:<24}", unit=" emoji") as bar:
        for start in range(0, len(places), size):
            some = places[start : start + size]
            yield some
            bar.update(len(some))


def tokenizer_of(model: Model) -> ImageTokenizer:
    """Return the image tokenizer of a model; ValueError for a model of text only."""
    if model.image_tokenizer is None:
        raise ValueError("this model knows text only; name one with an image tokenizer: --model")
    return model.image_tokenizer
