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
    listed, places = public_modules(), _places()
    rows = [
        f"| [`{name}`]({places[name].removeprefix(FOLDER + '/')}) | {cell(text)} |"
        for name, text in listed
    ]
    head = ["# API", "", "The modules of the package `mmdlm`.", "", "| module | |", "|---|---|"]
    return {
        f"{FOLDER}/index.md": "\n".join([*head, *rows]),
        **{places[name]: f"# `{name}`\n\n::: {name}\n" for name, _ in listed},
    }


def navigation() -> list[Any]:
    """Return the nested navigation: a package is a section whose index is its own page."""
    places = _places()

    def below(package: str) -> list[Any]:
        found: list[Any] = []
        for name, place in places.items():
            if name.rpartition(".")[0] == package:
                short = name.rpartition(".")[2]
                is_package = place.endswith("/index.md")
                found.append({short: [place, *below(name)] if is_package else place})
        return found

    return [f"{FOLDER}/index.md", {"mmdlm": places["mmdlm"]}, *below("mmdlm")]


def _places() -> dict[str, str]:
    """Module -> the place of its page."""
    names = [name for name, _ in public_modules()]
    return {
        name: f"{FOLDER}/{name.replace('.', '/')}"
        + ("/index.md" if any(other.startswith(f"{name}.") for other in names) else ".md")
        for name in names
    }
