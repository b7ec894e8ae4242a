"""What answers are worth: likeness, likelihood and speed, by name and by kind."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from eval.emoji.answers import Answers, Asked, ask, batches, tokenizer_of
from eval.emoji.gallery import SIZE, Gallery, kind, some_of, to_levels
from eval.metrics import estimate, exact_match, psnr, wilson_interval, word_overlap
from mmdlm.core.likelihood.elbo import Elbo
from mmdlm.core.sequence import Sequence as Document
from mmdlm.core.sequence import collate, image_segments, text_segment
from mmdlm.pipeline.model import Model
from mmdlm.rl.rewards.images.neighbors import Neighbors, nearest_neighbors

NEAREST = 5
ELBO = Elbo(repeats=2, strata=4, at_once=4)
SPEED_BATCHES = (1, 16)
TONE = re.compile(r" (?:medium-light|medium-dark|light|medium|dark) skin tone")

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


@dataclass(frozen=True)
class Split:
    """N emoji and all that is known of them.

    Attributes:
        places: Into the gallery.
        answers: What the model made of them.
        columns: The measures of each, but for likelihood.
        drawn: What the drawings look like most.
        results: Means, over all of them and by kind.
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
        images = to_levels([image_of(one) for one in images], SIZE)
    return nearest_neighbors(images, gallery.levels, right=torch.tensor(places), k=NEAREST)


def likelihood(
    model: Model, gallery: Gallery, places: list[int], asked: Asked, *, title: str
) -> Columns:
    """Return the negative evidence lower bounds of N emoji, in nats: of names and images, [N] each.

    Those are of all text slots and of all codes, by logits restricted to the range of the modality,
    as they are when sampled; each is a Monte Carlo estimate, and noisy by itself.
    """
    generator = torch.Generator(model.device).manual_seed(asked.seed)
    values = defaultdict(list)
    for some in batches(places, asked.batch_size, f"{title}: likelihood"):
        levels = to_levels([gallery.emoji[i].image for i in some], tokenizer_of(model).image_size)
        with torch.no_grad():
            codes = tokenizer_of(model).encode(levels.to(model.device) / 127.5 - 1).cpu()
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
    """Return the document that models are trained on, with the name or the image as target."""
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
    """Return the measures over all emoji of a split, and over those of each kind."""
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


def image_of(levels: Tensor) -> Image.Image:
    """[3, H, W] uint8 -> image."""
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
