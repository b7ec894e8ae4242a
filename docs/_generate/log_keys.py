"""The page of log keys: docs/_generate/log_keys.yaml, whose keys have to stand in the code."""

from __future__ import annotations

import re

import yaml

from docs._generate.files_page import cell
from docs._generate.tree import ROOT, modules

DATA = ROOT / "docs" / "_generate" / "log_keys.yaml"


def groups() -> dict[str, dict[str, str]]:
    """Return key -> meaning by group of keys."""
    read: dict[str, dict[str, str]] = yaml.safe_load(DATA.read_text(encoding="utf-8"))
    return read


def unknown_keys() -> list[str]:
    """Return the keys that no file of the code writes: the page would be wrong about them."""
    code = "\n".join((ROOT / path).read_text("utf-8") for _, path in modules("train", "mmdlm"))
    keys = [key for group in groups().values() for key in group]
    return [key for key in keys if not _stands_in(code, key)]


def page() -> str:
    """Return the page as Markdown; raise ValueError where the code knows a key no more."""
    unknown = unknown_keys()
    if unknown:
        raise ValueError(f"{DATA.name}: the code writes no {unknown[0]!r}; mend or remove it")
    lines = [
        "# Log keys",
        "",
        "A run writes `log.jsonl` to its folder: one JSON object for each logged step "
        "(`logging_steps`). The trackers of accelerate (tensorboard, wandb, trackio) get the same "
        "keys. Names of the reinforcement learning keys are those of TRL.",
        "",
    ]
    for title, keys in groups().items():
        lines += [f"## {title}", "", "| key | meaning |", "|---|---|"]
        lines += [f"| `{key}` | {cell(meaning)} |" for key, meaning in keys.items()]
        lines.append("")
    return "\n".join(lines)


def _stands_in(code: str, key: str) -> bool:
    """Whether each part of a key that is no placeholder stands in the code as a word."""
    parts = [part for part in key.split("/") if part != "NAME"]
    return all(re.search(rf"\b{re.escape(part)}\b", code) for part in parts)
