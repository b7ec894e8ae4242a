"""Masked diffusion over text and image tokens: one model that draws and describes.

>>> import mmdlm
>>> model = mmdlm.load("emoji")
>>> model.text_to_image("red heart")[0].save("heart.png")
"""

from __future__ import annotations

import logging
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from mmdlm.pipeline.model import Model
    from mmdlm.templates.prompt_template import PromptTemplate

__version__ = "0.2.0"
__all__ = ["__version__", "load"]

# transformers imports torchao wherever it is installed, of which torch then warns at every start.
logging.getLogger("torch.utils._pytree").addFilter(
    lambda record: "register_constant() on Enum" not in record.getMessage()
)


def load(
    name_or_path: str | PathLike[str] = "emoji",
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    quantization: Any = None,
    adapter: str | PathLike[str] | None = None,
    merge_adapter: bool = False,
    image_tokenizer: str | PathLike[str] | None = None,
    prompt_template: PromptTemplate | None = None,
    task: str | None = None,
) -> Model:
    """Load a model: see `mmdlm.pipeline.loading.load`, which this is, imported at the first call.

    So `import mmdlm` is instant: torch and transformers are loaded here.
    """
    from mmdlm.pipeline.loading import load as load_model

    return load_model(
        name_or_path,
        device=device,
        dtype=dtype,
        quantization=quantization,
        adapter=adapter,
        merge_adapter=merge_adapter,
        image_tokenizer=image_tokenizer,
        prompt_template=prompt_template,
        task=task,
    )
