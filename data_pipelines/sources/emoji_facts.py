"""Facts about emoji from Unicode data: groups, keywords, skin tones, people, and variants."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = "emojibase-data"  # of npm; MIT
TONES = {
    0x1F3FB: "light",
    0x1F3FC: "medium-light",
    0x1F3FD: "medium",
    0x1F3FE: "medium-dark",
    0x1F3FF: "dark",
}
TONE_WORDS = re.compile(r" ?\b(?:medium-)?(?:light|dark|medium) skin tone\b")
GROUPS = {  # of emojibase -> as questions and answers say it
    0: "smileys",
    1: "people",
    3: "animals and nature",
    4: "food and drink",
    5: "travel and places",
    6: "activities",
    7: "objects",
    8: "symbols",
    9: "flags",
}
ANIMALS = range(34, 40)  # subgroups: mammals, birds, amphibians, reptiles, sea animals, bugs
PEOPLE = range(23, 31)  # subgroups that show whole persons: roles, gestures, sports, families ...
COUPLES = re.compile(r"\b(?:couple|kiss|holding hands|hugging|bunny ears|wrestling)\b")
RELATIVES = re.compile(r"\b(?:man|woman|boy|girl|adult|child)\b")
COLORS = "red orange yellow green blue purple brown black white grey pink".split()  # noqa: SIM905


@dataclass(frozen=True)
class Facts:
    """What Unicode data says about one emoji.

    Attributes:
        name: English.
        group: As `GROUPS` has it.
        keywords: Other words for it.
        tones: Names of its skin tones, in order; empty for none.
        people: Number of whole persons in the image; None where the data does not say.
        is_animal: Whether it shows an animal.
    """

    name: str
    group: str
    keywords: tuple[str, ...]
    tones: tuple[str, ...]
    people: int | None
    is_animal: bool


def plain_key(characters: str) -> str:
    """Return the code points in hexadecimal, joined by "-", without variation selectors."""
    return "-".join(f"{ord(one):x}" for one in characters if ord(one) != 0xFE0F)


def tones_of(characters: str) -> tuple[str, ...]:
    """Return the names of the skin tones in a sequence, in order."""
    return tuple(TONES[ord(one)] for one in characters if ord(one) in TONES)


def without_skin_tones(name: str) -> str:
    """Return the name of the emoji before skin tones were given to it."""
    return " ".join(TONE_WORDS.sub("", name).split())


def read_facts(folder: Path, names: Mapping[str, str]) -> dict[str, Facts]:
    """Read the facts of emoji, by their characters, from the folder where npm has put the data.

    Emoji that the data does not know (it follows Unicode with some delay) are absent. Raises
    ValueError where the data is missing or has another form.

    Args:
        folder: Where npm has put the data.
        names: English name of each wanted emoji, by its characters.

    Returns:
        Facts by characters.
    """
    root = folder if folder.name == "node_modules" else folder / "node_modules"
    path = root / PACKAGE / "en" / "data.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        known: dict[str, dict[str, Any]] = {}
        for entry in entries:
            for one in (entry, *entry.get("skins", ())):
                known[plain_key(one["emoji"])] = {**entry, **one}
    except FileNotFoundError:
        raise ValueError(
            f"emoji facts: {path} is missing; install it with npm install {PACKAGE}"
        ) from None
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(
            f"emoji facts: {path} is not the data of {PACKAGE} ({error}); install it again"
        ) from None
    return {
        characters: _facts(characters, name, known[plain_key(characters)])
        for characters, name in names.items()
        if known.get(plain_key(characters), {}).get("group") in GROUPS
    }


def _facts(characters: str, name: str, entry: Mapping[str, Any]) -> Facts:
    group, subgroup = entry["group"], entry["subgroup"]
    return Facts(
        name=name,
        group=GROUPS[group],
        keywords=tuple(tag for tag in entry.get("tags", ()) if tag.lower() != name.lower()),
        tones=tones_of(characters),
        people=_people(without_skin_tones(name), group, subgroup),
        is_animal=subgroup in ANIMALS,
    )


def _people(name: str, group: int, subgroup: int) -> int | None:
    """Count whole persons; hands, parts of the body and faces are left open."""
    if GROUPS[group] not in ("people", "smileys"):
        return 0
    if subgroup not in PEOPLE:
        return None
    if name.startswith("family"):
        return len(RELATIVES.findall(name.removeprefix("family"))) or None
    return 2 if COUPLES.search(name) else 1


# ---- edits ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """From one emoji to another that differs in one thing.

    Attributes:
        source: Names.
        target: Names.
        instruction: What to do with the image of the source.
    """

    source: str
    target: str
    instruction: str


def edits_of(names: Iterable[str]) -> list[Edit]:
    """Return all edits between emoji with these names, which differ in one thing."""
    names = sorted(set(names))
    known = set(names)
    found = []
    for name in names:
        for target, instruction in _variants(name):
            if target in known and target != name:
                found.append(Edit(name, target, instruction))
    return found


def _variants(name: str) -> Iterable[tuple[str, str]]:
    yield from _other_tones(name)
    words = name.split()
    for kind in ("woman", "man", "person"):
        if "woman" in words and kind != "woman":
            yield _replaced(words, "woman", kind), f"make it a {kind}"
        if "man" in words and kind != "man":
            yield _replaced(words, "man", kind), f"make it a {kind}"
        if "person" in words and kind != "person":
            yield _replaced(words, "person", kind), f"make it a {kind}"
    # Unicode names many a role of a person without saying "person": firefighter, health worker.
    for kind in ("woman", "man"):
        yield f"{kind} {name}", f"make it a {kind}"
        if words[0] == kind:
            yield " ".join(words[1:]), "make it a person"
    for color in COLORS:
        for other in COLORS:
            if color in words:
                yield _replaced(words, color, other), f"make it {other}"
    if name.endswith(CLOCK):
        for hour in HOURS:
            for ending in CLOCK:
                yield hour + ending, f"make it {hour + ending}"
    yield f"{name} facing right", "turn it to the right"
    if name.endswith(" facing right"):
        yield name.removesuffix(" facing right"), "turn it to the left"


HOURS = "one two three four five six seven eight nine ten eleven twelve".split()  # noqa: SIM905
CLOCK = (" o\u2019clock", "-thirty")


def _other_tones(name: str) -> Iterable[tuple[str, str]]:
    """Yield an emoji of one skin tone, or none, in each other tone, and without."""
    found = TONE_WORDS.findall(name)
    if len(found) > 1:
        return
    base = without_skin_tones(name)
    for tone in TONES.values():
        instruction = f"make the skin tone {tone}"
        if found:
            yield TONE_WORDS.sub(f" {tone} skin tone", name).strip(), instruction
        else:  # "man red hair" becomes "man dark skin tone red hair"
            words = base.split()
            for cut in range(1, len(words) + 1):
                head, tail = " ".join(words[:cut]), " ".join(words[cut:])
                yield f"{head} {tone} skin tone {tail}".strip(), instruction
    if found:
        yield base, "remove the skin tone"


def _replaced(words: list[str], old: str, new: str) -> str:
    return " ".join(new if word == old else word for word in words)
