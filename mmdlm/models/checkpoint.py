"""The tensors of a checkpoint folder, by the headers of its files: names and shapes, no weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """What lies in a folder.

    config  content of config.json
    shards  safetensors files, in the order of their names
    shapes  of every tensor, by name
    """

    folder: Path
    config: dict[str, Any]
    shards: tuple[Path, ...]
    shapes: dict[str, tuple[int, ...]]

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
        shapes: dict[str, tuple[int, ...]] = {}
        for shard in shards:
            shapes.update(_header(shard))
        lost = sorted(indexed - shapes.keys())
        if lost:
            raise ValueError(
                f"{folder}: {len(lost)} of the {len(indexed)} tensors in {INDEX} are in no shard "
                f"({', '.join(lost[:3])}); download the folder again"
            )
        return cls(folder, config, tuple(shards), shapes)

    def rewrite(
        self, out: Path, *, rename: Callable[[str], str], config: dict[str, Any]
    ) -> Iterator[Path]:
        """Write the weights under other names, bit for bit, one shard at a time -> its paths.

        The shards keep their files' names, and the files' metadata.
        """
        where: dict[str, str] = {}
        size = 0
        for shard in self.shards:
            with safe_open(shard, framework="pt") as file:
                tensors = {rename(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata()
            save_file(tensors, out / shard.name, metadata=metadata)
            where.update(dict.fromkeys(tensors, shard.name))
            size += sum(tensor.nbytes for tensor in tensors.values())
            yield out / shard.name
        if len(self.shards) > 1:
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
            (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def local_folder(name_or_path: str | PathLike[str], **options: Any) -> Path:
    """The folder of a checkpoint, downloaded from the Hugging Face Hub where it is no folder here.

    options  of `huggingface_hub.snapshot_download`: revision, token, cache_dir ...
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
    return Path(snapshot_download(str(name_or_path), allow_patterns=patterns, **options))


def read_json(path: Path) -> Any:
    """Content of a JSON file; ValueError that names it where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; copy or download the folder again") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); copy or download it again") from error


def _shards(folder: Path) -> tuple[list[Path], set[str]]:
    """The files of the weights, and the tensors that an index promises."""
    if (folder / WEIGHTS).is_file():
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
    names = sorted(set(where.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        tensors = sum(name in missing for name in where.values())
        raise ValueError(
            f"{folder}: {len(missing)} of {len(names)} shards are missing ({', '.join(missing)}, "
            f"{tensors} of {len(where)} tensors); download them"
        )
    return [folder / name for name in names], set(where)


def _header(shard: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(shard, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{shard} is damaged ({reason}); copy or download it again") from error
