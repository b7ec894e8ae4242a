r"""Job: emoji in three styles, with edits, questions and chats about them -> webdataset shards.

npm install --prefix runs/emoji_styles/icons @iconify-json/twemoji @iconify-json/fluent-emoji-flat \
    emojibase-data
python -m data_pipelines.emoji_set --icons runs/emoji_styles/icons --out runs/emoji_styles/images
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from data_pipelines.jobs.origin import Given, is_done
from data_pipelines.jobs.report import Report
from data_pipelines.jobs.sole_writer import sole_writer
from data_pipelines.jobs.write_splits import write_splits
from data_pipelines.shards.shards import INDEX, Sample
from data_pipelines.sources.emoji import (
    Emoji,
    draw_with_report,
    find_font,
    in_styles,
    sampling_weights,
)
from data_pipelines.sources.emoji_facts import read_facts
from data_pipelines.sources.emoji_tasks import (
    balanced,
    chats,
    edits,
    questions,
    samples_of,
    split_edits,
)
from data_pipelines.sources.icon_sets import read_icon_sets
from data_pipelines.sources.source import png_bytes
from data_pipelines.sources.text_files import json_bytes
from mmdlm.cli import recipe as command_line

MEASURED_EDITS, MEASURED_QUESTIONS = 200, 100  # questions of each kind


@sole_writer
def main(
    icons: Path,
    out: Path,
    *,
    font: Path | None = None,
    size: int = 64,
    edits_of_a_kind: int = 8000,
    questions_of_a_kind: int = 4000,
    samples_per_shard: int = 500,
) -> None:
    """Draw all emoji in the styles of Noto, Twemoji and Fluent, and write what one may ask of them.

    Writes out/train, out/held_out (names kept away in all styles) and out/held_out_style (names
    kept away in one style): png, txt (the caption) and json (names, keywords, facts); and
    out/tasks/train, out/tasks/held_out: conversations with their images.

    Args:
        icons: Folder in which npm has installed the icon sets and emojibase-data.
        out: Folder for the shards.
        font: Color emoji font of the first style; default: Noto Color Emoji of this machine.
        size: Height and width of the images, in pixels.
        edits_of_a_kind: Most edits to train on of each kind: skin tone, person, style, other.
        questions_of_a_kind: Most questions to train on of each kind; answers are balanced.
        samples_per_shard: Samples in one shard.
    """
    font = font or find_font()
    icon_sets = read_icon_sets(icons)
    settings = {
        "source": "emoji_set",
        "font": font.name,
        "icons": {one.style: one.version for one in icon_sets},
        "size": size,
        "edits_of_a_kind": edits_of_a_kind,
        "questions_of_a_kind": questions_of_a_kind,
        "samples_per_shard": samples_per_shard,
    }
    given = Given({font.name: str(font)})
    if is_done(out / INDEX, settings, given):
        return
    drawn, left_out = draw_with_report(font, size=size)
    report = Report()
    for one in left_out:
        report.leave_out(one.name, one.reason)
    facts = read_facts(icons, {one.characters: one.name for one in drawn})
    drawn = [replace(one, facts=facts.get(one.characters)) for one in drawn]
    emoji = drawn + in_styles(tqdm(drawn, desc="drawing styles", unit=" emoji"), icon_sets)
    png = {one.key: png_bytes(one.image) for one in emoji}

    splits = {name: [e for e in emoji if e.split == name] for name in SPLITS}
    train = splits["train"]
    learned, measured = split_edits(edits(train), held_out=MEASURED_EDITS)
    tasks = {
        "train": [
            *balanced(learned, at_most=edits_of_a_kind),
            *questions(train, at_most=questions_of_a_kind),
            *chats(train, at_most=questions_of_a_kind),
        ],
        "held_out": [
            *measured,
            *questions(splits["held_out"] + splits["held_out_style"], at_most=MEASURED_QUESTIONS),
        ],
    }
    samples = {
        **{name: emoji_samples(some, png) for name, some in splits.items()},
        **{f"tasks/{name}": samples_of(some, png) for name, some in tasks.items()},
    }
    report.read = len(emoji) + len(left_out) + sum(map(len, tasks.values()))
    write_splits(
        {
            name: tqdm(some, desc=f"writing {name}", unit=" samples")
            for name, some in samples.items()
        },
        out,
        settings,
        given,
        report,
        notes={
            "without_facts": sorted({one.name for one in drawn if one.facts is None}),
            "licenses": {one.style: f"{one.author}, {one.license}" for one in icon_sets},
        },
    )


SPLITS = ("train", "held_out", "held_out_style")


def emoji_samples(emoji: list[Emoji], png: dict[str, bytes]) -> Iterable[Sample]:
    """Yield emoji as samples; their sampling weights are balanced among themselves."""
    weights = sampling_weights(emoji)
    for one in emoji:
        notes = {
            "name": one.name,
            "names": one.names,
            "aliases": one.aliases,
            "characters": one.characters,
            "held_out": one.held_out,
            "style": one.style,
            "facts": one.facts and asdict(one.facts),
            "sampling_weight": weights[one.key],
        }
        yield {
            "__key__": one.key,
            "png": png[one.key],
            "txt": one.caption.encode(),
            "json": json_bytes(notes),
        }


if __name__ == "__main__":
    command_line.run(main)
