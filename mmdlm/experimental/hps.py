"""Human Preference Score v2.1 as a reward of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from mmdlm.rl.reward import RewardUnavailable
from mmdlm.rl.rewards.images.clip_score import Judge, in_batches, load_judge, texts_of
from mmdlm.rl.rewards.images.images import images_of

REPOSITORY, FILE = "xswu/HPSv2", "HPS_v2.1_compressed.pt"


@dataclass(frozen=True)
class Hps:
    """Human Preference Score v2.1: a CLIP ViT-H/14 trained on what people prefer; about .2 to .35.

    It is the cosine of that model, so that open_clip runs it, and the package of the authors, which
    asks for old libraries, is not needed. Source: arXiv:2306.09341.

    Attributes:
        weights: The published file (4 GB); None: from the Hub, xswu/HPSv2.
        column: As in `ClipScore`.
    """

    weights: Path | None = None
    batch_size: int = 8
    column: str = ""
    device: str = "cpu"

    def prepare(self) -> None:
        """Load the model; see `Rubric.prepare`."""
        load_hps(self.weights, self.device)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """[N] scores."""
        images = images_of(completions)
        texts = texts_of(prompts, columns, self.column)
        judge = load_hps(self.weights, self.device)
        return [float(one) for one in in_batches(judge.cosine, images, texts, self.batch_size)]


@cache
def load_hps(weights: Path | None, device: str, model: str = "ViT-H-14") -> Judge:
    """Load the model of `Hps` once."""
    judge = load_judge(model, None, device)
    if weights is None:
        from huggingface_hub import hf_hub_download

        try:
            weights = Path(hf_hub_download(REPOSITORY, FILE))
        except (OSError, ValueError) as error:
            raise RewardUnavailable(
                f"{FILE} of {REPOSITORY} cannot be downloaded here; give its path as `weights`"
            ) from error
    if not weights.is_file():
        raise RewardUnavailable(f"there is no file {str(weights)!r}; give the weights of HPS v2.1")
    try:
        stored = torch.load(weights, map_location="cpu", weights_only=True)
        judge.model.load_state_dict(stored.get("state_dict", stored))
    except (RuntimeError, EOFError, UnpicklingError) as error:
        raise RewardUnavailable(
            f"{str(weights)!r} does not hold a {model} of open_clip; give the weights of HPS v2.1"
        ) from error
    return judge
