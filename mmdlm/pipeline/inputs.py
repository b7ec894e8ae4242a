"""Bring what callers give, in any accepted form, into the one form that is worked with."""

from __future__ import annotations

import importlib
import os
import sys
from collections import abc
from dataclasses import replace
from os import PathLike
from typing import Any, TypeVar, Unpack

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmdlm.pipeline.generation_config import GenerationConfig
from mmdlm.pipeline.options import SamplingOptions
from mmdlm.templates.conversation import IMAGE
from mmdlm.vision.image_files import open_image, open_mask, to_rgb
from mmdlm.vision.image_urls import data_of, is_url
from mmdlm.vision.pixels import to_image

Part = TypeVar("Part")
Array = np.ndarray[Any, np.dtype[Any]]
ImageLike = Image.Image | str | PathLike[str] | bytes | Tensor | Array
MaskLike = Image.Image | Tensor | Array


def images_of(image: ImageLike | abc.Sequence[ImageLike]) -> tuple[list[ImageLike], bool]:
    """Return all images of one image or several, and whether it was one."""
    if isinstance(image, Tensor | np.ndarray) and image.ndim == 4:
        return list(image), False
    if isinstance(image, Image.Image | str | PathLike | bytes | Tensor | np.ndarray):
        return [image], True
    return (list(image), False) if isinstance(image, abc.Iterable) else ([image], True)


def pillow_image(image: ImageLike, *, whole: bool = False) -> Image.Image:
    """Open an image in any accepted form as RGB.

    Args:
        image: To open.
        whole: Keep the size of every image, as in `open_image`.

    Returns:
        An upright image on white.

    Raises:
        ValueError: For a URL, which `mmdlm.load_image` fetches; for pixels out of their range; for
            what is no image.
    """
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, Tensor):
        if image.is_floating_point() and image.numel() and not bool(image.abs().max() <= 1.001):
            raise ValueError(
                f"an image's tensor has values from {image.min():.3g} to {image.max():.3g}; "
                "pixels lie in [-1, 1]"
            )
        if not image.is_floating_point():
            raise ValueError(f"an image's tensor is {image.dtype}; pixels are floats in [-1, 1]")
        return to_image(image)
    if isinstance(image, np.ndarray):
        return to_rgb(Image.fromarray(_levels(image)))
    if isinstance(image, str) and image[:5].lower() == "data:":
        return open_image(data_of(image), whole=whole)
    if is_url(image):
        raise ValueError(
            f"{str(image)[:80]!r} is a URL; fetch it by mmdlm.load_image(URL), and give the result"
        )
    if isinstance(image, str | PathLike | bytes):
        return open_image(image, whole=whole)
    raise ValueError(
        f"{type(image).__name__} is no image; give a Pillow image, a path, the bytes of a file, a "
        "numpy array [H, W, 3], or a tensor [3, H, W] in [-1, 1]"
    )


def _levels(image: Array) -> Array:
    """Turn an array of pixels into uint8 levels that Pillow reads."""
    shown = f"an image's array of shape {list(image.shape)} and {image.dtype}"
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise ValueError(f"{shown} is no image; give [H, W, 3], [H, W, 4] or [H, W]")
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    if image.dtype == np.uint8:
        return image
    if not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"{shown} has neither uint8 levels nor floats in [0, 1]; convert it")
    if image.size and not bool((image >= -0.001).all() and (image <= 1.001).all()):
        raise ValueError(
            f"{shown} has values from {image.min():.3g} to {image.max():.3g}; floats of an array "
            "lie in [0, 1], levels are uint8"
        )
    return np.asarray(np.rint(np.clip(image, 0, 1) * 255), np.uint8)


def hole_of(mask: MaskLike, size: tuple[int, int]) -> Tensor:
    """Read a mask for an image of `size` (width, height).

    Args:
        mask: White, 1 or True where the image is to be repainted.
        size: (width, height) of the image, in pixels.

    Returns:
        [H, W] bool, True where the image is repainted.

    Raises:
        ValueError: If it is not a mask, has another size, or has no hole.
    """
    if isinstance(mask, np.ndarray):
        level = mask > 127 if mask.dtype == np.uint8 else mask
        mask = torch.from_numpy(np.ascontiguousarray(level[..., 0] if mask.ndim == 3 else level))
    if isinstance(mask, Image.Image):
        hole = torch.from_numpy(np.asarray(open_mask(mask)) > 0)
    elif isinstance(mask, Tensor) and (mask.dtype == torch.bool or mask.is_floating_point()):
        hole = (mask if mask.ndim == 2 else mask.squeeze(0)).cpu() >= 0.5
    else:
        raise ValueError(
            f"{type(mask).__name__} is no mask; give a Pillow image, or a tensor or array [H, W] "
            "of bool or of floats in [0, 1]"
        )
    width, height = size
    if hole.shape != (height, width):
        shape = " x ".join(str(side) for side in reversed(hole.shape))
        raise ValueError(
            f"the mask is {shape} but the image is {width} x {height}; give a mask of the "
            "image's size"
        )
    if not bool(hole.any()):
        raise ValueError("the mask has no hole; make white what is to be drawn again")
    return hole


def generation_config_with(
    generation_config: GenerationConfig, **given: Unpack[SamplingOptions]
) -> GenerationConfig:
    """Return the config with the values that a caller gave; None leaves what is there."""
    changed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return replace(generation_config, **changed)


def part_of(given: str, kind: type[Part], *, names: tuple[str, ...]) -> str | Part:
    """Return a known name as it is; for the class path of a part of one's own return such a part.

    The path is that of a class `kind` that needs no arguments: "my_module.MyOrder". It runs code of
    that module: pass only what the user has typed, never what a checkpoint says.
    """
    if given in names:
        return given
    module, _, name = given.rpartition(".")
    known = f"give one of {', '.join(names)}, or the class path of a {kind.__name__} of your own"
    if not module:
        raise ValueError(f"{given!r} is no {kind.__name__} that is known; {known}")
    folder = os.getcwd()
    sys.path.insert(0, folder)  # an installed command does not look for modules where it is started
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{given!r} cannot be imported ({error}); {known}") from error
    finally:
        sys.path.remove(folder)
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ValueError(f"{given!r} is no {kind.__name__}; {known}")
    try:
        return found()
    except TypeError as error:
        raise ValueError(
            f"{given!r} cannot be made without arguments ({error}); give each field a default"
        ) from error


def images_of_each(images: Any, *, single: bool, count: int, what: str) -> list[list[ImageLike]]:
    """List the images of each document: None, one or several; if not `single`, a list of these."""
    each = [images] if single else [None] * count if images is None else list(images)
    if len(each) != count:
        raise ValueError(
            f"{count} {what} but {len(each)} entries of images; give one for each: an image, a "
            "list of them, or None"
        )
    return [[] if some is None else images_of(some)[0] for some in each]


def with_places(question: str, images: int) -> str:
    """Return the question with a placeholder for each image: its own, or else before it."""
    if IMAGE in question or not images:
        return question
    return " ".join([IMAGE] * images) + "\n" + question


def negatives_of(
    negative_prompt: str | abc.Sequence[str] | None, *, count: int, guided: bool
) -> list[str]:
    """Return one negative prompt for each prompt; "" stands for none."""
    if negative_prompt is None or isinstance(negative_prompt, str):
        negatives = [negative_prompt or ""] * count
    else:
        negatives = list(negative_prompt)
    if len(negatives) != count:
        raise ValueError(
            f"{len(negatives)} negative prompts for {count} prompts; give one for all, or one "
            "for each"
        )
    if not guided and any(one.strip() for one in negatives):
        raise ValueError(
            f"negative_prompt {negative_prompt!r} has no effect at guidance_scale 1, which is "
            "no guidance; raise it, for example to 3"
        )
    return negatives
