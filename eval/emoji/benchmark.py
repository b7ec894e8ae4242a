"""Benchmark: emoji by name. Captions, drawings, reconstructions, likelihood and speed of a model.

python -m eval.emoji --config configs/eval/emoji.yaml
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data_pipelines.shards.shards import BrokenShard, Sample, expand_urls, read_shard, write_file
from data_pipelines.sources.emoji import (
    Emoji,
    alike_names,
    draw_emoji,
    find_font,
    fully_qualified,
)
from data_pipelines.sources.emoji_facts import tones_of
from data_pipelines.sources.source import BROKEN_CONTENT, field_image
from data_pipelines.sources.text_files import parsed
from eval.emoji.contact_sheet import FAINT, FAIR, GOOD, POOR, Card, sheet_of
from eval.metrics import estimate, exact_match, psnr, wilson_interval, word_overlap
from eval.provenance import describe_hardware, describe_model, sha256_of
from mmdlm.cli import recipe as command_line
from mmdlm.core.likelihood.elbo import Elbo
from mmdlm.core.sequence import Sequence as Document
from mmdlm.core.sequence import collate, image_segments, text_segment
from mmdlm.pipeline.generation_config import GenerationConfig
from mmdlm.pipeline.loading import load
from mmdlm.pipeline.model import Model
from mmdlm.rl.rewards.images.neighbors import Neighbors, nearest_neighbors
from mmdlm.vision.pixels import to_pixels
from mmdlm.vision.tokenizers.base import ImageTokenizer

SIZE = 64  # pixels, at which images are compared
NEAREST = 5
ELBO = Elbo(repeats=2, strata=4, at_once=4)
SPEED_BATCHES = (1, 16)
TONE = re.compile(r" (?:medium-light|medium-dark|light|medium|dark) skin tone")
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F1FF + 1)
TAGS = range(0xE0020, 0xE007F + 1)  # they spell the region in the flags of England and Scotland

# What is measured of each emoji, in the order of the table: key -> (what it says, unit)
MEASURES = {
    "caption_exact": ("caption exactly equal to the name", "%"),
    "caption_but_for_tones": ("caption right but for skin tones", "%"),
    "caption_words": ("caption's words in common with the name, F1", "%"),
    "drawing_top_1": ("drawn image is nearest to the named one", "%"),
    "drawing_top_5": ("named one is among the 5 nearest to the drawn", "%"),
    "drawing_psnr": ("drawn image against the named one, PSNR", "dB"),
    "reconstruction_psnr": ("tokenizer reconstruction, PSNR", "dB"),
    "reconstruction_top_1": ("reconstruction is nearest to its image", "%"),
    "name_nelbo": ("name given the image, NELBO", "nats"),
    "image_nelbo": ("image given the name, NELBO", "nats"),
}
Columns = dict[str, Tensor]  # measure -> [N], one value for each emoji


def main(
    model: str = "emoji",
    *,
    out: Path = Path("runs/eval/emoji.json"),
    sheet: Path | None = None,
    font: Path | None = None,
    shards: str | None = None,
    limit: int | None = None,
    steps: int | None = None,
    caption_steps: int | None = None,
    guidance_scale: float | None = None,
    drawings: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    likelihood_items: int = 128,
    speed_repeats: int = 3,
    sheet_images: int = 48,
    device: str | None = None,
) -> None:
    """Measure a model on the emoji data set: on the names it was trained on, and on held-out ones.

    Prints a table and writes the JSON of --out, with every number and setting; beside it every
    answer, one emoji a line (.jsonl), and two sheets of images.

    Args:
        model: Bundled name, or the folder of a checkpoint or a run.
        out: JSON file for the result.
        sheet: PNG file for held-out images, drawn beside real; default: --out with .png. The
            tokenizer's reconstructions go beside it, with -tokenizer added to the name.
        font: Color emoji font to draw the real images with; default: one of this machine.
        shards: Instead of a font: the shards that `data_pipelines.write_shards emoji` wrote, such
            as "data/emoji/{train,held_out}/*.tar".
        limit: Trained names to ask for, chosen at random by the seed; default: all. The held-out
            ones are all asked for, always.
        steps: Denoising steps of a drawing; default: the model's own number.
        caption_steps: Denoising steps of a caption; default: the model's own number.
        guidance_scale: Guidance of a drawing, 1 is off; default: the model's own value.
        drawings: Of each name, with the seeds from --seed on; measures are means over them, with
            standard errors over names, and sheets and answers show the first.
        seed: Of everything that is drawn at random.
        batch_size: Emoji in one call of the model; drawings depend on it, as on the seed.
        likelihood_items: Emoji of each kind whose likelihood is estimated; 0: none.
        speed_repeats: Timed calls, of which the median is the speed; 0: speed is not measured.
        sheet_images: Images on a sheet.
        device: "cpu", "cuda" and so on; default: a GPU where there is one, else the CPU.
    """
    _check_at_least(
        1, limit=limit, drawings=drawings, batch_size=batch_size, sheet_images=sheet_images
    )
    _check_at_least(0, seed=seed, likelihood_items=likelihood_items, speed_repeats=speed_repeats)
    _check_device(device)
    if font is not None and shards is not None:
        raise ValueError(f"--font {font} and --shards {shards} exclude each other; give one")
    files = Files.of(out, sheet)
    if shards is None:
        font = font or find_font()
    loaded = load(model, device=device)
    described = describe_model(model, loaded)
    own = Asked.of(loaded, steps, caption_steps, guidance_scale)
    asked = replace(own, drawings=drawings, seed=seed, batch_size=batch_size)
    began, hardware = time.perf_counter(), describe_hardware(loaded.device)

    gallery = Gallery.draw(font or find_font()) if shards is None else Gallery.read(shards)
    splits = {
        name: measure(loaded, gallery, places, asked, likelihood_items=likelihood_items, title=name)
        for name, places in gallery.split(limit, seed=seed).items()
    }
    last = list(splits)[-1]  # the held-out ones, where there are any
    speed = measure_speed(loaded, gallery, splits[last].places, asked, repeats=speed_repeats)
    report = {
        "results": {name: split.results for name, split in splits.items()},
        "speed": speed,
        "settings": {
            "limit": limit,
            **asdict(asked),
            "likelihood": {"items": likelihood_items, **asdict(ELBO)},
        },
        "data": gallery.describe(),
        "model": described,
        "hardware": hardware,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - began, 1),
    }
    print(table(report))
    files.write(report, splits, gallery)
    shown = some_of(len(splits[last].places), sheet_images, seed=seed)
    is_new = last == "held-out"
    write_image(files.sheet, drawing_sheet(splits[last], gallery, shown, is_new=is_new))
    write_image(files.tokenizer_sheet, tokenizer_sheet(splits[last], gallery, shown))
    print("", *asdict(files).values(), sep="\n")


# ---- what is asked for ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Gallery:
    """All emoji there are; a place is an index into them.

    levels  [G, 3, SIZE, SIZE] uint8
    right   the names that are right for each: of those drawn pixel for pixel alike, all
    """

    emoji: tuple[Emoji, ...]
    levels: Tensor
    right: tuple[frozenset[str], ...]
    source: dict[str, str]

    @classmethod
    def draw(cls, font: Path) -> Gallery:
        """Draw them all; ValueError where the font cannot."""
        drawn = tqdm(
            draw_emoji(font, size=SIZE),
            desc="drawing with the font",
            total=len(fully_qualified()),
            unit=" emoji",
        )
        emoji = tuple(one for one in drawn if isinstance(one, Emoji))
        return cls.of(emoji, {"font": font.name, "font_sha256": sha256_of(font)})

    @classmethod
    def read(cls, shards: str) -> Gallery:
        """Read them from shards; ValueError where those are damaged, or hold something else."""
        emoji = []
        for url in expand_urls(shards):
            try:
                emoji += [_emoji_of(sample) for sample in read_shard(url)]
            except BrokenShard as error:
                raise ValueError(f"shard {url}: {error}; write it again") from error
        if not emoji:
            raise ValueError(f"shards {shards} hold no samples; name others")
        return cls.of(emoji, {"shards": shards})

    @classmethod
    def of(cls, emoji: Sequence[Emoji], source: dict[str, str]) -> Gallery:
        """Any emoji; `source` says where they come from."""
        names = alike_names(emoji)
        levels = to_levels([one.image for one in emoji], SIZE)
        return cls(tuple(emoji), levels, tuple(names[one.name] for one in emoji), source)

    def split(self, limit: int | None, *, seed: int) -> dict[str, list[int]]:
        """The places of each split that is not empty; `limit` of the trained ones, at random."""
        trained = [i for i, one in enumerate(self.emoji) if not one.held_out]
        held_out = [i for i, one in enumerate(self.emoji) if one.held_out]
        if limit is not None:
            trained = [trained[i] for i in sorted(some_of(len(trained), limit, seed=seed))]
        splits = {"trained": trained, "held-out": held_out}
        return {name: places for name, places in splits.items() if places}

    def describe(self) -> dict[str, Any]:
        """What the numbers were measured on."""
        return {
            "emoji": len(self.emoji),
            "held_out": sum(one.held_out for one in self.emoji),
            "drawn_alike": sum(len(names) > 1 for names in self.right),
            **self.source,
            "emoji_package": version("emoji"),
        }


def _emoji_of(sample: Sample) -> Emoji:
    try:
        facts = parsed(sample["json"])
        return Emoji(
            name=facts["name"],
            names=facts["names"],
            aliases=tuple(facts["aliases"]),
            characters=facts["characters"],
            image=field_image(sample),
            held_out=facts["held_out"],
        )
    except (KeyError, TypeError, *BROKEN_CONTENT) as error:
        raise ValueError(
            f"sample {sample['__key__']} of {sample['__url__']} is no emoji as "
            f"data_pipelines.write_shards writes them ({type(error).__name__}: {error})"
        ) from error


@dataclass(frozen=True)
class Asked:
    """How the model is asked: its own settings, but for what the caller gave."""

    text_to_image: GenerationConfig
    caption: GenerationConfig
    drawings: int = 1
    seed: int = 0
    batch_size: int = 64

    @classmethod
    def of(
        cls,
        model: Model,
        steps: int | None,
        caption_steps: int | None,
        guidance_scale: float | None,
    ) -> Asked:
        """Raises ValueError for numbers out of range."""
        drawing, caption = model.defaults.text_to_image, model.defaults.caption
        given: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
        drawing = replace(drawing, **{k: v for k, v in given.items() if v is not None})
        if caption_steps is not None:
            caption = replace(caption, num_inference_steps=caption_steps)
        return cls(drawing, caption)

    def draw(
        self, model: Model, names: Sequence[str], *, generator: torch.Generator
    ) -> list[Image.Image]:
        """An image of each name."""
        scale = self.text_to_image.guidance_scale
        assert not isinstance(scale, tuple)  # edits alone have several
        return model.text_to_image(
            names,
            num_inference_steps=self.text_to_image.num_inference_steps,
            guidance_scale=scale,
            generator=generator,
        )

    def describe(
        self, model: Model, images: Sequence[Image.Image], *, generator: torch.Generator
    ) -> list[str]:
        """A caption of each image."""
        return model.caption(
            images, num_inference_steps=self.caption.num_inference_steps, generator=generator
        )


@dataclass(frozen=True)
class Answers:
    """What the model made of N emoji.

    captions         of their images
    drawings         of their names, K times [N, 3, SIZE, SIZE] uint8
    originals        their images at the tokenizer's size, [N, 3, H, H] uint8
    reconstructions  of those by the tokenizer, [N, 3, H, H] uint8
    """

    captions: list[str]
    drawings: list[Tensor]
    originals: Tensor
    reconstructions: Tensor


def ask(model: Model, gallery: Gallery, places: list[int], asked: Asked, *, title: str) -> Answers:
    """Caption the images, draw the names, and reconstruct the images."""
    tokenizer = _tokenizer(model)
    captions: list[str] = []
    drawings: list[Tensor] = []
    originals, reconstructions = [], []

    # Each pass starts from the seed, so that held-out answers do not depend on --limit.
    for some in _batches(places, asked.batch_size, f"{title}: reconstructing"):
        original = to_levels([gallery.emoji[i].image for i in some], tokenizer.image_size)
        originals.append(original)
        reconstructions.append(reconstruct(tokenizer, original, model.device))
    generator = torch.Generator().manual_seed(asked.seed)
    for some in _batches(places, asked.batch_size, f"{title}: captioning"):
        images = [gallery.emoji[i].image for i in some]
        captions += asked.describe(model, images, generator=generator)
    for number in range(asked.drawings):
        generator = torch.Generator().manual_seed(asked.seed + number)
        drawn: list[Image.Image] = []
        for some in _batches(places, asked.batch_size, f"{title}: drawing"):
            drawn += asked.draw(model, [gallery.emoji[i].name for i in some], generator=generator)
        drawings.append(to_levels(drawn, SIZE))
    return Answers(
        captions=captions,
        drawings=drawings,
        originals=torch.cat(originals),
        reconstructions=torch.cat(reconstructions),
    )


@torch.no_grad()
def reconstruct(tokenizer: ImageTokenizer, levels: Tensor, device: torch.device) -> Tensor:
    """[N, 3, H, W] uint8 -> the same through the codes of the tokenizer, as an image stores it."""
    pixels = tokenizer.decode(tokenizer.encode(levels.to(device) / 127.5 - 1))
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def to_levels(images: Sequence[Image.Image], size: int) -> Tensor:
    """Images -> [N, 3, size, size] uint8, scaled where they have another size."""
    return torch.stack(
        [((to_pixels(one, size, fit="pad") + 1) * 127.5).round().to(torch.uint8) for one in images]
    )


def some_of(count: int, number: int, *, seed: int) -> list[int]:
    """`number` of 0 .. count - 1 (or all, where there are fewer), at random, in random order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[:number].tolist()


def kind(emoji: Emoji) -> str:
    """What an emoji is measured with, apart from others: flags, and skin tones by their number."""
    points = emoji.code_points
    if any(point in REGIONAL_INDICATORS or point in TAGS for point in points):
        return "flag"
    tones = len(tones_of(emoji.characters))
    return ("no skin tone", "one skin tone", "two skin tones")[min(tones, 2)]


# ---- what it is worth ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """N emoji and all that is known of them.

    places   into the gallery
    answers  what the model made of them
    columns  the measures of each, but for likelihood
    drawn    what the drawings look like most
    results  means, over all of them and by kind
    """

    places: list[int]
    answers: Answers
    columns: Columns
    drawn: Neighbors
    results: dict[str, Any]


def measure(
    model: Model,
    gallery: Gallery,
    places: list[int],
    asked: Asked,
    *,
    likelihood_items: int,
    title: str,
) -> Split:
    """Ask the model about the emoji at `places`, and score the answers."""
    answers = ask(model, gallery, places, asked, title=title)
    columns, drawn = score(answers, gallery, places)
    results = summarize(columns, [kind(gallery.emoji[i]) for i in places])
    if likelihood_items:
        some = [places[i] for i in some_of(len(places), likelihood_items, seed=asked.seed)]
        results["measures"] |= summary(likelihood(model, gallery, some, asked, title=title))
    return Split(places, answers, columns, drawn, results)


def score(answers: Answers, gallery: Gallery, places: list[int]) -> tuple[Columns, Neighbors]:
    """Compare captions with names and images with images.

    The neighbours are those of the first drawings.
    """
    right = [gallery.right[i] for i in places]
    drawn = [_neighbors(one, gallery, places) for one in answers.drawings]
    rebuilt = _neighbors(answers.reconstructions, gallery, places)
    columns = {
        "caption_exact": exact_match(answers.captions, right),
        "caption_but_for_tones": exact_match(
            [TONE.sub("", text) for text in answers.captions],
            [{TONE.sub("", name) for name in names} for names in right],
        ),
        "caption_words": word_overlap(answers.captions, right),
        "drawing_top_1": _each([one.within(1) for one in drawn]),
        "drawing_top_5": _each([one.within(NEAREST) for one in drawn]),
        "drawing_psnr": _each(
            [psnr(one, gallery.levels[places], peak=255) for one in answers.drawings]
        ),
        "reconstruction_psnr": psnr(answers.reconstructions, answers.originals, peak=255),
        "reconstruction_top_1": rebuilt.within(1),
    }
    return columns, drawn[0]


def _each(values: Sequence[Tensor]) -> Tensor:
    """K times [N] -> [N] means; of one, itself: what is true or false has an interval."""
    return values[0] if len(values) == 1 else torch.stack([*values]).float().mean(0)


def _neighbors(images: Tensor, gallery: Gallery, places: list[int]) -> Neighbors:
    """Where the emoji at `places` stand among all, by distance to [N, 3, H, H] uint8 images."""
    if images.shape[-1] != SIZE:
        images = to_levels([_image(one) for one in images], SIZE)
    return nearest_neighbors(images, gallery.levels, right=torch.tensor(places), k=NEAREST)


def likelihood(
    model: Model, gallery: Gallery, places: list[int], asked: Asked, *, title: str
) -> Columns:
    """The negative evidence lower bounds of N emoji, in nats: of names and of images, [N] each.

    Those are of all text slots and of all codes, by logits restricted to the range of the modality,
    as they are when sampled; each is a Monte Carlo estimate, and noisy by itself.
    """
    generator = torch.Generator(model.device).manual_seed(asked.seed)
    values = defaultdict(list)
    for some in _batches(places, asked.batch_size, f"{title}: likelihood"):
        levels = to_levels([gallery.emoji[i].image for i in some], _tokenizer(model).image_size)
        with torch.no_grad():
            codes = _tokenizer(model).encode(levels.to(model.device) / 127.5 - 1).cpu()
        for target in ("name", "image"):
            documents = [
                document(model, gallery.emoji[i].name, code, target=target)
                for i, code in zip(some, codes, strict=True)
            ]
            batch = collate(documents, model.denoiser.vocabulary).to(model.device)
            bound = ELBO.nelbo(model.denoiser, batch, generator=generator)
            values[f"{target}_nelbo"].append(bound.value[:, 0].cpu())
    return {key: torch.cat(parts) for key, parts in values.items()}


def document(model: Model, name: str, codes: Tensor, *, target: str) -> Document:
    """The layout that models are trained on, with the name or the image as target."""
    vocabulary = model.denoiser.vocabulary
    ids = model.text_tokenizer.encode(name, add_special_tokens=False)
    closing = max(1, (model.text_slots or 0) - len(ids))
    text = text_segment([*ids, *[vocabulary.eos_id] * closing], target=target == "name")
    return Document((*image_segments(codes, vocabulary, target=target == "image"), text))


def measure_speed(
    model: Model, gallery: Gallery, places: list[int], asked: Asked, *, repeats: int
) -> list[dict[str, Any]]:
    """Images and captions per second: the median of `repeats` calls, after one to warm up."""
    rows = []
    with tqdm(total=2 * len(SPEED_BATCHES) * repeats, desc="speed", unit=" calls") as bar:
        for batch_size in SPEED_BATCHES if repeats else ():
            some = [gallery.emoji[i] for i in (places * batch_size)[:batch_size]]
            tasks: dict[str, Callable[..., Any]] = {
                "drawing": partial(asked.draw, model, [one.name for one in some]),
                "captioning": partial(asked.describe, model, [one.image for one in some]),
            }
            for task, call in tasks.items():
                seconds = []
                for repeat in range(repeats + 1):
                    began = time.perf_counter()
                    call(generator=torch.Generator().manual_seed(asked.seed))
                    if repeat:
                        seconds.append(time.perf_counter() - began)
                        bar.update()
                rows.append(
                    {
                        "task": task,
                        "batch_size": batch_size,
                        "per_second": batch_size / statistics.median(seconds),
                        "seconds": seconds,
                    }
                )
    return rows


def summarize(columns: Columns, kinds: Sequence[str]) -> dict[str, Any]:
    """The measures over all emoji of a split, and over those of each kind."""
    by_kind = {}
    for name in sorted(set(kinds)):
        rows = torch.tensor([one == name for one in kinds])
        by_kind[name] = summary({key: values[rows] for key, values in columns.items()})
    return {"count": len(kinds), "measures": summary(columns), "by_kind": by_kind}


def summary(columns: Columns) -> dict[str, dict[str, Any]]:
    """Each measure's mean, standard error and count; of shares also the 95 % interval."""
    found = {}
    for key, values in columns.items():
        one: dict[str, Any] = asdict(estimate(values))
        if values.dtype == torch.bool:
            one["interval_95"] = wilson_interval(values)
        if math.isnan(one["standard_error"]):  # one emoji alone: JSON knows no NaN
            one["standard_error"] = None
        found[key] = one
    return found


# ---- the table and the files ---------------------------------------------------------------------


@dataclass(frozen=True)
class Files:
    """Where the results go."""

    report: Path
    items: Path
    sheet: Path
    tokenizer_sheet: Path

    @classmethod
    def of(cls, out: Path, sheet: Path | None) -> Files:
        """Raises ValueError for a place that cannot take a file, before the slow work begins."""
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
            write_file(path, partial(_put, content + "\n"))


def table(report: Mapping[str, Any]) -> str:
    """The report for people: means and their standard errors."""
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


# ---- the sheets ----------------------------------------------------------------------------------


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
        image = _image(split.answers.drawings[0][n])
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
            _image(split.answers.originals[n]),
            _image(split.answers.reconstructions[n]),
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


# ---- small parts ---------------------------------------------------------------------------------


def _batches(places: Sequence[int], size: int, what: str) -> Iterator[Sequence[int]]:
    """The places, `size` at a time, under a bar with rate and time left."""
    with tqdm(total=len(places), desc=f"{what:<24}", unit=" emoji") as bar:
        for start in range(0, len(places), size):
            some = places[start : start + size]
            yield some
            bar.update(len(some))


def _tokenizer(model: Model) -> ImageTokenizer:
    if model.image_tokenizer is None:
        raise ValueError("this model knows text alone; name one with an image tokenizer: --model")
    return model.image_tokenizer


def _image(levels: Tensor) -> Image.Image:
    """[3, H, W] uint8 -> image."""
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def _put(text: str, file: BinaryIO) -> None:
    file.write(text.encode())


def write_image(path: Path, image: Image.Image) -> None:
    """An image as PNG, whole or not at all."""
    write_file(path, partial(image.save, format="PNG", optimize=True))


def _check_at_least(least: int, **options: int | None) -> None:
    for name, value in options.items():
        if value is not None and value < least:
            raise ValueError(f"--{name} {value} is too small; give {least} or more")


def _check_device(device: str | None) -> None:
    try:
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:  # unknown, not there, or torch built without it
        raise ValueError(
            f"--device {device} does not work here; try cpu, or leave it out"
        ) from error


if __name__ == "__main__":
    command_line.run(main)
