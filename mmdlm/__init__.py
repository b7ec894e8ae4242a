"""Masked diffusion over text and image tokens: one model that draws and describes.

>>> import mmdlm
>>> model = mmdlm.load("emoji")
>>> model.text_to_image("red heart")[0].save("heart.png")
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmdlm.generate import Model

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(name_or_path: str | PathLike[str] = "emoji") -> Model:
    """Load a model: a bundled name ("emoji"), or the folder of a checkpoint.

    Raises ValueError when neither is found or a tensor is missing or misshapen.
    torch is imported here, not by `import mmdlm`, which stays instant.
    """
    from mmdlm.generate import load as load_model

    return load_model(name_or_path)
