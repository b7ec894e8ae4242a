"""A reward for a picture by ImageReward, a model of what people prefer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from mmdlm.rl.reward import RewardUnavailable
from mmdlm.rl.rewards.clip_score import texts_of
from mmdlm.rl.rewards.pictures import pictures_of


@cache
def load_image_reward(model: str, device: str) -> Any:
    """The published model, loaded once; needs the extra `image_reward`."""
    try:
        import ImageReward  # type: ignore[import-not-found]
    except ImportError as error:
        # the package asks for parts of transformers that newer ones do not have: that is named too
        raise RewardUnavailable(
            "this reward needs the package image-reward, which does not import here "
            f"({' '.join(str(error).split())}); install it with: pip install 'mmdlm[image_reward]'"
        ) from error
    return ImageReward.load(model, device=device)


@dataclass(frozen=True)
class ImageRewardScore:
    """ImageReward's score of picture and prompt: about -2 to 2, with mean 0 over its own data.

    model   a name that the package knows, or a file of weights
    column  as in `ClipScore`

    Source: arXiv:2304.05977. MMaDA's UniGRPO weighs it by .1 (arXiv:2505.15809, section 5.2).
    """

    model: str = "ImageReward-v1.0"
    column: str = ""
    device: str = "cpu"

    def prepare(self) -> None:
        """Load the model; see `Rubric.prepare`."""
        load_image_reward(self.model, self.device)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """[N] scores."""
        pictures = pictures_of(completions)
        texts = texts_of(prompts, columns, self.column)
        judge = load_image_reward(self.model, self.device)
        pairs = zip(texts, pictures, strict=True)
        return [float(judge.score(text, picture)) for text, picture in pairs]
