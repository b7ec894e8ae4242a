"""Masked diffusion over text and image tokens: one model that draws and describes.

>>> import mmdlm
>>> model = mmdlm.load("emoji")
>>> model.text_to_image("red heart")[0].save("heart.png")
"""

from __future__ import annotations

import logging
from importlib import import_module
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from mmdlm.pipeline.generation_config import GenerationConfig
    from mmdlm.pipeline.model import Model
    from mmdlm.templates.prompt_template import PromptTemplate
    from mmdlm.vision.image_urls import load_image

__version__ = "0.2.0"
__all__ = ["GenerationConfig", "Model", "__version__", "load", "load_image"]
_LAZY = {
    "GenerationConfig": "mmdlm.pipeline.generation_config",
    "Model": "mmdlm.pipeline.model",
    "load_image": "mmdlm.vision.image_urls",
}

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
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Model:
    """Load a model; see `mmdlm.pipeline.loading.load_engine` for the arguments.

    It is imported at the first call, so that `import mmdlm` is instant: torch and transformers are
    loaded here.
    """
    from mmdlm.pipeline.model import Model

    return Model.from_pretrained(
        name_or_path,
        device=device,
        dtype=dtype,
        quantization=quantization,
        adapter=adapter,
        merge_adapter=merge_adapter,
        image_tokenizer=image_tokenizer,
        prompt_template=prompt_template,
        task=task,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )


def __getattr__(name: str) -> Any:
    """Import what is not needed by `load` where it is asked for."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
