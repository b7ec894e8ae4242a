"""Name and print what commands give: image files, lines of text, or lines of JSON."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from mmdlm.cli.image_files import IMAGE_FORMATS, check_place, numbered

Item = TypeVar("Item")
LONGEST_NAME = 40  # letters of a file that is named after a prompt


def places_of(given: Path | None, stems: Sequence[str], *, each: int = 1) -> list[Path]:
    """Return the files of some images, checked before the slow work.

    Args:
        given: What `--output` names: a file, whose name is numbered if there are several images; a
            folder; None: the current folder.
        stems: In a folder: a name without an ending for each prompt or image.
        each: Images of each of them.

    Returns:
        `each` paths for each stem. Those in a folder are of no file that is there.

    Raises:
        ValueError: For a place that cannot be written to, a format that is not known, or too many
            images.
    """
    if given is not None and not _is_folder(given):
        paths = numbered(given, len(stems) * each)
    else:
        names = [f"{stem}-{n}" if each > 1 else stem for stem in stems for n in range(1, each + 1)]
        numbered(Path("x.png"), len(names))  # not too many
        paths = _unused(given or Path(), names)
    for path in paths:
        check_place(path, "--output", IMAGE_FORMATS)
    return paths


def stem_of(prompt: str) -> str:
    """Return a file name for a prompt: its words with dashes, in lower case."""
    words = re.sub(r"\W+", "-", prompt.lower()).strip("-_")
    return words[:LONGEST_NAME].rstrip("-_") or "image"


def tell(options: argparse.Namespace, text: str, /, **record: object) -> None:
    """Print a result: its text, or with `--json` the record as one line of JSON."""
    print(json.dumps(record, ensure_ascii=False) if options.json else text, flush=True)


def tell_files(options: argparse.Namespace, records: Iterable[dict[str, object]]) -> None:
    """Print the files that were written, one a line; nothing with `--quiet`."""
    for record in records:
        if options.json or not options.quiet:
            tell(options, str(record["file"]), **record)


def progress(
    options: argparse.Namespace, items: Iterable[Item], what: str, *, total: int
) -> Iterable[Item]:
    """Show a bar with rate and time left on stderr, if that is a terminal."""
    from tqdm import tqdm

    hidden = options.quiet or not sys.stderr.isatty()
    return tqdm(items, desc=what, total=total, leave=False, disable=hidden)


def _is_folder(path: Path) -> bool:
    """Whether a path is a folder and meant to be one: nobody means out.png."""
    return path.is_dir() and path.suffix.lower() not in IMAGE_FORMATS


def _unused(folder: Path, names: Sequence[str]) -> list[Path]:
    """Return a path for each name; what exists or was given out gets -2, -3, ..."""
    paths: dict[Path, None] = {}
    for name in names:
        path, number = folder / f"{name}.png", 1
        while path in paths or path.exists():
            number += 1
            path = folder / f"{name}-{number}.png"
        paths[path] = None
    return list(paths)
