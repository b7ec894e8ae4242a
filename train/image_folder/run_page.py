"""What a run shows of itself: figures, and one HTML page that needs no network.

Each look at what is trained leaves a file of its own beside the page, so that a run which is
continued goes on with the page that it had.
"""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
import torch
from jinja2 import Environment
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from tqdm import tqdm

from data_pipelines.html_page import STYLE, inline_image
from data_pipelines.shards.shards import read_json, write_json
from mmdlm.atomic_files import atomic_write
from mmdlm.core.losses.objective import Objective
from mmdlm.pipeline.model import Model
from mmdlm.rl.rewards.images.nearest_name import Gallery
from mmdlm.rl.rewards.images.neighbors import nearest_neighbors
from mmdlm.vision.pixels import to_pixels
from mmdlm.vision.tokenizers.base import ImageTokenizer
from train.log import LOG
from train.loop import launched
from train.optimizer_step import step_generator
from train.stages.denoising import Data, load_batches

PAGE = "index.html"
LOOKS = "looks"  # folder of what was seen
TITLES = {"image_tokenizer": "Image tokenizer", "model": "Model"}  # of the stages, in their order
NOISES = 4  # ways in which held-out samples are masked
NEAREST, DRAWN = 5, 32  # images that are near, and images that are drawn at a time
REFRESH = 30  # seconds after which a browser asks again, while it trains

Figures = dict[str, float]


@dataclass(frozen=True)
class Shown:
    """Caption that is drawn at each look, and its real image where there is one.

    Attributes:
        kind: What it is to the model: trained, held out, or a prompt of one's own.
    """

    caption: str
    image: Image.Image | None
    kind: str


@dataclass(frozen=True)
class Look:
    """Images and figures of a stage at a step: one image for each that is shown."""

    step: int
    figures: Figures
    images: list[str]


@dataclass(frozen=True)
class RunPage:
    """Page of a run.

    Attributes:
        out: Folder of the run, which has a folder of each stage.
        facts: What the page says of the data and the plan: heading -> lines.
        shown: By stage, what is looked at.
    """

    out: Path
    title: str
    facts: Mapping[str, Sequence[str]]
    shown: Mapping[str, Sequence[Shown]]

    @property
    def path(self) -> Path:
        """Return the path of the page."""
        return self.out / PAGE

    def add(self, stage: str, step: int, images: Sequence[Image.Image], figures: Figures) -> None:
        """Keep what was seen, print its figures, and write the page again."""
        look = {"step": step, "figures": figures, "images": list(map(inline_image, images))}
        write_json(self.out / LOOKS / f"{stage}_{step:08d}.json", look)
        said = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
        tqdm.write(f"{TITLES[stage]}, step {step}, held out: {said}")
        self.write()

    def write(self, results: Mapping[str, str] | None = None, *, usage: str = "") -> None:
        """Write the page; with results it is finished."""
        html = TEMPLATE.render(
            style=STYLE + OWN_STYLE,
            title=self.title,
            facts=self.facts,
            refresh=REFRESH if results is None else None,
            results=results,
            usage=usage,
            stages=[stage for name in TITLES if (stage := self._stage(name))["curves"]],
        )
        atomic_write(self.path, lambda file: file.write(html.encode()))

    def _stage(self, name: str) -> dict[str, Any]:
        """Return what the template shows of a stage, newest looks first."""
        paths = sorted((self.out / LOOKS).glob(f"{name}_*.json"))
        looks = [Look(**read_json(path)) for path in paths]
        real = [None if one.image is None else inline_image(one.image) for one in self.shown[name]]
        return {
            "title": TITLES[name],
            "curves": curves(self.out / name / LOG, looks, salt=name),
            "figures": list(looks[0].figures) if looks else [],
            "looks": looks[::-1],
            "shown": list(zip(self.shown[name], real, strict=True)),
        }


def curves(log: Path, looks: Sequence[Look], *, salt: str) -> str:
    """Draw the losses of a log and of held-out images over the steps -> SVG; "" for no log."""
    lines = log.read_text().splitlines() if log.is_file() else []
    entries = [json.loads(line) for line in lines if line.endswith("}")]
    series = {
        name.removeprefix("loss/"): [(one["step"], one[name]) for one in entries if one.get(name)]
        for name in (entries[0] if entries else {})
        if name.startswith("loss/") and any(one.get(name) for one in entries)
    }
    if not series:
        return ""
    with mpl.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        figure = Figure(figsize=(7.2, 2.6), layout="constrained")
        axes = figure.add_subplot()
        for name, points in series.items():
            (line,) = axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
            seen = [(one.step, one.figures[name]) for one in looks if name in one.figures]
            if seen:
                label, color = f"{name}, held out", line.get_color()
                axes.plot(*zip(*seen, strict=True), "o--", color=color, label=label, markersize=4)
        axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    return svg[svg.index("<svg") :]


OWN_STYLE = """
.curves { background: #fff; border: 1px solid var(--line); border-radius: 0.9rem;
  padding: 0.75rem; margin-top: 1.25rem; max-width: 46rem; }
.curves svg { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; margin-top: 1.25rem; }
table { border-collapse: separate; border-spacing: 0.4rem; font-size: 0.8rem; }
th { font-weight: 400; text-align: left; vertical-align: bottom; color: var(--soft);
  min-width: 5.5rem; max-width: 8rem; overflow-wrap: anywhere; }
td img { width: 5.5rem; background: #fff; border-radius: 0.35rem; }
td.number, th.number { white-space: nowrap; max-width: none; min-width: 0; vertical-align: middle; }
.given td { padding-bottom: 0.6rem; }
.facts { white-space: pre-wrap; overflow-wrap: anywhere; max-width: none; }
"""

TEMPLATE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{% if refresh %}
<meta http-equiv="refresh" content="{{ refresh }}">
{% endif %}
<title>{{ title }}</title>
<style>{{ style | safe }}</style>
</head>
<body>
<header>
<h1>{{ title }}</h1>
<p class="soft">{{ "It trains; this page grows while it does." if refresh else "Finished." }}</p>
</header>
<main>
{% if results %}
<section>
<h2>Results</h2>
<table>
{% for name, value in results.items() %}
<tr><th class="number">{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table>
<pre>{{ usage }}</pre>
</section>
{% endif %}
{% for stage in stages | reverse %}
<section>
<h2>{{ stage.title }}</h2>
<div class="curves">{{ stage.curves | safe }}</div>
{% if stage.looks %}
<div class="scroll">
<table>
<tr><th class="number">step</th>
{% for name in stage.figures %}
<th class="number">{{ name }}</th>
{% endfor %}
{% for one, real in stage.shown %}
<th>{{ one.caption }} <span class="badge">{{ one.kind }}</span></th>
{% endfor %}
</tr>
<tr class="given"><td class="number">real</td>
{% for name in stage.figures %}
<td></td>
{% endfor %}
{% for one, real in stage.shown %}
<td>{% if real %}<img src="{{ real }}" alt="the real image: {{ one.caption }}">{% endif %}</td>
{% endfor %}
</tr>
{% for look in stage.looks %}
<tr><td class="number">{{ look.step }}</td>
{% for name in stage.figures %}
<td class="number">{{ "%.3f" | format(look.figures[name]) }}</td>
{% endfor %}
{% for image in look.images %}
<td><img src="{{ image }}" alt="step {{ look.step }}, image {{ loop.index }}"></td>
{% endfor %}
</tr>
{% endfor %}
</table>
</div>
{% endif %}
</section>
{% endfor %}
{% for heading, lines in facts.items() %}
<section>
<h2>{{ heading }}</h2>
<p class="facts">{{ lines | join("\\n") }}</p>
</section>
{% endfor %}
</main>
</body>
</html>
""")


# ---- figures -------------------------------------------------------------------------------------


@torch.no_grad()
def psnr(tokenizer: ImageTokenizer, images: Sequence[Image.Image]) -> float:
    """Return the mean over images of the PSNR of their reconstructions, in dB."""
    device = next(tokenizer.parameters()).device
    found = []
    for one in images:
        pixels = to_pixels(one)[None].to(device)
        error = (tokenizer.reconstruct(pixels)[0].clamp(-1, 1) - pixels).square().mean()
        found.append(-10 * math.log10(max(float(error) / 4, 1e-10)))  # of a range of 2
    return fmean(found)


@torch.no_grad()
def held_out_losses(
    model: Model, objective: Objective, data: Data, *, seed: int
) -> dict[str, float]:
    """Return the loss of each modality on the first batch of `data`, masked in `NOISES` ways."""
    loader = load_batches(data, data.sources, model.codec, seed=seed, process=launched())
    batch = next(iter(loader)).to(model.device)
    sums: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for number in range(NOISES):
        generator = step_generator(model.device, seed, number)
        noise = objective.corrupt(batch, model.denoiser.vocabulary, generator=generator)
        terms = objective.terms(model.denoiser, batch, noise)
        sums.update({name: float(value) for name, value in terms.sums.items()})
        counts.update({name: int(value) for name, value in terms.counts.items()})
    return {name: sums[name] / max(1, counts[name]) for name in sums}


def share_near(
    model: Model, gallery: Gallery, prompts: Mapping[str, str], *, seed: int
) -> tuple[float, float]:
    """Measure how often an image of a caption is among the `NEAREST` to what is drawn of it.

    The distance is that of pixels, see `nearest_neighbors`.

    Args:
        model: It draws.
        gallery: All images, by their captions.
        prompts: Caption -> what of it the model is asked to draw.
        seed: Of the drawings.

    Returns:
        The share, and its standard error.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    captions, found = list(prompts), 0
    with tqdm(total=len(captions), desc="drawing", unit=" images") as bar:
        for start in range(0, len(captions), DRAWN):
            some = captions[start : start + DRAWN]
            drawn = model.text_to_image([prompts[one] for one in some], generator=generator)
            right = torch.tensor([gallery.places[caption] for caption in some])
            levels = gallery.prepare(drawn)
            near = nearest_neighbors(levels, gallery.levels, right=right, k=NEAREST).nearest
            for caption, places in zip(some, near.tolist(), strict=True):
                found += any(caption in gallery.names[place] for place in places)
            bar.update(len(some))
    share = found / len(captions)
    return share, math.sqrt(share * (1 - share) / len(captions))


def model_card(
    title: str, facts: Mapping[str, Sequence[str]], results: Mapping[str, str], *, usage: str
) -> str:
    """Return the README.md of the final model."""
    lines = [
        "---",
        "library_name: mmdlm",
        "pipeline_tag: text-to-image",
        "---",
        f"# {title}",
        "",
        "It draws images from captions and captions images, and was trained by "
        "`python -m train.own_images`.",
        "",
        "```sh",
        usage,
        "```",
        "",
        "| measure | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in results.items()),
    ]
    for heading, said in facts.items():
        lines += ["", f"## {heading}", "", "```", *said, "```"]
    return "\n".join(lines) + "\n"
