"""The weights of a vision tower, from where towers are published."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmdlm.vision.checkpoint_files import check_stays, reason_of
from mmdlm.vision.encoders.open_clip_tower import OpenClipTower
from mmdlm.vision.encoders.tower import Tower


def load_tower(tower: Tower, folder: Path) -> None:
    """Fill a tower with the weights in a folder of safetensors files.

    Those of transformers' SigLIP and SigLIP 2 (the whole model, or its vision half), or of an
    open_clip model (the whole, or its `visual`). What belongs to the text half is left; the pooling
    head, where the tower was built without one, too.

    Raises ValueError for a tensor that is missing, has another shape or has no place in the tower.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"tower weights {folder}: no safetensors files there; correct the path")
    wanted = tower.state_dict()
    found: dict[str, Tensor] = {}
    strange = []
    for path in files:
        check_stays(path, folder)
        try:
            with safe_open(path, framework="pt") as file:
                for stored in file.keys():  # noqa: SIM118
                    name = _name(stored, is_open_clip=isinstance(tower, OpenClipTower))
                    if name in wanted:
                        found[name] = file.get_tensor(stored)
                    elif name is not None and not name.startswith("head."):
                        strange.append(stored)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is damaged ({reason_of(error)}); copy or download it again"
            ) from error
    missing = sorted(wanted.keys() - found.keys())
    other = [
        f"{name} {list(tensor.shape)}, not {list(wanted[name].shape)}"
        for name, tensor in sorted(found.items())
        if tensor.shape != wanted[name].shape
    ]
    for what, names in (
        ("lack", missing),
        ("have beyond it", strange),
        ("have in another shape", other),
    ):
        if names:
            raise ValueError(
                f"tower weights {folder} do not fit the tower: they {what} {', '.join(names[:3])}"
                f"{' ...' if len(names) > 3 else ''} ({len(names)} tensors); set the fields of "
                "`vision.tower` to those of their config.json"
            )
    with torch.no_grad():
        for name, tensor in found.items():
            wanted[name].copy_(tensor)


def _name(stored: str, *, is_open_clip: bool) -> str | None:
    """Return the name that a stored tensor has in a tower; None where it belongs elsewhere."""
    if is_open_clip:
        return stored if stored.startswith("visual.") else None
    if stored.startswith("text_model.") or stored in ("logit_scale", "logit_bias"):
        return None
    if stored.endswith(".position_ids"):  # 0, 1, 2 ..., which older files hold
        return None
    return stored.removeprefix("vision_model.")
