"""The parts of the page of formats that are read off files and code."""

from __future__ import annotations

import inspect
import re
import tarfile

from transformers import PreTrainedConfig

from docs._generate.config_groups import told
from docs._generate.files_page import cell
from docs._generate.tree import ROOT


def page(written: str) -> str:
    """Return the page with its parts filled in, each where a comment names it."""
    for name, made in (("shards", _shards), ("bundled", _bundled), ("config", _config)):
        written = written.replace(f"<!-- made: {name} -->", made())
    return written


def _shards() -> str:
    lines = ["| shard | fields |", "|---|---|"]
    for path in sorted((ROOT / "tests" / "data").glob("*.tar")):
        with tarfile.open(path) as tar:
            fields = {name.partition(".")[2] for name in tar.getnames()}
        lines.append(f"| `{path.name}` | {', '.join(f'`{one}`' for one in sorted(fields))} |")
    return "\n".join(lines)


def _bundled() -> str:
    folder = ROOT / "mmdlm" / "checkpoints" / "emoji"
    lines = ["| file | bytes |", "|---|---|"]
    lines += [
        f"| `{path.relative_to(folder).as_posix()}` | {path.stat().st_size:,} |"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    return "\n".join(lines)


def _config() -> str:
    import mmdlm.models  # noqa: F401 - it tells transformers about the config

    (kind,) = (one for one in _below(PreTrainedConfig) if one.__name__ == "MmdlmConfig")
    meanings = told(kind)
    lines = ["| key | default | |", "|---|---|---|"]
    for name in kind.__annotations__:
        if name.startswith("_") or name == "model_type":
            continue
        default = inspect.getattr_static(kind, name, "")
        shown = f"`{default}`" if re.match(r"\S", str(default)) else ""
        lines.append(f"| `{name}` | {shown} | {cell(meanings.get(name, ''))} |")
    return "\n".join(lines)


def _below(kind: type) -> list[type]:
    return [two for one in kind.__subclasses__() for two in (one, *_below(one))]
