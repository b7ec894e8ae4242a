"""Prompts of published benchmarks, and where their official scorers look for the images.

Only lists of prompts are read here; they come with the benchmarks, which are not part of mmdlm.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from data_pipelines.sources.local_files import path_inside
from data_pipelines.sources.row_files import rows_in, whole
from data_pipelines.sources.text_files import parsed, read_text


@dataclass(frozen=True)
class Item:
    """One prompt, and the files that its images become, below the folder of a benchmark.

    Attributes:
        prompt: What to draw, or how to edit `source`.
        files: One for each image; with `grid` the one file that holds them all.
        count: Images of the prompt.
        source: Path of the image that is edited, below the folder of sources.
        notes: Other files that the scorer reads, by their paths, as JSON.
        grid: Whether the images are tiles of one file, two in a row.
    """

    prompt: str
    files: tuple[str, ...]
    count: int
    source: str | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    grid: bool = False


def prompts(path: Path, count: int) -> list[Item]:
    """Read a prompt a line, or rows with a column `prompt`; images are 000000_0.png ...

    Args:
        path: A .txt file, or one of rows.
        count: Images of each prompt.

    Returns:
        The items, in the order of the file.
    """
    if path.suffix == ".txt":
        texts = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    else:
        texts = [str(whole(row)["prompt"]) for row in rows_in(path)]
    return [
        Item(text, tuple(f"{number:06d}_{k}.png" for k in range(count)), count)
        for number, text in enumerate(texts)
    ]


def geneval(path: Path, count: int) -> list[Item]:
    """Read evaluation_metadata.jsonl of GenEval: NNNNN/metadata.jsonl and NNNNN/samples/NNNNN.png.

    Source: arXiv:2310.11513, and the layout of its repository, djghosh13/geneval.

    Args:
        path: The file.
        count: Images of each prompt; 4 in the paper.

    Returns:
        The items, in the order of the file.
    """
    items = []
    for number, row in enumerate(map(whole, rows_in(path))):
        files = tuple(f"{number:05d}/samples/{k:05d}.png" for k in range(count))
        notes = {f"{number:05d}/metadata.jsonl": dict(row.values)}
        items.append(Item(str(row["prompt"]), files, count, notes=notes))
    return items


def dpg_bench(path: Path, count: int) -> list[Item]:
    """Read the prompts of DPG-Bench, a folder of NAME.txt: NAME.png, of 4 images a grid of 2 x 2.

    Source: arXiv:2403.05135, and the scorer of its repository, TencentQQGYLab/ELLA, which cuts the
    grid by `--resolution` and `--pic-num`.

    Args:
        path: The folder.
        count: Images of each prompt, 1 to 4.

    Returns:
        The items, by the names of the files.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is no folder; DPG-Bench has its prompts in dpg_bench/prompts")
    if not 1 <= count <= 4:
        raise ValueError(f"{count} images of a prompt: DPG-Bench reads 1 to 4 of them in one file")
    return [
        Item(read_text(file).strip(), (f"{file.stem}.png",), count, grid=count > 1)
        for file in sorted(path.glob("*.txt"))
    ]


def t2i_compbench(path: Path, count: int) -> list[Item]:
    """Read a list of T2I-CompBench (color_val.txt ...): samples/PROMPT_NNNNNN.png.

    The numbers go on from prompt to prompt.

    Source: arXiv:2307.06350, and the layout of its repository, Karine-Huang/T2I-CompBench.

    Args:
        path: The list; what stands behind a tab is no part of a prompt.
        count: Images of each prompt; 10 in the paper.

    Returns:
        The items, in the order of the list.
    """
    lines = [line.split("\t")[0].strip() for line in read_text(path).splitlines()]
    items = []
    for number, prompt in enumerate(line for line in lines if line):
        if "/" in prompt or "_" in prompt:
            raise ValueError(f"{path}: {prompt!r} has / or _, so that no file can be named by it")
        first = number * count
        files = tuple(f"samples/{prompt}_{first + k:06d}.png" for k in range(count))
        items.append(Item(prompt, files, count))
    return items


def wise(path: Path, count: int) -> list[Item]:
    """Read a list of WISE (cultural_common_sense.json ...): PROMPT_ID.png.

    Source: arXiv:2503.07265, and the scorer of its repository, PKU-YuanGroup/WISE.

    Args:
        path: The list, with `prompt_id` and `Prompt`.
        count: Images of each prompt: 1.

    Returns:
        The items, in the order of the list.
    """
    _only_one(count, "WISE")
    rows = map(whole, rows_in(path))
    return [Item(str(row["Prompt"]), (f"{row['prompt_id']}.png",), 1) for row in rows]


def imgedit(path: Path, count: int) -> list[Item]:
    """Read basic_edit.json of ImgEdit: KEY.png, the image of `id` edited as `prompt` says.

    Source: arXiv:2505.20275, and the scorer of its repository, PKU-YuanGroup/ImgEdit.

    Args:
        path: The file.
        count: Images of each instruction: 1.

    Returns:
        The items, in the order of the file.
    """
    _only_one(count, "ImgEdit")
    content = parsed(read_text(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no object of edits but {type(content).__name__}")
    try:
        return [
            Item(str(edit["prompt"]), (f"{key}.png",), 1, source=str(edit["id"]))
            for key, edit in content.items()
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: an edit has no prompt and id ({error!r})") from None


def _only_one(count: int, name: str) -> None:
    if count != 1:
        raise ValueError(f"count is {count}, but the scorer of {name} reads one image of a prompt")


LAYOUTS: Mapping[str, tuple[Callable[[Path, int], list[Item]], int]] = MappingProxyType(
    {
        "prompts": (prompts, 1),
        "geneval": (geneval, 4),
        "dpg_bench": (dpg_bench, 4),
        "t2i_compbench": (t2i_compbench, 10),
        "wise": (wise, 1),
        "imgedit": (imgedit, 1),
    }
)


def items_of(layout: str, path: Path, count: int | None) -> list[Item]:
    """Return the items of a benchmark.

    Args:
        layout: Name of the benchmark.
        path: Its list of prompts.
        count: Images of each prompt; None: as many as the benchmark asks for.

    Returns:
        The items, in their order.

    Raises:
        ValueError: There is no such list, it holds nothing, or it names a file outside.
    """
    read, usual = LAYOUTS[layout]
    if not path.exists():
        raise ValueError(f"{path}: no such file; it comes with {layout}")
    if count is not None and count < 1:
        raise ValueError(f"count is {count}; give 1 or more")
    items = read(path, count or usual)
    if not items:
        raise ValueError(f"{path} holds no prompts")
    for item in items:
        for name in (*item.files, *item.notes):
            path_inside(Path("out"), name, allow_outside=False)
    names = [name for item in items for name in item.files]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{path}: two images would be {twice}")
    return items


def note_bytes(value: Any) -> bytes:
    """Return the JSON of a file of notes."""
    return json.dumps(value).encode()
