"""The tensors of a checkpoint folder, by the headers of its files: names and shapes, no weights."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from mmdlm.models.checkpoints.stored_tensor import DTYPES, StoredTensor
from mmdlm.vision.checkpoint_files import check_stays, named_file, read_json, reason_of, shown

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """What lies in a folder.

    Attributes:
        config: Content of config.json.
        shards: Safetensors files, in the order of their names.
        tensors: By name.
    """

    folder: Path
    config: dict[str, Any]
    shards: tuple[Path, ...]
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, folder: str | PathLike[str]) -> Checkpoint:
        """Read config.json and the headers.

        Raises ValueError for a file that is missing or damaged, a shard that the index names but
        that is not there, and a tensor that is in no shard.
        """
        folder = Path(folder)
        config = read_json(folder / "config.json")
        if not isinstance(config, dict):
            raise ValueError(f"{folder / 'config.json'} holds no object {{...}}; download it again")
        shards, indexed = _shards(folder)
        tensors: dict[str, StoredTensor] = {}
        for shard in shards:
            found = tensors_of(shard)
            if twice := sorted(found.keys() & tensors.keys()):
                raise ValueError(
                    f"{shard}: tensor {shown(twice[0])} is in {tensors[twice[0]].shard.name} too; "
                    "download the folder again"
                )
            tensors.update(found)
        lost = sorted(indexed - tensors.keys())
        if lost:
            raise ValueError(
                f"{folder}: {len(lost)} of the {len(indexed)} tensors in {INDEX} are in no shard "
                f"({', '.join(lost[:3])}); download the folder again"
            )
        return cls(folder, config, tuple(shards), tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, by name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point dtype that most of the weights are stored in."""
        sizes: Counter[torch.dtype] = Counter()
        for tensor in self.tensors.values():
            if tensor.dtype.is_floating_point:
                sizes[tensor.dtype] += math.prod(tensor.shape)
        return sizes.most_common(1)[0][0] if sizes else torch.float32

    def check_fits(
        self, wanted: Mapping[str, tuple[int, ...]], *, names: Mapping[str, str]
    ) -> None:
        """Compare the headers with a model, before any weights are read.

        Args:
            wanted: Shapes of the model's tensors, by our names.
            names: The files' names -> ours.

        Raises:
            ValueError: That names tensors which have another shape, hold whole numbers, are
                missing, or are too many.
        """
        theirs = {ours: name for name, ours in names.items()}
        found = {names[name]: tensor.shape for name, tensor in self.tensors.items()}
        misshapen = sorted(
            name for name in found.keys() & wanted.keys() if found[name] != wanted[name]
        )
        problems = []
        if misshapen:
            listed = ", ".join(
                f"{theirs[name]} is {list(found[name])} in the file and {list(wanted[name])} in "
                "the model"
                for name in misshapen[:3]
            )
            problems.append(f"{len(misshapen)} of {len(wanted)} tensors are mismatched: {listed}")
        if whole := [n for n, tensor in self.tensors.items() if not tensor.is_floating_point()]:
            listed = ", ".join(f"{name} ({self.tensors[name].dtype})" for name in sorted(whole)[:3])
            problems.append(f"{len(whole)} of {len(found)} tensors hold no fractions: {listed}")
        if missing := sorted(wanted.keys() - found.keys()):
            listed = ", ".join(missing[:5])
            problems.append(f"{len(missing)} of {len(wanted)} tensors are missing: {listed}")
        if beyond := sorted(theirs[name] for name in found.keys() - wanted.keys()):
            listed = ", ".join(beyond[:5])
            problems.append(f"{len(beyond)} of {len(found)} tensors are not the model's: {listed}")
        if problems:
            raise ValueError(
                f"checkpoint {self.folder} does not fit its config.json: {'; '.join(problems)}"
            )

    def check_tied(self, pairs: Mapping[str, str], *, names: Mapping[str, str]) -> None:
        """Compare tensors that config.json calls the same, where both are in the files.

        Args:
            pairs: Our names of the one and the other.
            names: The files' names -> ours.

        Raises:
            ValueError: For two that differ.
        """
        theirs = {ours: name for name, ours in names.items()}
        for one, other in pairs.items():
            if one not in theirs or other not in theirs:
                continue
            first, second = self.tensors[theirs[one]], self.tensors[theirs[other]]
            if not torch.equal(first[...], second[...]):
                raise ValueError(
                    f"checkpoint {self.folder} does not fit its config.json, which ties the head "
                    f"to the embedding: {first.name} and {second.name} differ; correct the config"
                )

    def rewrite(
        self,
        out: Path,
        *,
        names: Mapping[str, str],
        change: Callable[[str, Tensor], Tensor] | None = None,
        metadata: dict[str, str] | None = None,
    ) -> Iterator[tuple[int, int]]:
        """Write the weights again, one shard at a time -> (shards done, shards) after each.

        Args:
            out: Folder for the files.
            names: The files' names -> those to write; tensors that are not in it are left out.
            change: A tensor by the name to write -> what is written; None: the same bits.
            metadata: Of the files; None: what they have. They keep their own names.

        Yields:
            (shards done, shards) after each.
        """
        where: dict[str, str] = {}
        size = 0
        for done, shard in enumerate(self.shards, 1):
            with safe_open(shard, framework="pt") as file:
                tensors = {
                    names[name]: file.get_tensor(name)
                    for name in file.keys()  # noqa: SIM118
                    if name in names
                }
                kept = file.metadata()
            if change is not None:
                tensors = {name: change(name, tensor) for name, tensor in tensors.items()}
            if tensors:
                save_file(tensors, out / shard.name, metadata=metadata or kept)
            where.update(dict.fromkeys(tensors, shard.name))
            size += sum(tensor.nbytes for tensor in tensors.values())
            yield done, len(self.shards)
        if len(self.shards) > 1:
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
            (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Origin:
    """Where the weights of a model were read from.

    Attributes:
        folder: Of the checkpoint.
        step: Of its run; None for a checkpoint that is no step.
        files: Of weights, and the sha256 of those that were compared with it as they were read.
    """

    folder: Path
    step: int | None
    files: Mapping[Path, str | None]


def local_folder(name_or_path: str | PathLike[str], **options: Any) -> Path:
    """Return a checkpoint's folder, downloaded from the Hugging Face Hub if it is not local.

    Args:
        name_or_path: A folder, or a repository OWNER/NAME.
        **options: Of `huggingface_hub.snapshot_download`: revision, token, cache_dir ...

    Returns:
        A local folder.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
    return Path(snapshot_download(str(name_or_path), allow_patterns=patterns, **options))


def refuse_strange_tensors(folder: object, info: dict[str, Any]) -> None:
    """ValueError for what transformers reports about a checkpoint that does not fit its config."""
    for what, keys in info.items():
        if keys and what != "error_msgs":
            listed = ", ".join(sorted(str(key) for key in keys)[:5])
            raise ValueError(
                f"checkpoint {folder}: {len(keys)} {what.replace('_', ' ')}: {listed}; it does "
                "not fit its config.json"
            )


def tokenizer_size(folder: Path) -> int | None:
    """Ids of the text tokenizer in a folder; None where there is no tokenizer.json."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        return int(Tokenizer.from_file(str(path)).get_vocab_size())
    except Exception as error:  # the library raises bare ones
        raise ValueError(
            f"{path} cannot be read ({reason_of(error)}); copy or download it again"
        ) from error


def _shards(folder: Path) -> tuple[list[Path], set[str]]:
    """Return the files of the weights, and the tensors that an index promises."""
    if (folder / WEIGHTS).is_file():
        check_stays(folder / WEIGHTS, folder)
        return [folder / WEIGHTS], set()
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"{folder / WEIGHTS} is missing; copy or download the folder again (weights in .bin "
            "files are not read: save them as safetensors)"
        )
    content = read_json(folder / INDEX)
    where = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{folder / INDEX} has no weight_map; copy or download it again")
    files = {named_file(folder, name, named_by=folder / INDEX) for name in where.values()}
    names = sorted(path.name for path in files)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        tensors = sum(name in missing for name in where.values())
        raise ValueError(
            f"{folder}: {len(missing)} of {len(names)} shards are missing ({', '.join(missing)}, "
            f"{tensors} of {len(where)} tensors); download them"
        )
    for path in files:
        check_stays(path, folder)
    return [folder / name for name in names], set(where)


def tensors_of(shard: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name, from its header.

    Args:
        shard: The file.

    Returns:
        Where each tensor lies in the file; no data is read.

    Raises:
        ValueError: For a file that is damaged.
    """
    tensors = {}
    try:
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                header = file.get_slice(name)
                dtype = DTYPES.get(header.get_dtype())
                if dtype is None:
                    raise ValueError(
                        f"{shard}: tensor {shown(name)} is stored as {header.get_dtype()}, which "
                        "is not read here"
                    )
                tensors[name] = StoredTensor(shard, name, tuple(header.get_shape()), dtype)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{shard} is damaged ({reason_of(error)}); copy or download it again"
        ) from error
    return tensors
