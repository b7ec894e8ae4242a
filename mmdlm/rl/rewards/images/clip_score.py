"""Rewards for an image by models of the CLIP family: how well it fits its prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmdlm.rl.reward import RewardUnavailable, text_of
from mmdlm.rl.rewards.images.images import images_of


@dataclass(frozen=True)
class Judge:
    """A model of open_clip with its image transform and its tokenizer."""

    model: Any
    transform: Any
    tokenizer: Any
    device: torch.device

    @torch.no_grad()
    def cosine(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """[N] images and a text for each -> [N] float32 on the CPU."""
        pixels = torch.stack([self.transform(one) for one in images])
        seen = self.model.encode_image(pixels.to(self.device)).float()
        read = self.model.encode_text(self.tokenizer(list(texts)).to(self.device)).float()
        return torch.cosine_similarity(seen, read).cpu()


@cache
def load_judge(model: str, pretrained: str | None, device: str) -> Judge:
    """Load an open_clip model once, in evaluation mode. Needs the extra `open_clip`.

    Args:
        model: A name that open_clip knows, "hf-hub:..." or "local-dir:...".
        pretrained: Its tag of open_clip, or a file of weights; None where the name has them.
        device: That the model is put on.

    Returns:
        The network with its transform of images and its tokenizer.
    """
    try:
        import open_clip
    except ImportError as error:
        raise RewardUnavailable(
            "this reward needs the package open_clip_torch; install it with: pip install "
            "'mmdlm[open_clip]'"
        ) from error
    try:
        network, _, transform = open_clip.create_model_and_transforms(
            model, pretrained=pretrained, device=device
        )
        tokenizer = open_clip.get_tokenizer(model)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise RewardUnavailable(
            f"open_clip does not load the model {model!r} with the weights {pretrained!r}: "
            f"{' '.join(str(error).split())[:120]}"
        ) from error
    return Judge(network.eval().requires_grad_(False), transform, tokenizer, torch.device(device))


@dataclass(frozen=True)
class ClipScore:
    """`scale` times the cosine of image and prompt in CLIP's space, and not below 0.

    Attributes:
        model: See `load_judge`.
        pretrained: See `load_judge`.
        scale: 2.5 is the published CLIPScore; 100 is what some repositories print.
        batch_size: Images at a time.
        column: Of the data set that says what is drawn; "": the prompt itself.

    Source: arXiv:2104.08718, section 3.
    """

    model: str = "ViT-B-32-quickgelu"  # as OpenAI trained it
    pretrained: str | None = "openai"
    scale: float = 2.5
    batch_size: int = 32
    column: str = ""
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.pretrained is None and ":" not in self.model:
            raise ValueError(
                f"{self.model!r} without `pretrained` has random weights; name them, or a model of "
                "hf-hub: or local-dir:"
            )

    def prepare(self) -> None:
        """Load the model; see `Rubric.prepare`."""
        load_judge(self.model, self.pretrained, self.device)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """[N] scores."""
        images = images_of(completions)
        texts = texts_of(prompts, columns, self.column)
        judge = load_judge(self.model, self.pretrained, self.device)
        scores = in_batches(judge.cosine, images, texts, self.batch_size)
        return [max(0.0, self.scale * float(one)) for one in scores]


def texts_of(prompts: Sequence[Any], columns: dict[str, Any], column: str) -> list[str]:
    """Return what each image should show: the prompts, or a column of the data set."""
    if not column:
        return [text_of(one) for one in prompts]
    if column not in columns:
        raise ValueError(f"the data set has no column {column!r} to compare the image with")
    return [str(one) for one in columns[column]]


def in_batches(
    score: Callable[[Sequence[Image.Image], Sequence[str]], Tensor],
    images: list[Image.Image],
    texts: list[str],
    size: int,
) -> list[float]:
    """[N] scores of images, each with its text."""
    found: list[float] = []
    for start in range(0, len(images), size):
        some = slice(start, start + size)
        found += score(images[some], texts[some]).tolist()
    return found
