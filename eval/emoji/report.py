"""The table, the files and the contact sheets of the emoji benchmark."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from eval.emoji.contact_sheet import FAINT, FAIR, GOOD, POOR, Card, sheet_of
from eval.emoji.gallery import Gallery, kind
from eval.emoji.measures import MEASURES, NEAREST, SPEED_BATCHES, Split, image_of
from mmdlm.atomic_files import atomic_write


@dataclass(frozen=True)
class Files:
    """Where the results go."""

    report: Path
    items: Path
    sheet: Path
    tokenizer_sheet: Path

    @classmethod
    def of(cls, out: Path, sheet: Path | None) -> Files:
        """Check the places; ValueError for one that takes no file, before the slow work begins."""
        sheet = sheet or out.with_suffix(".png")
        for option, path, ending in (("out", out, ".json"), ("sheet", sheet, ".png")):
            if path.suffix != ending:
                raise ValueError(
                    f"--{option} {path} does not end in {ending}; try {path.with_suffix(ending)}"
                )
            if path.is_dir():
                raise ValueError(f"--{option} {path} is a folder; name a file in it")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(
                    f"--{option} {path}: its folder cannot be made ({error.strerror}); "
                    "name another place"
                ) from error
            if not os.access(path.parent, os.W_OK | os.X_OK):
                raise ValueError(
                    f"--{option} {path}: {path.parent} may not be written to; name another place"
                )
        tokenizer_sheet = sheet.with_stem(f"{sheet.stem}-tokenizer")
        return cls(out, out.with_suffix(".jsonl"), sheet, tokenizer_sheet)

    def write(
        self, report: Mapping[str, Any], splits: Mapping[str, Split], gallery: Gallery
    ) -> None:
        """Write the report and the items; OSError where the disk is full, and nothing is lost."""
        text = json.dumps(report, ensure_ascii=False, indent=1, allow_nan=False)
        lines = [
            json.dumps({"split": name, **item}, ensure_ascii=False)
            for name, split in splits.items()
            for item in items(split, gallery)
        ]
        for path, content in ((self.report, text), (self.items, "\n".join(lines))):
            atomic_write(path, partial(_put, content + "\n"))


def table(report: Mapping[str, Any]) -> str:
    """Return the report for people: means and their standard errors."""
    results, speed = report["results"], report["speed"]
    model, hardware = report["model"], report["hardware"]
    lines = [_row("", [f"{found['count']:,} {name}" for name, found in results.items()])]
    for key, (label, unit) in MEASURES.items():
        found = [split["measures"].get(key) for split in results.values()]
        if any(found):
            lines.append(_row(f"{label}, {unit}", [_cell(one, unit) for one in found]))
    lines += ["", "caption exact / named one among the 5 nearest, %, by kind"]
    for name in sorted({name for split in results.values() for name in split["by_kind"]}):
        found = [split["by_kind"].get(name) for split in results.values()]
        lines.append(_row(f"  {name}", [_pair(one) for one in found]))
    if speed:
        lines += ["", _row("speed, per second", [f"batch {size}" for size in SPEED_BATCHES])]
        for task, label in (("drawing", "images"), ("captioning", "captions")):
            rates = [f"{row['per_second']:.2f}" for row in speed if row["task"] == task]
            lines.append(_row(label, rates))
    drawing, caption = report["settings"]["text_to_image"], report["settings"]["caption"]
    size = sum(model["parameters"].values()) / 1e6
    lines += [
        "",
        f"model {model['name']}, {size:.1f}M parameters; drawing in "
        f"{drawing['num_inference_steps']} steps with guidance {drawing['guidance_scale']:g}, "
        f"captions in {caption['num_inference_steps']} steps, seed {report['settings']['seed']}, "
        f"drawings of each name: {report['settings']['drawings']}",
        f"on {hardware['device']}: {hardware['cpu']}, {hardware['cpu_count']} CPUs, "
        f"{hardware['threads']} threads, torch {hardware['torch']}; {report['seconds']:.0f} s",
    ]
    return "\n".join(lines)


def _cell(found: Mapping[str, Any] | None, unit: str) -> str:
    """Mean ± standard error, or nothing where nothing was measured."""
    if found is None:
        return ""
    scale = 100 if unit == "%" else 1
    error = found["standard_error"]
    spread = "" if error is None else f" ± {scale * error:.1f}"
    return f"{scale * found['value']:.1f}{spread}"


def _pair(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    exact, five = (100 * found[key]["value"] for key in ("caption_exact", "drawing_top_5"))
    return f"{exact:.1f} / {five:.1f}"


def _row(label: str, cells: Sequence[str]) -> str:
    return f"{label:<52}" + "".join(f"{cell:>16}" for cell in cells)


def items(split: Split, gallery: Gallery) -> Iterator[dict[str, Any]]:
    """Each emoji with all that was measured of it, as JSON can hold it."""
    for n, place in enumerate(split.places):
        emoji = gallery.emoji[place]
        yield {
            "name": emoji.name,
            "characters": emoji.characters,
            "kind": kind(emoji),
            "also_right": sorted(gallery.right[place] - {emoji.name}),
            "caption": split.answers.captions[n],
            "drawing_rank": int(split.drawn.rank[n]),
            "drawing_nearest": [gallery.emoji[i].name for i in split.drawn.nearest[n]],
            **{key: values[n].item() for key, values in split.columns.items()},
        }


def drawing_sheet(
    split: Split, gallery: Gallery, shown: Sequence[int], *, is_new: bool
) -> Image.Image:
    """Real and drawn images of some of the emoji, and how the model reads the real ones."""
    cards = []
    for n in shown:
        emoji, rank = gallery.emoji[split.places[n]], int(split.drawn.rank[n])
        looks_like = gallery.emoji[int(split.drawn.nearest[n, 0])].name
        drawing = ("drawn: nearest of all", GOOD)
        if rank:
            drawing = (f"drawn: nearer to {looks_like}", FAIR if rank < NEAREST else POOR)
        reading = ("read: exactly", GOOD)
        if not split.columns["caption_exact"][n]:
            reading = (f"read: {split.answers.captions[n]}", POOR)
        image = image_of(split.answers.drawings[0][n])
        cards.append(Card(emoji.image, image, emoji.name, (drawing, reading)))
    total = len(split.places)
    exact, first, five = (
        f"{100 * float(split.columns[key].double().mean()):.0f} %"
        for key in ("caption_exact", "drawing_top_1", "drawing_top_5")
    )
    lines = (
        f"{len(shown)} of {total} names, chosen at random: left the real image, right what the "
        "model drew from the name; below, how it reads the real image.",
        f"Of all {total}: caption exactly right {exact}, drawn image nearest to the named one "
        f"{first}, named one among the {NEAREST} nearest {five}.",
    )
    title = "Never seen in training" if is_new else "Seen in training"
    return sheet_of(cards, title, lines, heads=("real", "drawn"))


def tokenizer_sheet(split: Split, gallery: Gallery, shown: Sequence[int]) -> Image.Image:
    """Images before and after the image tokenizer, the worst of the shown ones first."""
    quality = split.columns["reconstruction_psnr"]
    cards = [
        Card(
            image_of(split.answers.originals[n]),
            image_of(split.answers.reconstructions[n]),
            gallery.emoji[split.places[n]].name,
            ((f"{quality[n]:.1f} dB", FAINT),),
        )
        for n in sorted(shown, key=lambda n: float(quality[n]))
    ]
    lines = (
        f"{len(shown)} of {len(split.places)} images, chosen at random, the worst first; "
        f"{float(quality.mean()):.1f} dB PSNR on average over all of them.",
    )
    return sheet_of(cards, "Through the image tokenizer", lines, heads=("real", "decoded"))


def _put(text: str, file: BinaryIO) -> None:
    file.write(text.encode())


def write_image(path: Path, image: Image.Image) -> None:
    """Write an image as PNG, whole or not at all."""
    atomic_write(path, partial(image.save, format="PNG", optimize=True))
