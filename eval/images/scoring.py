"""Measure a folder of images: FID, KID and IS by torch-fidelity, and rewards of their prompts."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data_pipelines.shards.shards import read_json, write_json
from eval.images.drawing import Drawn, LayoutName, draw
from eval.images.features import (
    EXTRACTOR,
    LOGITS,
    POOLED,
    Network,
    digest_of,
    image_files,
    kept_features,
    library,
    statistics,
)
from eval.images.layouts import Item, items_of
from eval.metrics import estimate
from eval.provenance import describe_hardware
from mmdlm.atomic_files import atomic_write
from mmdlm.rl.reward import Rubric
from mmdlm.vision.image_files import open_image

CACHE = Path("runs/eval/features")
NOTES = "mmdlm"  # array of a file of statistics that says of what they are


@dataclass(frozen=True)
class Reference:
    """Real images, to compare with.

    Attributes:
        mean: [2048].
        covariance: [2048, 2048].
        features: [N, 2048], which KID needs; None where only statistics are known.
        facts: Where they come from.
    """

    mean: np.ndarray
    covariance: np.ndarray
    features: Tensor | None
    facts: Mapping[str, Any]


def keep(
    images: Path,
    out: Path,
    *,
    weights: Path | None = None,
    cache: Path = CACHE,
    features: bool = True,
    batch_size: int = 64,
    device: str | None = None,
) -> None:
    """Keep the statistics of real images in one file, as the reference of `score`.

    The file (.npz) has mu and sigma, as other programs read them, the features, and the sha256 of
    the images and of the network's weights: `score` refuses those of another network.

    Args:
        images: Folder of the images.
        out: The file.
        weights: Weights of the Inception network of torch-fidelity; default: the library's cache.
        cache: Folder in which features are kept by their hash.
        features: Keep the features too, which KID needs.
        batch_size: Images at a time.
        device: "cpu", "cuda" and so on; default: a GPU where there is one, else the CPU.
    """
    if out.suffix != ".npz":
        raise ValueError(f"out is {str(out)!r}; statistics are kept in a .npz file")
    network = Network(weights, _device(device), batch_size)
    files = image_files(images)
    pooled = kept_features(files, network, cache, title="real images")[POOLED]
    notes: dict[str, Any] = {
        "images": len(files),
        "sha256": digest_of(files),
        "weights": network.sha256,
        "network": EXTRACTOR,
        "folder": images.name,
    }
    arrays: dict[str, Any] = {**statistics(pooled), NOTES: np.array(json.dumps(notes))}
    if features:
        arrays["features"] = pooled.numpy()
    data = io.BytesIO()
    np.savez(data, **arrays)
    if _rank() == 0:
        atomic_write(out, lambda file: file.write(data.getbuffer()))
        print(f"{out}: statistics of {len(files)} images (sha256 {notes['sha256'][:12]})")


def score(
    images: Path,
    out: Path,
    *,
    reference: Path | None = None,
    prompts: Path | None = None,
    layout: LayoutName = "prompts",
    count: int | None = None,
    rubric: Rubric | None = None,
    model: str | None = None,
    drawn: Drawn = Drawn(),
    weights: Path | None = None,
    cache: Path = CACHE,
    inception: bool = True,
    isc_splits: int = 10,
    kid_subsets: int = 100,
    kid_subset_size: int = 1000,
    batch_size: int = 64,
    device: str | None = None,
) -> None:
    """Measure a folder of images: FID and KID to a reference, IS, and rewards of their prompts.

    FID, KID and IS are those of torch-fidelity's own command on the same folders. With --model,
    what is missing of the folder is drawn first. The same command goes on where it was stopped.

    Args:
        images: Folder of the images.
        out: JSON file for the result.
        reference: Folder of real images, or a .npz file of `keep`; None: IS alone.
        prompts: List of prompts, which rewards and --model need; see `draw`.
        layout: How the images lie; see `draw`.
        count: Images of each prompt; default: as many as the benchmark asks for.
        rubric: Rewards of prompt and image by name, such as
            mmdlm.rl.rewards.images.clip_score.ClipScore.
        model: Draw what is missing with this model.
        drawn: How it draws.
        weights: Weights of the Inception network of torch-fidelity; default: the library's cache.
        cache: Folder in which features are kept by their hash.
        inception: Measure FID, KID and IS; false: rewards alone.
        isc_splits: Parts of the images whose IS is averaged.
        kid_subsets: Subsets whose KID is averaged.
        kid_subset_size: Images in a subset.
        batch_size: Images at a time in the network.
        device: "cpu", "cuda" and so on; default: a GPU where there is one, else the CPU.
    """
    began = time.perf_counter()
    if not inception and rubric is None:
        raise ValueError("nothing is measured: inception is false, and there is no rubric")
    if prompts is None and (rubric is not None or model is not None):
        raise ValueError("rewards and --model need the prompts; name their list with --prompts")
    if rubric is not None:
        rubric.prepare()  # what is not installed is said before anything is drawn
    network = Network(weights, _device(device), batch_size)
    known = None
    if inception:
        _ = network.extractor
        known = None if reference is None else read_reference(reference, network, cache)
    if model is not None and prompts is not None:
        draw(
            out=images,
            prompts=prompts,
            model=model,
            layout=layout,
            count=count,
            drawn=drawn,
            device=device,
        )
        _wait()
    results: dict[str, Any] = {}
    facts: dict[str, Any] = {"folder": str(images)}
    if inception:
        files = image_files(images)
        facts |= {"images": len(files), "sha256": digest_of(files)}
        found = kept_features(files, network, cache, title="images")
        results |= _inception(found, known, isc_splits, kid_subsets, kid_subset_size)
    if _rank() > 0:
        return
    if rubric is not None and prompts is not None:
        results |= _rewards(rubric, images, items_of(layout, prompts, count))
    report = {
        "results": results,
        "images": facts,
        "reference": None if known is None else dict(known.facts),
        "weights": network.sha256 if inception else None,
        "settings": {
            "isc_splits": isc_splits,
            "kid_subsets": kid_subsets,
            "kid_subset_size": kid_subset_size,
            "batch_size": batch_size,
            "torch_fidelity": library().__version__ if inception else None,
        },
        "drawn": read_json(record)
        if (record := images.with_name(f"{images.name}.json")).is_file()
        else None,
        "hardware": describe_hardware(network.device),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - began, 1),
    }
    write_json(out, report)
    for name, value in results.items():
        print(f"{name:32}{value['value']:12.5g} ± {value['error']:.3g}")
    print(out)


def read_reference(path: Path, network: Network, cache: Path) -> Reference:
    """Return the statistics of a folder of real images, or of a .npz file.

    Args:
        path: The folder, or the file.
        network: Whose features they have to be of.
        cache: Folder of kept features.

    Returns:
        The statistics.

    Raises:
        ValueError: The file is none, or of another network.
    """
    if path.is_dir():
        files = image_files(path)
        pooled = kept_features(files, network, cache, title="real images")[POOLED]
        own = statistics(pooled)
        facts = {"folder": str(path), "images": len(files), "sha256": digest_of(files)}
        return Reference(own["mu"], own["sigma"], pooled, facts)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mean, covariance = arrays["mu"], arrays["sigma"]
            features = torch.from_numpy(arrays["features"]) if "features" in arrays else None
            facts = json.loads(str(arrays[NOTES])) if NOTES in arrays else {}
    except (OSError, ValueError, KeyError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"reference {path} is neither a folder of images nor a .npz file with mu and sigma "
            f"({reason})"
        ) from None
    if facts.get("weights", network.sha256) != network.sha256:
        raise ValueError(
            f"reference {path} is of another network than {network.path}; make it again with `keep`"
        )
    return Reference(mean, covariance, features, {"file": str(path), **facts})


def _inception(
    found: Mapping[str, Tensor],
    known: Reference | None,
    isc_splits: int,
    kid_subsets: int,
    kid_subset_size: int,
) -> dict[str, dict[str, float]]:
    fidelity = library()
    seed, shuffle = fidelity.defaults.DEFAULTS["rng_seed"], True  # as its command has them
    scores = fidelity.metric_isc.isc_features_to_metric(found[LOGITS], isc_splits, shuffle, seed)
    results = {"inception_score": _of(scores, "inception_score_mean", "inception_score_std")}
    if known is None:
        return results
    own = statistics(found[POOLED])
    if own["mu"].shape != known.mean.shape:
        raise ValueError(f"the reference has features of shape {known.mean.shape}, not (2048,)")
    other = {
        "mu": known.mean.astype(own["mu"].dtype),
        "sigma": known.covariance.astype(own["sigma"].dtype),
    }
    fid = fidelity.metric_fid.fid_statistics_to_metric(own, other, verbose=False)
    results["frechet_inception_distance"] = _of(fid, "frechet_inception_distance")
    least = min(len(found[POOLED]), len(known.features) if known.features is not None else 0)
    if known.features is None:
        print("KID is not measured: the reference has no features, only their statistics")
    elif least < kid_subset_size:
        print(f"KID is not measured: {least} images are fewer than kid_subset_size")
    else:
        kid = fidelity.metric_kid.kid_features_to_metric(
            found[POOLED],
            known.features,
            kid_subsets=kid_subsets,
            kid_subset_size=kid_subset_size,
            verbose=False,
        )
        results["kernel_inception_distance"] = _of(
            kid, "kernel_inception_distance_mean", "kernel_inception_distance_std"
        )
    return results


def _of(metrics: Mapping[str, float], value: str, spread: str = "") -> dict[str, float]:
    """Return a value, and its spread over splits or subsets as its error."""
    return {"value": metrics[value], "error": metrics[spread] if spread else float("nan")}


def _rewards(rubric: Rubric, folder: Path, items: list[Item]) -> dict[str, dict[str, float]]:
    """Return the mean of each reward over all images of all prompts, with its standard error."""
    prompts, images = [], []
    for item in tqdm(items, desc="reading", unit=" prompts"):
        if item.grid:
            raise ValueError("images of a grid are not scored by rewards; draw with --count 1")
        for name in item.files:
            path = folder / name
            if not path.is_file():
                raise ValueError(f"{path}: no such image; draw it with --model, or `draw`")
            prompts.append(item.prompt)
            images.append(open_image(path.read_bytes()))
    scored = rubric(prompts, images)
    results = {}
    for name, values in scored.rewards.items():
        given = values[~values.isnan()]
        if not len(given):
            raise ValueError(f"{name} gave no score: {scored.skipped[name].reason}")
        mean = estimate(given)
        results[name] = {"value": mean.value, "error": mean.standard_error}
    for name, skipped in scored.skipped.items():
        print(f"{name}: {skipped.count} images have no score: {skipped.reason}")
    return results


def _device(device: str | None) -> torch.device:
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros((), device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} does not work here; try cpu") from error
    return found


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _wait() -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()
