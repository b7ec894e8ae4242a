"""The page of the demonstration: what a model did -> one HTML file that needs no network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from html import escape
from string import Template


class Origin(Enum):
    """What a prompt is to the model; the value is what the page says."""

    TRAINED = "trained"
    HELD_OUT = "held out"
    NEW = "new"


@dataclass(frozen=True)
class Drawing:
    """A picture that was drawn, and the real one where there is one; both as addresses."""

    prompt: str
    origin: Origin
    picture: str
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
    picture: str


@dataclass(frozen=True)
class Mending:
    """A picture by name, the same with a hole, and with the hole filled by a prompt."""

    name: str
    prompt: str
    before: str
    hole: str
    after: str


@dataclass(frozen=True)
class Completion:
    """A text whose hole of some tokens was filled, with a picture in view or without."""

    before: str
    filled: str
    after: str
    holes: int
    picture: str | None
    picture_name: str | None


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
    """The whole HTML file."""
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
    alt = f"Pictures emerge from grey tiles: {', '.join(one.prompts)}"
    return (
        '<picture><source media="(prefers-reduced-motion: reduce)" '
        f'srcset="{escape(one.still)}">'
        f'<img src="{escape(one.moving)}" alt="{escape(alt)}" '
        f'width="{one.width}" height="{one.height}"></picture>'
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
        f"<figure>{_image(one.picture, f'drawn: {one.prompt}')}"
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
        f"<figure>{_image(one.picture, f'emoji: {one.name}')}"
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
        f"<figure>{_image(picture, alt)}<figcaption>{escape(words)}</figcaption></figure>"
        for picture, alt, words in steps
    )
    return f'<div class="mending">{figures}</div>'


def _completion(one: Completion) -> str:
    picture = ""
    if one.picture is not None:
        picture = _image(one.picture, f"picture in view: {one.picture_name}")
    hole = "[MASK]" if one.holes == 1 else f"[MASK:{one.holes}]"
    asked = f"{one.before} {hole}{one.after}".strip()
    space = one.filled[: len(one.filled) - len(one.filled.lstrip())]  # not to be marked
    return (
        f"<li>{picture}<div><code>{escape(asked)}</code><p>{escape(one.before)}{space}"
        f"<mark>{escape(one.filled.lstrip())}</mark>{escape(one.after)}</p></div></li>"
    )


def _image(address: str, alt: str) -> str:
    return f'<img src="{escape(address)}" alt="{escape(alt)}" loading="lazy">'


def _badge(origin: Origin) -> str:
    return f'<span class="badge {origin.name.lower()}">{origin.value}</span>'


STYLE = """
:root {
  color-scheme: light dark;
  --ground: #faf9f6; --card: #ffffff; --ink: #23211d; --soft: #6b665c; --line: #e6e2da;
  --trained: #5f6b7a; --held-out: #a84b00; --new: #6d3fc0; --right: #23762f; --mark: #ffe9a8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #171614; --card: #211f1c; --ink: #ece8e0; --soft: #a49e92; --line: #38342e;
    --trained: #a3b0c0; --held-out: #ffa35c; --new: #bb9bff; --right: #7fce8a; --mark: #6b5510;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: clamp(1.25rem, 4vw, 3.5rem); max-width: 66rem;
  background: var(--ground); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", sans-serif;
}
h1 { font-size: clamp(1.9rem, 5vw, 2.8rem); letter-spacing: -0.03em; line-height: 1.1; margin: 0; }
h2 { font-size: 1.35rem; letter-spacing: -0.01em; margin: 3.5rem 0 0.25rem; }
p { margin: 0.35rem 0; max-width: 44rem; }
.soft, footer, .legend { color: var(--soft); }
ul { list-style: none; margin: 1.25rem 0 0; padding: 0; }
figure { margin: 0; }
img { display: block; max-width: 100%; height: auto; }
.hero { margin-top: 1.75rem; padding: 0.75rem; background: #fff; border-radius: 1rem;
  border: 1px solid var(--line); width: fit-content; }
.grid { display: grid; gap: 0.9rem;
  grid-template-columns: repeat(auto-fill, minmax(8.75rem, 1fr)); }
.grid li, .mending, .lines li { background: var(--card); border: 1px solid var(--line);
  border-radius: 0.9rem; }
.grid li { padding: 0.65rem 0.65rem 0.8rem; }
.grid figure > img, .mending img { width: 100%; background: #fff; border-radius: 0.5rem; }
figcaption { margin-top: 0.55rem; font-size: 0.86rem; line-height: 1.35;
  display: flex; flex-direction: column; gap: 0.3rem; align-items: flex-start;
  overflow-wrap: anywhere; }
.badge { font-size: 0.7rem; font-weight: 600; line-height: 1; padding: 0.24rem 0.45rem;
  border: 1px solid currentColor; border-radius: 1rem; white-space: nowrap; }
.trained { color: var(--trained); }
.held_out { color: var(--held-out); }
.new { color: var(--new); }
.real { display: flex; align-items: center; gap: 0.4rem; color: var(--soft); font-size: 0.75rem; }
.real img { width: 1.75rem; background: #fff; border-radius: 0.25rem; }
.legend { margin-top: 0.75rem; font-size: 0.86rem; display: grid; gap: 0.35rem; }
q { font-weight: 600; quotes: none; }
.right { color: var(--right); } .wrong { color: var(--soft); }
.mendings { display: flex; flex-wrap: wrap; gap: 0.9rem; margin-top: 1.25rem; }
.mending { display: flex; align-items: flex-start; gap: 0.7rem; padding: 0.9rem; max-width: 100%; }
.mending figure { width: 8rem; min-width: 0; }
.arrow { color: var(--soft); font-size: 1.3rem; margin-top: 2.9rem; }
.lines { display: grid; gap: 0.6rem; }
.lines li { display: flex; align-items: center; gap: 1rem; padding: 0.7rem 0.9rem; }
.lines img { width: 3.25rem; background: #fff; border-radius: 0.4rem; }
.lines p { margin: 0.1rem 0 0; font-size: 1.05rem; }
code, pre { font: 0.84rem/1.6 ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace; }
code { color: var(--soft); }
mark { background: var(--mark); color: inherit; border-radius: 0.25rem; padding: 0 0.15rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 0.9rem;
  padding: 0.9rem 1.1rem; overflow-x: auto; }
footer { margin-top: 3.5rem; padding-top: 1rem; border-top: 1px solid var(--line);
  font-size: 0.86rem; }
"""

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
<p>Text and picture are tokens of one sequence. What is asked for is masked, and the model fills the
masks step by step: a whole picture, a whole text, or a hole in either.</p>
<div class="hero">$animation</div>
</header>
<main>
<section>
<h2>Words to pictures</h2>
<p class="soft">Drawn from these words alone.</p>
<ul class="legend">
$legend
</ul>
<ul class="grid">
$drawings
</ul>
</section>
<section>
<h2>Pictures to words</h2>
<p class="soft">Real emoji in, words out. The image is all that the model sees.</p>
<ul class="grid">
$answers
</ul>
</section>
<section>
<h2>A hole in a picture</h2>
<p class="soft">The hole is filled to fit the words and the rest of the image. Outside the hole no
pixel changes.</p>
<div class="mendings">
$mendings
</div>
</section>
<section>
<h2>A hole in a text</h2>
<p class="soft">The same loop fills words, with a picture in view or without. Only what is marked
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
