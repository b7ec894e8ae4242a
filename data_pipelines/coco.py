"""Pictures and captions in the JSON of COCO."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from data_pipelines.shards import Sample
from data_pipelines.source import PICTURES


def coco_entries(captions: Path) -> list[tuple[int, str, list[str]]]:
    """A captions file -> (id, file name, captions) of each picture; ValueError for another file.

    Source: the format that cocodataset.org describes, "Data format", sections 1 and 5.
    """
    try:
        content = json.loads(captions.read_text(encoding="utf-8"))
        texts: dict[int, list[str]] = defaultdict(list)
        for annotation in content["annotations"]:
            texts[annotation["image_id"]].append(annotation["caption"].strip())
        return [(one["id"], one["file_name"], texts[one["id"]]) for one in content["images"]]
    except FileNotFoundError:
        raise ValueError(f"captions {captions}: no such file") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"captions {captions}: not COCO's captions JSON ({type(error).__name__}: {error})"
        ) from None


def coco_samples(captions: Path, images: Path) -> Iterator[Sample]:
    """One sample per picture: txt is its first caption, json has all under "captions".

    Raises ValueError for a picture that is missing, has no caption or has an unknown format.
    """
    for number, name, texts in coco_entries(captions):
        path = images / name
        extension = path.suffix.lower().removeprefix(".")
        if extension not in PICTURES:
            raise ValueError(f"captions {captions}: {name} is none of {', '.join(PICTURES)}")
        if not path.is_file():
            raise ValueError(f"captions {captions} name {path}, which is missing")
        if not texts:
            raise ValueError(f"captions {captions}: picture {number} ({name}) has no caption")
        yield {
            "__key__": f"{number:012d}",
            extension: path.read_bytes(),
            "txt": texts[0].encode(),
            "json": json.dumps(
                {"id": number, "file_name": name, "captions": texts}, ensure_ascii=False
            ).encode(),
        }
