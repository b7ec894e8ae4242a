"""Benchmark: edits, questions and styles of emoji that were kept away from training.

python -m eval.emoji.tasks --model runs/emoji_styles/model/final --images runs/emoji_styles/images
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data_pipelines.shards.shards import INDEX, Sample, expand_urls, read_shard
from eval.emoji.gallery import SIZE, to_levels
from eval.emoji.measures import summary
from eval.metrics import exact_match
from eval.provenance import describe_hardware, describe_model
from mmdlm import load
from mmdlm.atomic_files import atomic_write
from mmdlm.cli import recipe as command_line
from mmdlm.pipeline.model import Model
from mmdlm.rl.rewards.images.neighbors import nearest_neighbors
from mmdlm.vision.image_files import open_image

SPLITS = ("train", "held_out", "held_out_style")
NEAREST_OF_STYLE = 20


@dataclass(frozen=True)
class Known:
    """All images of all styles.

    Attributes:
        keys: key -> place.
        styles: Of each.
        captions: Of each.
        images: Of each.
        levels: [G, 3, SIZE, SIZE] uint8.
        held_out: Places of the images that are held out in only one style.
    """

    keys: dict[str, int]
    styles: tuple[str, ...]
    captions: tuple[str, ...]
    images: tuple[Image.Image, ...]
    levels: Tensor
    held_out: tuple[int, ...]

    @classmethod
    def read(cls, folder: Path) -> Known:
        """Read what `data_pipelines.emoji_set` wrote; ValueError where it is not there."""
        if not (folder / INDEX).is_file():
            raise ValueError(
                f"images {folder}: no {INDEX} there; write it with data_pipelines.emoji_set"
            )
        counts = json.loads((folder / INDEX).read_text())["shards"]
        samples: list[Sample] = []
        held_out: list[int] = []
        for split in SPLITS:
            before = len(samples)
            for url in expand_urls(str(folder / split)) if counts[split] else ():
                samples += read_shard(url)
            if split == "held_out_style":
                held_out = list(range(before, len(samples)))
        images = [open_image(sample["png"]) for sample in samples]
        return cls(
            keys={sample["__key__"]: place for place, sample in enumerate(samples)},
            styles=tuple(json.loads(sample["json"])["style"] for sample in samples),
            captions=tuple(sample["txt"].decode() for sample in samples),
            images=tuple(images),
            levels=to_levels(images, SIZE),
            held_out=tuple(held_out),
        )


@dataclass(frozen=True)
class TaskSet:
    """The tasks to be measured.

    Attributes:
        edits: (place of the source, place of the target, instruction).
        questions: (kind, question, right answer, image).
    """

    edits: list[tuple[int, int, str]]
    questions: list[tuple[str, str, str, Image.Image]]

    @classmethod
    def read(cls, folder: Path, known: Known) -> TaskSet:
        """Read the held-out tasks of `data_pipelines.emoji_set`."""
        edits, questions = [], []
        for url in expand_urls(str(folder / "tasks" / "held_out")):
            for sample in read_shard(url):
                notes = json.loads(sample["json"])
                asked, answer = (message["content"] for message in notes["messages"])
                text = asked.replace("<image>", "").strip()
                if notes["kind"].startswith("edit/"):
                    source, target = (known.keys[key] for key in notes["images"])
                    edits.append((source, target, text))
                else:
                    image = open_image(sample["0.png"])
                    questions.append((notes["kind"], text, answer, image))
        return cls(edits, questions)


def main(
    images: Path,
    *,
    model: str = "emoji",
    out: Path = Path("runs/eval/emoji_tasks.json"),
    limit: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    device: str | None = None,
) -> None:
    """Measure edits, answers and styles on what was held out; print a table and write a JSON.

    Args:
        images: Folder that `data_pipelines.emoji_set` wrote.
        model: Bundled name, or the folder of a checkpoint or a run.
        out: JSON file for the result.
        limit: Most edits, questions and images in a style; default: all.
        batch_size: Questions and drawings in one call of the model.
        seed: Of everything that is drawn at random.
        device: "cpu", "cuda" and so on; default: a GPU where there is one, else the CPU.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit} is too small; give 1 or more")
    began = time.perf_counter()
    loaded = load(model, device=device)
    described = describe_model(model, loaded)
    hardware = describe_hardware(loaded.device)
    known = Known.read(images)
    tasks = TaskSet.read(images, known)
    generator = torch.Generator().manual_seed(seed)
    edited = measure_edits(loaded, known, tasks.edits[:limit], generator=generator)
    answered = measure_questions(
        loaded, tasks.questions[:limit], batch_size=batch_size, generator=generator
    )
    styled = measure_styles(
        loaded, known, known.held_out[:limit], batch_size=batch_size, generator=generator
    )
    report: dict[str, Any] = {
        "results": {**edited, **answered, **styled},
        "settings": {"limit": limit, "batch_size": batch_size, "seed": seed},
        "model": described,
        "hardware": hardware,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - began, 1),
    }
    for name, found in report["results"].items():
        print(f"{name:<44}{100 * found['value']:>7.1f} % of {found['count']}")
    text = json.dumps(report, ensure_ascii=False, indent=1) + "\n"
    atomic_write(out, lambda file: file.write(text.encode()))
    print(out)


def measure_edits(
    model: Model,
    known: Known,
    edits: Sequence[tuple[int, int, str]],
    *,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Return the share of edits whose result is nearer to the target than to any other image."""
    drawn = [
        model.edit(known.images[source], instruction, generator=generator)
        for source, _, instruction in tqdm(edits, desc="editing", unit=" edits")
    ]
    right = torch.tensor([target for _, target, _ in edits])
    found = nearest_neighbors(to_levels(drawn, SIZE), known.levels, right=right)
    return summary({"edit_nearest_of_all": found.within(1), "edit_among_5": found.within(5)})


def measure_questions(
    model: Model,
    questions: Sequence[tuple[str, str, str, Image.Image]],
    *,
    batch_size: int,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Return the share of right answers, of all questions and of each kind."""
    answers: list[str] = []
    for some in _batches(questions, batch_size, "answering"):
        asked = [question for _, question, _, _ in some]
        answers += model.answer(asked, [image for *_, image in some], generator=generator)
    hits = exact_match([one.strip() for one in answers], [{right} for _, _, right, _ in questions])
    by_kind: dict[str, list[int]] = defaultdict(list)
    for place, (kind, *_) in enumerate(questions):
        by_kind[kind].append(place)
    return summary(
        {"question": hits, **{kind: hits[torch.tensor(at)] for kind, at in sorted(by_kind.items())}}
    )


def measure_styles(
    model: Model,
    known: Known,
    places: Sequence[int],
    *,
    batch_size: int,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Return captions and drawings of names that were trained in other styles only."""
    captions: list[str] = []
    drawn: list[Image.Image] = []
    for some in _batches(places, batch_size, "other styles"):
        captions += model.caption([known.images[i] for i in some], generator=generator)
        drawn += model.text_to_image([known.captions[i] for i in some], generator=generator)
    near = []
    for place, image in zip(places, drawn, strict=True):
        same = [i for i, style in enumerate(known.styles) if style == known.styles[place]]
        found = nearest_neighbors(
            to_levels([image], SIZE), known.levels[same], right=torch.tensor([same.index(place)])
        )
        near.append(bool(found.within(NEAREST_OF_STYLE)[0]))
    return summary(
        {
            "style_caption_exact": exact_match(captions, [{known.captions[i]} for i in places]),
            "style_among_20_of_the_style": torch.tensor(near),
        }
    )


def _batches(items: Sequence[Any], size: int, what: str) -> Iterator[Sequence[Any]]:
    with tqdm(total=len(items), desc=what) as bar:
        for start in range(0, len(items), size):
            some = items[start : start + size]
            yield some
            bar.update(len(some))


if __name__ == "__main__":
    command_line.run(main)
