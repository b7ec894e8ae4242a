"""The contract of an image tokenizer: encode, decode, reconstruct, save and load."""

from __future__ import annotations

import inspect
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from mmdlm.atomic_files import atomic_write_all
from mmdlm.vision.checkpoint_files import reason_of
from mmdlm.vision.digests import check_digests, forget_digests, write_digests
from mmdlm.vision.known_names import suggestion
from mmdlm.vision.tokenizers.stored_tokenizer import (
    CONFIG,
    WEIGHTS,
    check_depth,
    family_of,
    find_weights,
    load_weights,
    read_config,
    tensor_names,
)


class ImageTokenizer(nn.Module, ABC):
    """Turns an image into a grid of codes, and a grid of codes into an image.

    A subclass names its `family` (what config.json stores as `_class_name`; never a class path, as
    downloaded weights must not choose imports), takes its options as keyword arguments that JSON
    can hold, gives them back as `config`, and sets:

    codebook_size: number of codes; codes are 0 ... codebook_size - 1.
    image_size: edge in pixels of the images it was trained on; other sizes are allowed.
    downsampling: pixels per code along one edge, so an image has K = (H / f) (W / f) codes.
    """

    family: ClassVar[str]
    codebook_size: int
    image_size: int
    downsampling: int

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] pixels in [-1, 1] -> [N, K] int64 codes in raster order.

        Raises ValueError when H or W is not a multiple of `downsampling`.
        """

    @abstractmethod
    def decode(self, codes: Tensor, *, grid: tuple[int, int] | None = None) -> Tensor:
        """[N, K] codes in raster order -> [N, 3, H, W] pixels, in [-1, 1] up to overshoot.

        `grid` is (rows, columns); by default the grid is square.
        Raises ValueError when the codes do not fill the grid or lie outside the codebook.
        """

    @abstractmethod
    def reconstruct(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruct [N, 3, H, W] -> (reconstruction [N, 3, H, W], auxiliary loss []).

        Differentiable with respect to every trained parameter, through the quantizer; pixels are
        not clamped. The auxiliary loss is what the quantizer adds to the reconstruction loss,
        already weighted (zero where it adds nothing).
        """

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The keyword arguments that build this tokenizer again, as JSON can hold them."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Call `reconstruct`, so that data-parallel wrappers see the training step."""
        return self.reconstruct(pixels)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build an untrained tokenizer from the content of a config.json.

        Raises ValueError for an option that the family does not have, or one that it lacks.
        """
        return cls(**cls.options(config, cls))

    @classmethod
    def options(cls, config: Mapping[str, Any], constructor: Callable[..., Any]) -> dict[str, Any]:
        """Select the entries of a config that `constructor` takes; `_` marks bookkeeping.

        Raises ValueError for an option that it does not have, or one that it lacks.
        """
        options = {
            name: value
            for name, value in config.items()
            if not name.startswith("_") and name != "model_type"
        }
        parameters = inspect.signature(constructor).parameters
        for name in options:
            if name not in parameters:
                raise ValueError(
                    f"unknown option {name!r}; {cls.family} takes {', '.join(parameters)}"
                    f"{suggestion(name, parameters)}"
                )
        for name, parameter in parameters.items():
            if parameter.default is parameter.empty and name not in options:
                raise ValueError(f"option {name!r} is missing; {cls.family} needs it")
        return options

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str]) -> Self:
        """Load config.json and the weights of `folder`, strictly; the result is in eval mode.

        Raises ValueError that names the file or tensor when a file is missing, damaged or of
        another family, or when a tensor is missing, unexpected or misshapen.
        """
        config = read_config(folder)
        family = family_of(config)
        if family not in (None, cls.family):
            raise ValueError(
                f"{Path(folder) / CONFIG} describes a {family!r}, not a {cls.family!r}; "
                "load_image_tokenizer picks the right class"
            )
        weights = find_weights(folder)
        names = tensor_names(weights)
        try:
            check_depth(config, len(names))
            tokenizer = cls.from_config(config)
        except (AttributeError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise ValueError(f"{Path(folder) / CONFIG}: {reason_of(error)}") from error
        except RuntimeError as error:  # torch's: a tensor that no memory holds
            raise ValueError(
                f"{Path(folder) / CONFIG} cannot be built ({reason_of(error)}); copy or "
                "download it again"
            ) from error
        load_weights(tokenizer.stored_module(), weights)
        check_digests(Path(folder))
        return tokenizer.eval()

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write config.json and model.safetensors into `folder`, which is created where absent.

        Both files are written beside their final names and renamed when complete, so that a kill or
        a full disk leaves the previous checkpoint intact. Raises OSError that says so.
        """
        folder = Path(folder)
        weights = folder / WEIGHTS[0]
        config = folder / CONFIG
        tensors = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in self.stored_module().state_dict().items()
        }
        text = json.dumps({"_class_name": self.family, **self.config}, indent=2) + "\n"

        def write_config(file: BinaryIO) -> None:
            file.write(text.encode())
            forget_digests(folder)  # the weights are written; their old digests go before them

        try:
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write_all(
                {
                    weights: lambda file: save_file(tensors, file.name, metadata={"format": "pt"}),
                    config: write_config,
                }
            )
            write_digests(folder)
        except (OSError, SafetensorError) as error:  # safetensors wraps the errors of its writes
            size = sum(tensor.nbytes for tensor in tensors.values()) / 2**20
            raise OSError(
                f"cannot save the image tokenizer to {folder}: {error}; what was saved there "
                f"before is intact; free {size:.1f} MiB or choose another folder"
            ) from error

    def stored_module(self) -> nn.Module:
        """Return the module whose tensors a checkpoint holds, under the names it gives them."""
        return self

    def check_pixels(self, pixels: Tensor) -> None:
        """Raise ValueError unless pixels are [N, 3, H, W] floats with whole code cells."""
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
            raise ValueError(
                f"pixels must be floats in [-1, 1] of shape [N, 3, H, W], "
                f"not {pixels.dtype} of shape {list(pixels.shape)}"
            )
        height, width = pixels.shape[2:]
        if height % self.downsampling or width % self.downsampling or not height * width:
            raise ValueError(
                f"an image of {height}x{width} pixels does not divide into codes of "
                f"{self.downsampling}x{self.downsampling}; resize it to whole codes"
            )

    def check_codes(self, codes: Tensor, grid: tuple[int, int] | None = None) -> tuple[int, int]:
        """[N, K] codes -> their grid (rows, columns).

        Raises ValueError when the codes do not fill the grid or lie outside the codebook.
        """
        if codes.ndim != 2 or codes.is_floating_point():
            raise ValueError(
                f"codes must be integers of shape [N, K], "
                f"not {codes.dtype} of shape {list(codes.shape)}"
            )
        count = codes.shape[1]
        if grid is None:
            edge = math.isqrt(count)
            if edge * edge != count:
                raise ValueError(f"{count} codes fill no square; pass grid=(rows, columns)")
            grid = (edge, edge)
        rows, columns = grid
        if rows < 1 or columns < 1 or rows * columns != count:
            raise ValueError(f"{count} codes do not fill a grid of {rows}x{columns}")
        if codes.numel():
            low, high = (int(value) for value in torch.aminmax(codes))
            if low < 0 or high >= self.codebook_size:
                raise ValueError(
                    f"code {low if low < 0 else high} is not one of the "
                    f"{self.codebook_size} codes of this tokenizer"
                )
        return rows, columns
