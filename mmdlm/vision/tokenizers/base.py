"""What an image tokenizer promises, and how one is stored and loaded."""

from __future__ import annotations

import inspect
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmdlm.vision.checkpoint_files import check_stays, reason_of
from mmdlm.vision.known_names import suggestion

CONFIG = "config.json"
# Ours, then the names under which published tokenizers are stored.
WEIGHTS = (
    "model.safetensors",
    "pytorch_model.safetensors",  # showlab/magvitv2
    "diffusion_pytorch_model.safetensors",  # diffusers
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
        """What training needs: [N, 3, H, W] -> (reconstruction [N, 3, H, W], auxiliary loss []).

        Differentiable with respect to every trained parameter, through the quantizer; pixels are
        not clamped. The auxiliary loss is what the quantizer adds to the reconstruction loss,
        already weighted (zero where it adds nothing).
        """

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The keyword arguments that build this tokenizer again, as JSON can hold them."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The same as `reconstruct`; so that data-parallel wrappers see the training step."""
        return self.reconstruct(pixels)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build an untrained tokenizer from the content of a config.json.

        Raises ValueError for an option that the family does not have, or one that it lacks.
        """
        return cls(**cls.options(config, cls))

    @classmethod
    def options(cls, config: Mapping[str, Any], constructor: Callable[..., Any]) -> dict[str, Any]:
        """The entries of a config that `constructor` takes; an underscore marks bookkeeping.

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
        weights = _find_weights(folder)
        names = _names(weights)
        try:
            _check_depth(config, len(names))
            tokenizer = cls.from_config(config)
        except (AttributeError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise ValueError(f"{Path(folder) / CONFIG}: {reason_of(error)}") from error
        except RuntimeError as error:  # torch's: a tensor that no memory holds
            raise ValueError(
                f"{Path(folder) / CONFIG} cannot be built ({reason_of(error)}); copy or "
                "download it again"
            ) from error
        _load_weights(tokenizer.stored_module(), weights)
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
        parts = {weights: _part(weights), config: _part(config)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, parts[weights], metadata={"format": "pt"})
            parts[config].write_text(text, encoding="utf-8")
            for part in parts.values():
                _flush_to_disk(part)
            for path, part in parts.items():
                os.replace(part, path)
        except (OSError, SafetensorError) as error:  # safetensors wraps the errors of its writes
            for part in parts.values():
                if part.is_file():
                    part.unlink()
            size = sum(tensor.nbytes for tensor in tensors.values()) / 2**20
            raise OSError(
                f"cannot save the image tokenizer to {folder}: {error}; what was saved there "
                f"before is intact; free {size:.1f} MiB or choose another folder"
            ) from error

    def stored_module(self) -> nn.Module:
        """The module whose tensors a checkpoint holds, under the names it gives them."""
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


def load_image_tokenizer(folder: str | PathLike[str]) -> ImageTokenizer:
    """Load a tokenizer of any family that mmdlm knows, by the name in its config.json.

    A published config may be empty: the names of the tensors tell the family then, and its options
    are the defaults, those of the published tokenizer. Raises ValueError that names the file,
    tensor or family at fault.
    """
    family = family_of(read_config(folder)) or _family_of_tensors(folder)
    return _tokenizer_class(family, Path(folder) / CONFIG).from_pretrained(folder)


def _tokenizer_class(family: str | None, source: Path) -> type[ImageTokenizer]:
    """The class of a family; each module is imported only when it is needed."""
    match family:
        case "PatchTokenizer":
            from mmdlm.vision.tokenizers.patch_tokenizer import PatchTokenizer

            return PatchTokenizer
        case "MAGVITv2":
            from mmdlm.vision.tokenizers.magvit2 import Magvit2Tokenizer

            return Magvit2Tokenizer
        case "VQModel":
            from mmdlm.vision.tokenizers.vq_model import VQModelTokenizer

            return VQModelTokenizer
    known = "PatchTokenizer, MAGVITv2, VQModel"
    if family is None:
        raise ValueError(f'{source} names no family; add "_class_name", one of {known}')
    raise ValueError(f"{source}: unknown image tokenizer {family!r}; known are {known}")


def family_of(config: Mapping[str, Any]) -> str | None:
    """The family that a config names: `_class_name` (diffusers) or `model_type` (transformers)."""
    return config.get("_class_name") or config.get("model_type")


def _family_of_tensors(folder: str | PathLike[str]) -> str | None:
    """The family whose mark is among the names of the tensors."""
    names = _names(_find_weights(folder))
    marks = {"quantize.power_vals": "MAGVITv2", "quantize.embedding.weight": "VQModel"}
    return next((family for name, family in marks.items() if name in names), None)


def _names(path: Path) -> set[str]:
    """The names of the tensors in a file."""
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} is damaged or truncated ({reason_of(error)}); copy or download it again"
        ) from error


def _check_depth(config: Mapping[str, Any], tensors: int) -> None:
    """ValueError for more blocks than there are tensors, before they are made to be compared."""
    for name, value in config.items():
        counts = value if isinstance(value, list) else [value]
        if "depth" in name or "blocks" in name:
            for count in counts:
                if isinstance(count, int) and count > tensors:
                    raise ValueError(f"{name} is {value}, but there are {tensors} tensors")


def read_config(folder: str | PathLike[str]) -> dict[str, Any]:
    """The content of `folder`/config.json.

    Raises ValueError when the folder or the file is missing, or the file is not a JSON object.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"no folder {str(folder)!r} with an image tokenizer; check the path, or fetch a "
            "published one with: hf download OWNER/NAME --local-dir FOLDER"
        )
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} is missing; a folder with an image tokenizer holds {CONFIG} and {WEIGHTS[0]}"
        ) from error
    except (OSError, ValueError, RecursionError) as error:  # a JSON error is a ValueError
        raise ValueError(
            f"{path} cannot be read ({reason_of(error)}); copy or download it again"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(config).__name__}")
    return config


def _find_weights(folder: str | PathLike[str]) -> Path:
    for name in WEIGHTS:
        path = Path(folder) / name
        if path.is_file():
            check_stays(path, Path(folder))
            return path
    raise ValueError(
        f"{folder} holds no weights; one of {', '.join(WEIGHTS)} is needed "
        "(pickled .bin and .ckpt files are not read: they can run code)"
    )


def _load_weights(module: nn.Module, path: Path) -> None:
    """Copy the tensors of a safetensors file into `module`; names and shapes must agree exactly."""
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} is damaged or truncated ({reason_of(error)}); copy or download it again"
        ) from error
    wanted = module.state_dict()
    fix = f"{CONFIG} beside it describes another model, or the file is incomplete"
    if missing := sorted(wanted.keys() - stored.keys()):
        raise ValueError(f"{path}: {_some(missing)} missing; {fix}")
    if unexpected := sorted(stored.keys() - wanted.keys()):
        raise ValueError(f"{path}: {_some(unexpected)} not expected; {fix}")
    for name, tensor in wanted.items():
        if stored[name].shape != tensor.shape:
            raise ValueError(
                f"{path}: tensor {name!r} has shape {list(stored[name].shape)} where "
                f"{list(tensor.shape)} is needed; {fix}"
            )
    module.load_state_dict(stored)


def _some(names: list[str]) -> str:
    """The first name, and how many follow, as the subject of a sentence."""
    if len(names) == 1:
        return f"tensor {names[0]!r} is"
    return f"tensor {names[0]!r} and {len(names) - 1} more are"


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _flush_to_disk(path: Path) -> None:
    """Wait until the content is on disk, so that the rename never precedes it."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
