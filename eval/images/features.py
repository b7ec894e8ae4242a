"""Features of images by torch-fidelity's Inception network, kept by the hash of their content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from data_pipelines.jobs.shard_job import batched
from data_pipelines.sources.local_files import files_below
from eval.provenance import sha256_of
from mmdlm.atomic_files import atomic_write

EXTRACTOR = "inception-v3-compat"  # torch-fidelity's default: the network of 2015, as published
POOLED, LOGITS = "2048", "logits_unbiased"  # its features for FID and KID, and for IS
ENDINGS = (".png", ".jpg", ".jpeg")  # that torch-fidelity's own command reads
BATCHES = 8  # in a block that is kept by itself
URL_FILE = "weights-inception-2015-12-05-6726825d.pth"  # in the cache of torch.hub


@dataclass(frozen=True)
class Network:
    """The Inception network of torch-fidelity.

    Attributes:
        weights: Its file; None: from the cache of torch.hub, where the library downloads it to.
        device: That it is put on.
        batch_size: Images at a time; features differ with it in their last digits.
    """

    weights: Path | None
    device: torch.device
    batch_size: int = 64

    @cached_property
    def path(self) -> Path:
        """The file of weights; ValueError where there is none, or it is no state dict."""
        path = self.weights or Path(torch.hub.get_dir()) / "checkpoints" / URL_FILE
        if not path.is_file():
            raise ValueError(
                f"{path}: no such file; download {URL_FILE} of torch-fidelity's release v0.2.0 "
                "and name it with --weights"
            )
        try:  # the library itself would run what a pickle asks for
            torch.load(path, map_location="meta", weights_only=True)
        except (RuntimeError, EOFError, UnpicklingError) as error:
            reason = " ".join(str(error).split())[:120]
            raise ValueError(f"{path} is no state dict of torch ({reason})") from None
        return path

    @cached_property
    def sha256(self) -> str:
        """Of the file of weights."""
        return sha256_of(self.path)

    @cached_property
    def extractor(self) -> Any:
        """The network, in evaluation mode; ValueError where its weights do not fit."""
        fidelity = library()
        try:
            network = fidelity.utils.create_feature_extractor(
                EXTRACTOR,
                [POOLED, LOGITS],
                cuda=False,
                feature_extractor_weights_path=str(self.path),
                verbose=False,
            )
        except (RuntimeError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ValueError(f"{self.path} does not hold {EXTRACTOR} ({reason})") from None
        return network.to(self.device)

    @torch.no_grad()
    def features(self, files: Sequence[Path]) -> dict[str, Tensor]:
        """Return {POOLED: [N, 2048], LOGITS: [N, 1008]} of N images, float32 on the CPU."""
        images = library().datasets.ImagesPathDataset([str(path) for path in files])
        found: dict[str, list[Tensor]] = {POOLED: [], LOGITS: []}
        for batch in batched(iter(range(len(files))), self.batch_size):
            try:
                pixels = torch.stack([images[number] for number in batch])
            except (RuntimeError, OSError) as error:
                names = f"{files[batch[0]]} to {files[batch[-1]]}"
                reason = " ".join(str(error).split())[:160]
                raise ValueError(
                    f"{names}: images are damaged or of several sizes ({reason}); scale them to one"
                ) from None
            given = self.extractor(pixels.to(self.device))
            for name, part in self.extractor.convert_features_tuple_to_dict(given).items():
                found[name].append(part.float().cpu())
        return {name: torch.cat(parts) for name, parts in found.items()}


def library() -> Any:
    """Return the module torch_fidelity; ValueError where it is not installed."""
    try:
        import torch_fidelity
        import torch_fidelity.datasets
        import torch_fidelity.metric_fid
        import torch_fidelity.metric_isc
        import torch_fidelity.metric_kid
        import torch_fidelity.utils
    except ImportError as error:
        raise ValueError(
            f"FID, KID and IS are measured by torch-fidelity ({error}): pip install 'mmdlm[images]'"
        ) from error
    return torch_fidelity


def image_files(folder: Path) -> list[Path]:
    """Return the images that torch-fidelity reads of a folder and those below, in its order.

    Raises ValueError where there are none.
    """
    files = [Path(one) for one in sorted(map(os.path.realpath, files_below(folder, ENDINGS)))]
    if not files:
        raise ValueError(f"{folder}: no images in it ({', '.join(ENDINGS)})")
    return files


def kept_features(
    files: Sequence[Path], network: Network, cache: Path, *, title: str
) -> dict[str, Tensor]:
    """Return features of images, computed once: each block is kept by the hash of its content.

    Each process of `accelerate launch` computes its share, and then takes those of the others.

    Args:
        files: The images.
        network: Makes the features.
        cache: Folder for the blocks.
        title: Of the progress bar.

    Returns:
        As `Network.features`.
    """
    blocks = list(batched(iter(files), BATCHES * network.batch_size))
    paths = [cache / f"{_key(block, network)}.safetensors" for block in blocks]
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    todo = [n for n in range(rank, len(blocks), world) if not paths[n].is_file()]
    for number in tqdm(todo, desc=title, unit=" blocks", disable=rank > 0 or not todo):
        _compute(blocks[number], paths[number], network)
    if world > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()
    parts = list(_read(blocks, paths, network))
    return {name: torch.cat([part[name] for part in parts]) for name in (POOLED, LOGITS)}


def _compute(block: Sequence[Path], path: Path, network: Network) -> None:
    data = safetensors.torch.save(network.features(block))
    atomic_write(path, lambda file: file.write(data), part=f".{os.getpid()}.part")


def _read(
    blocks: Sequence[Sequence[Path]], paths: Sequence[Path], network: Network
) -> Iterator[dict[str, Tensor]]:
    for block, path in zip(blocks, paths, strict=True):
        try:
            found = safetensors.torch.load_file(path)
            if len(found[POOLED]) == len(block):
                yield found
                continue
        except (OSError, KeyError, safetensors.SafetensorError):
            pass  # damaged: computed again
        _compute(block, path, network)
        yield safetensors.torch.load_file(path)


def _key(block: Sequence[Path], network: Network) -> str:
    """Return sha256 over the weights, the size of a batch and the content of images."""
    digest = hashlib.sha256(f"{network.sha256} {network.batch_size}".encode())
    for path in block:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def digest_of(files: Sequence[Path]) -> str:
    """Return sha256 over the contents of images, in their order."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def statistics(pooled: Tensor) -> dict[str, np.ndarray]:
    """Return mean [2048] and covariance [2048, 2048] of features [N, 2048], as for FID."""
    found: dict[str, np.ndarray] = library().metric_fid.fid_features_to_statistics(pooled)
    return found
