"""Icon sets and facts of a few emoji, in folders as npm leaves them."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from data_pipelines.sources.emoji import Emoji
from data_pipelines.sources.emoji_facts import read_facts
from data_pipelines.sources.icon_sets import PACKAGES

SQUARE = '<path fill="{color}" d="M0 0h{side}v{side}h-{side}z"/>'
PEOPLE = {
    "\U0001f9d1\u200d\U0001f692": "firefighter",
    "\U0001f469\u200d\U0001f692": "woman firefighter",
}
THINGS = {"\U0001f34e": "red apple", "\U0001f34f": "green apple", "\U0001f431": "cat face"}
NAMES = {
    **PEOPLE,
    **THINGS,
    "\U0001f44d": "thumbs up",
    "\U0001f44d\U0001f3fb": "thumbs up light skin tone",
    "\U0001f44d\U0001f3ff": "thumbs up dark skin tone",
}
GROUPS = {"firefighter": (1, 25), "apple": (4, 42), "cat": (3, 34), "thumbs": (1, 19)}


def key(characters: str) -> str:
    return "-".join(f"{ord(c):x}" for c in characters)


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def icon_color(style: int, number: int) -> str:
    """Return the color of an icon: blue in the first style, green in the second."""
    return f"#00{'' if style else '00'}{255 - 9 * number:02x}{'00' if style else ''}"


def write_icons(folder: Path) -> Path:
    """Write a folder as npm leaves it, with both icon sets and the facts of a few emoji."""
    root = folder / "icons" / "node_modules"
    for number, (style, package) in enumerate(PACKAGES.items()):
        side = 32 + 4 * number
        folder = root / package
        write_json(folder / "chars.json", {key(c): f"icon-{n}" for n, c in enumerate(NAMES)})
        drawn = {
            f"icon-{n}": {"body": SQUARE.format(color=icon_color(number, n), side=side)}
            for n in range(len(NAMES))
        }
        write_json(folder / "icons.json", {"icons": drawn, "width": side, "height": side})
        write_json(folder / "info.json", {"license": {"spdx": "MIT"}, "author": {"name": style}})
        write_json(folder / "package.json", {"version": "1.0.0"})
    entries = []
    for characters, name in NAMES.items():
        group, subgroup = next(at for word, at in GROUPS.items() if word in name)
        entry = {"emoji": characters, "group": group, "subgroup": subgroup, "tags": ["tag"]}
        entries.append(entry)
    write_json(root / "emojibase-data" / "en" / "data.json", entries)
    return root.parent


def tiny_emoji(icons: Path | None = None) -> list[Emoji]:
    """Return the emoji, each of one color, with their facts where `icons` has them."""
    facts = read_facts(icons, NAMES) if icons else {}
    return [
        Emoji(
            name,
            {"en": name},
            (),
            characters,
            Image.new("RGB", (16, 16), (9 * n, 0, 0)),
            False,
            facts=facts.get(characters),
        )
        for n, (characters, name) in enumerate(NAMES.items())
    ]
