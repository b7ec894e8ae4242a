"""Rows of data sets, whatever holds them: files, folders of them, MDS, `save_to_disk`, the Hub.

Where a source lies here, nothing is downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import fsspec

from data_pipelines.shards.sample_stats import one_line
from data_pipelines.sources.local_files import files_below
from data_pipelines.sources.mds import INDEX as MDS_INDEX
from data_pipelines.sources.mds import mds_files, mds_rows, mds_shards
from data_pipelines.sources.row_files import PLAIN, ROW_FILES, BrokenRow, Row, rows_in
from data_pipelines.sources.source import IMAGES
from data_pipelines.sources.text_files import parsed, read_text

TABLES = {".parquet": "parquet", ".arrow": "arrow"}  # read by `datasets`, under these names
FILES = (*ROW_FILES, *TABLES)
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"  # of `datasets.save_to_disk`
NO_ROWS = re.compile(
    r"(^dataset_infos?|_stats)\.json$"
)  # what lies beside rows, of the Hub and img2dataset
# Words by which `datasets` knows the split of a file or folder.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def local_files(source: str, *, split: str = "train") -> list[Path]:
    """Return the files that are read of a source: none for a data set of the Hub.

    Raises ValueError: there is no such source, or it has other splits than this one.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        place, kind = _kind_of(path, split)
        if kind == MDS_INDEX:
            return [place / MDS_INDEX, *mds_files(place, mds_shards(place) or [])]
        if kind == SAVED:
            return files_below(place, [".arrow", ".json"])
        return _of_split(path, split)
    if path.is_file():
        if not path.name.lower().endswith(FILES):
            raise ValueError(f"{path}: rows are read from {', '.join((*PLAIN, *TABLES))}")
        return [path]
    if path.suffix or path.is_absolute() or source.count("/") > 1:
        raise ValueError(f"{source}: no such file; correct the path")
    return []


def rows_of(
    source: str, *, split: str = "train", subset: str | None = None
) -> Iterator[Row | BrokenRow]:
    """Return the rows of a file, a folder of files, of MDS or `save_to_disk`, or of the Hub.

    Raises ValueError, with the file, for what cannot be read as a whole.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        place, kind = _kind_of(path, split)
        if kind == MDS_INDEX:
            return mds_rows(place, mds_shards(place) or [])
        if kind == SAVED:
            return _saved(place)
    if files := local_files(source, split=split):
        return chain.from_iterable(map(rows_of_file, files))
    return _streamed(source, subset, split=split)


def other_splits(source: str, *, split: str) -> str:
    """Return what is to be said of files that are not read, as they are of other splits."""
    folder = Path(source).expanduser()
    if not folder.is_dir() or _kind_of(folder, split)[1] or split == "all":
        return ""
    files = {*files_below(folder, FILES)} - {*_of_split(folder, split)}
    names = {_split_of(path.relative_to(folder)) or "files of no split" for path in files}
    others = ", ".join(sorted(names - {split}))
    return f"{source}: only its split {split} is read, not {others}" if others else ""


def rows_of_file(path: Path) -> Iterator[Row | BrokenRow]:
    """Return the rows of one file."""
    if table := TABLES.get(path.suffix.lower()):
        return _streamed(table, split="train", data_files=str(path))
    return rows_in(path)


# ---- folders -------------------------------------------------------------------------------------


def _kind_of(folder: Path, split: str) -> tuple[Path, str]:
    """Return the folder that holds the rows of a split, and which file says what it is."""
    if (folder / SAVED_SPLITS).is_file():
        content = parsed(read_text(folder / SAVED_SPLITS))
        splits = content.get("splits") if isinstance(content, Mapping) else None
        _check_split(folder, split, splits if isinstance(splits, list) else [])
        folder = folder / split
    if (folder / SAVED).is_file() and (folder / "dataset_info.json").is_file():
        return folder, SAVED
    parts = {one.parent.name: one.parent for one in folder.glob(f"*/{MDS_INDEX}") if one.is_file()}
    parts = {name: place for name, place in parts.items() if mds_shards(place)}
    if parts and not (folder / MDS_INDEX).is_file():
        _check_split(folder, split, list(parts))
        folder = parts[split]
    return folder, MDS_INDEX if mds_shards(folder) else ""


def _of_split(folder: Path, split: str) -> list[Path]:
    """Return the files of a folder; of one split, where their names tell several apart."""
    files = [one for one in files_below(folder, FILES) if not NO_ROWS.search(one.name)]
    if not files:
        if files_below(folder, [f".{one}" for one in IMAGES]):
            raise ValueError(f"{folder} holds images and no rows; use `write_shards folder`")
        raise ValueError(f"{folder}: none of {', '.join((*PLAIN, *TABLES))} in this folder")
    return files_of_split(folder, files, split)


def files_of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    """Return the files of one split, where the names of files or folders tell several apart.

    A name tells a split where it holds one of the words of `SPLITS`, as for `datasets`.

    Raises ValueError: there are several splits, and this is none of them.
    """
    by_split: dict[str | None, list[Path]] = {}
    for path in files:
        by_split.setdefault(_split_of(path.relative_to(folder)), []).append(path)
    named = [name for name in by_split if name is not None]
    if len(named) < 2 or split == "all":
        return files
    _check_split(folder, split, named)
    return by_split[split]


def _split_of(path: Path) -> str | None:
    words = [word for part in path.parts for word in re.split(r"[^a-z]+", part.lower())]
    found = (name for name, known in SPLITS.items() if any(word in known for word in words))
    return next(found, None)


def _check_split(folder: Path, split: str, splits: list[str]) -> None:
    if split not in splits:
        raise ValueError(
            f"{folder} has the splits {', '.join(sorted(splits))}, but not {split!r}; name one of "
            "them with --split"
        )


# ---- the `datasets` library ----------------------------------------------------------------------


def _saved(folder: Path) -> Iterator[Row]:
    def load(datasets: Any) -> Any:
        return datasets.load_from_disk(str(folder)).to_iterable_dataset()

    return _dataset_rows(load, str(folder))


def _streamed(name: str, *arguments: Any, **options: Any) -> Iterator[Row]:
    def load(datasets: Any) -> Any:
        return datasets.load_dataset(name, *arguments, streaming=True, **options)

    place = options.get("data_files")
    return _dataset_rows(load, place or name, hub=None if place else name)


def _dataset_rows(
    load: Callable[[Any], Any], place: str, *, hub: str | None = None
) -> Iterator[Row]:
    """Yield rows of `datasets`: images as the files that they are, classes by their names.

    Args:
        load: Gives the data set, from the module.
        place: Names it in messages.
        hub: The name on the Hub, whose files may be fetched.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{place} is read by datasets: pip install datasets") from error
    try:
        table = load(datasets).decode(False)
        features = table.features or {}
        classes = {
            name: feature
            for name, feature in features.items()
            if isinstance(feature, datasets.ClassLabel)
        }
        for number, row in enumerate(table, 1):
            labels = {name: _label(row[name], feature) for name, feature in classes.items()}
            values = {**row, **labels}
            if hub is not None:
                values = {name: _fetched(value, hub) for name, value in values.items()}
            yield Row(values, f"{place}, row {number}")
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"data set {place} cannot be read ({one_line(error)})") from error


def _label(value: Any, feature: Any) -> str | None:
    return feature.int2str(value) if isinstance(value, int) and value >= 0 else None


def _fetched(value: Any, hub: str) -> Any:
    """Read an image that lies in the repository of the data set, beside its rows."""
    if isinstance(value, list):
        return [_fetched(one, hub) for one in value]
    if not isinstance(value, Mapping) or set(value) != {"bytes", "path"} or value["bytes"]:
        return value
    path = value["path"]
    if not isinstance(path, str):
        return value
    *archives, last = path.split("::")  # a chain of fsspec: what lies in what, the outermost last
    inside = last.startswith(f"hf://datasets/{hub}@")
    if not inside or not all(one.startswith(("zip://", "tar://")) for one in archives):
        return value
    with fsspec.open(path, "rb") as file:
        return {"bytes": file.read(), "path": path}
