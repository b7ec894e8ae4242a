"""The pages of the API: one for each public module of the wheel, filled in by mkdocstrings."""

from __future__ import annotations

from typing import Any

from docs._generate.files_page import cell
from docs._generate.tree import modules, summary

FOLDER = "reference/api"


def public_modules() -> list[tuple[str, str]]:
    """Return dotted name and summary of each module, packages before what is in them."""
    return sorted(
        (name, summary(path))
        for name, path in modules("mmdlm")
        if not any(part.startswith("_") for part in name.split("."))
    )


def pages() -> dict[str, str]:
    """Return the pages by their place in docs/."""
    listed = public_modules()
    found = {}
    for name, _ in listed:
        found[f"{FOLDER}/{name}.md"] = f"# `{name}`\n\n::: {name}\n"
    rows = [f"| [`{name}`]({name}.md) | {cell(text)} |" for name, text in listed]
    found[f"{FOLDER}/index.md"] = "\n".join(
        ["# API", "", "The modules of the package `mmdlm`.", "", "| module | |", "|---|---|", *rows]
    )
    return found


def navigation() -> list[Any]:
    """Return the nested navigation: packages are folders."""
    names = [name for name, _ in public_modules()]
    packages = {name for name in names if any(other.startswith(name + ".") for other in names)}

    def below(package: str) -> list[Any]:
        children = [n for n in names if n.rpartition(".")[0] == package]
        found: list[Any] = []
        for name in children:
            short, page = name.rpartition(".")[2], f"{FOLDER}/{name}.md"
            found.append({short: [page, *below(name)]} if name in packages else {short: page})
        return found

    return [f"{FOLDER}/index.md", {"mmdlm": f"{FOLDER}/mmdlm.md"}, *below("mmdlm")]
