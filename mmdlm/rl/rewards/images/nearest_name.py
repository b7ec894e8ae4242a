"""A reward for an image that looks more like what it should show than like anything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmdlm.rl.rewards.images.images import images_of
from mmdlm.rl.rewards.images.neighbors import nearest_neighbors


def levels_of(images: Sequence[Image.Image]) -> Tensor:
    """RGB images of one size -> [N, 3, H, W] uint8."""
    arrays = [np.asarray(one) for one in images]
    return torch.stack([torch.from_numpy(one.copy()).permute(2, 0, 1) for one in arrays])


@dataclass(frozen=True)
class Gallery:
    """All that an image may show.

    Attributes:
        names: [G] names that are right for each image.
        levels: [G, 3, H, W] uint8.
        prepare: Images of any size -> [N, 3, H, W] uint8, as the gallery was made.
    """

    names: tuple[frozenset[str], ...]
    levels: Tensor
    prepare: Callable[[Sequence[Image.Image]], Tensor] = levels_of

    def __post_init__(self) -> None:
        if len(self.names) != len(self.levels):
            raise ValueError(
                f"a gallery of {len(self.levels)} images and {len(self.names)} sets of names; "
                "give one for each"
            )

    @cached_property
    def places(self) -> dict[str, int]:
        """Name -> the first image that it is right for."""
        found: dict[str, int] = {}
        for place, names in enumerate(self.names):
            for name in names:
                found.setdefault(name, place)
        return found


@dataclass(frozen=True)
class NearestName:
    """How near the drawn image is to the one of its name (the column `name`), among a `gallery`.

    Distances are of pixels, so that nothing has to be downloaded or run: `eval.emoji.benchmark`
    measures the same. The recipe gives `gallery`; a name that it does not hold is a ValueError.

    Attributes:
        score: "within": 1 if the named one is among the `top` nearest, else 0; "reciprocal": 1 /
            place, which tells the second nearest from the hundredth; "margin": how much nearer it
            is than the nearest other one, in [-1, 1], see `Neighbors`. A group whose images are all
            nearest to the named one has a spread only in this one.
    """

    score: Literal["within", "reciprocal", "margin"] = "within"
    top: int = 5

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        name: Sequence[str],
        gallery: Gallery,
        **columns: Any,
    ) -> list[float | None]:
        """[N] scores."""
        unknown = [one for one in name if one not in gallery.places]
        if unknown:
            raise ValueError(f"the gallery has no image of {unknown[0]!r}; leave the name out")
        right = torch.tensor([gallery.places[one] for one in name])
        images = gallery.prepare(images_of(completions))
        found = nearest_neighbors(images, gallery.levels, right=right, k=1)
        if self.score == "margin":
            return found.margin.tolist()
        if self.score == "within":
            return found.within(self.top).float().tolist()
        return (1 / (1 + found.rank.double())).tolist()
