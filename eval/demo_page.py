"""The page of the demonstration: what a model did -> one HTML file that needs no network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from html import escape
from string import Template

from data_pipelines.html_page import STYLE


class Origin(Enum):
    """What a prompt is to the model; the value is what the page says."""

    TRAINED = "trained"
    HELD_OUT = "held out"
    NEW = "new"


@dataclass(frozen=True)
class Drawing:
    """An image that was drawn, and the real one where there is one; both as addresses."""

    prompt: str
    origin: Origin
    image: str
    real: str | None


@dataclass(frozen=True)
class Animation:
    """The denoising of some prompts, and its last frame for those who want no movement."""

    moving: str
    still: str
    prompts: tuple[str, ...]
    width: int
    height: int


@dataclass(frozen=True)
class Answer:
    """The caption of a real image."""

    name: str
    origin: Origin
    caption: str
    image: str


@dataclass(frozen=True)
class Mending:
    """An image by name, the same with a hole, and with the hole filled by a prompt."""

    name: str
    prompt: str
    before: str
    hole: str
    after: str


@dataclass(frozen=True)
class Completion:
    """A text whose hole of some tokens was filled, with an image in view or without."""

    before: str
    filled: str
    after: str
    holes: int
    image: str | None
    image_name: str | None


@dataclass(frozen=True)
class Content:
    """All that the page shows."""

    model: str
    seed: int
    seconds: float
    steps: int
    animation: Animation
    drawings: Sequence[Drawing]
    invented: Sequence[Drawing]
    answers: Sequence[Answer]
    mendings: Sequence[Mending]
    completions: Sequence[Completion]


def page(content: Content) -> str:
    """Return the whole HTML file."""
    return PAGE.substitute(
        style=STYLE,
        facts=escape(
            f"Model {content.model}, seed {content.seed}, {content.steps} denoising steps, "
            f"{content.seconds:.0f} seconds for everything on this page."
        ),
        animation=_animation(content.animation),
        legend=_legend([*content.drawings, *content.invented]),
        drawings=_figures(map(_drawing, content.drawings)),
        invented=_figures(map(_drawing, content.invented)),
        answers=_figures(map(_answer, content.answers)),
        mendings="\n".join(map(_mending, content.mendings)),
        completions="\n".join(map(_completion, content.completions)),
    )


def _animation(one: Animation) -> str:
    alt = f"Images emerge from gray tiles: {', '.join(one.prompts)}"
    return (
        '<image><source media="(prefers-reduced-motion: reduce)" '
        f'srcset="{escape(one.still)}">'
        f'<img src="{escape(one.moving)}" alt="{escape(alt)}" '
        f'width="{one.width}" height="{one.height}"></image>'
    )


def _legend(drawings: Sequence[Drawing]) -> str:
    says = {
        Origin.TRAINED: "the name of an emoji that was in the training data",
        Origin.HELD_OUT: "an emoji kept away from training: the model has to compose it",
        Origin.NEW: "no emoji at all, only words that occur in names",
    }
    there = [origin for origin in Origin if any(one.origin == origin for one in drawings)]
    return "\n".join(f"<li>{_badge(origin)} {escape(says[origin])}</li>" for origin in there)


def _figures(figures: Iterable[str]) -> str:
    return "\n".join(f"<li>{figure}</li>" for figure in figures)


def _drawing(one: Drawing) -> str:
    real = ""
    if one.real is not None:
        alt = f"the real emoji, {one.prompt}"
        real = f'<span class="real">{_image(one.real, alt)} the real one</span>'
    return (
        f"<figure>{_image(one.image, f'drawn: {one.prompt}')}"
        f"<figcaption>{escape(one.prompt)}{_badge(one.origin)}{real}</figcaption></figure>"
    )


def _answer(one: Answer) -> str:
    right = one.caption == one.name
    verdict = (
        '<span class="right">✓ exactly its name</span>'
        if right
        else f'<span class="wrong">its name: {escape(one.name)}</span>'
    )
    return (
        f"<figure>{_image(one.image, f'emoji: {one.name}')}"
        f"<figcaption><q>{escape(one.caption)}</q>{_badge(one.origin)}{verdict}"
        "</figcaption></figure>"
    )


def _mending(one: Mending) -> str:
    steps = [
        (one.before, f"{one.name}, before", one.name),
        (one.hole, f"{one.name}, with a hole", "the hole"),
        (one.after, f"the hole filled: {one.prompt}", one.prompt),
    ]
    figures = '<span class="arrow" aria-hidden="true">→</span>'.join(
        f"<figure>{_image(image, alt)}<figcaption>{escape(words)}</figcaption></figure>"
        for image, alt, words in steps
    )
    return f'<div class="mending">{figures}</div>'


def _completion(one: Completion) -> str:
    image = ""
    if one.image is not None:
        image = _image(one.image, f"image in view: {one.image_name}")
    hole = "[MASK]" if one.holes == 1 else f"[MASK:{one.holes}]"
    asked = f"{one.before} {hole}{one.after}".strip()
    space = one.filled[: len(one.filled) - len(one.filled.lstrip())]  # not to be marked
    return (
        f"<li>{image}<div><code>{escape(asked)}</code><p>{escape(one.before)}{space}"
        f"<mark>{escape(one.filled.lstrip())}</mark>{escape(one.after)}</p></div></li>"
    )


def _image(address: str, alt: str) -> str:
    return f'<img src="{escape(address)}" alt="{escape(alt)}" loading="lazy">'


def _badge(origin: Origin) -> str:
    return f'<span class="badge {origin.name.lower()}">{origin.value}</span>'


PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>mmdlm: one model that draws and describes</title>
<style>$style</style>
</head>
<body>
<header>
<h1>One model that draws and describes</h1>
<p>Text and image are tokens of one sequence. What is asked for is masked, and the model fills the
masks step by step: a whole image, a whole text, or a hole in either.</p>
<div class="hero">$animation</div>
</header>
<main>
<section>
<h2>Words to images</h2>
<p class="soft">Drawn from only these words.</p>
<ul class="legend">
$legend
</ul>
<ul class="grid">
$drawings
</ul>
</section>
<section>
<h2>Images to words</h2>
<p class="soft">Real emoji in, words out. The image is all that the model sees.</p>
<ul class="grid">
$answers
</ul>
</section>
<section>
<h2>A hole in an image</h2>
<p class="soft">The hole is filled to fit the words and the rest of the image. Outside the hole no
pixel changes.</p>
<div class="mendings">
$mendings
</div>
</section>
<section>
<h2>A hole in a text</h2>
<p class="soft">The same loop fills words, with an image in view or without. Only what is marked
was filled in.</p>
<ul class="lines">
$completions
</ul>
</section>
<section>
<h2>Words that no emoji has</h2>
<p class="soft">Combinations that are in no data set. A model as small as this one gets some of
them.</p>
<ul class="grid">
$invented
</ul>
</section>
<section>
<h2>Your turn</h2>
<pre>mmdlm draw "woman firefighter medium-dark skin tone" -o out.png --animate out.gif
mmdlm caption out.png
mmdlm inpaint out.png --box 0,0,64,32 --prompt "man firefighter" -o mended.png
mmdlm infill "woman [MASK] skin tone"</pre>
</section>
</main>
<footer>$facts</footer>
</body>
</html>
""")
