r"""Job: image shards -> feature shards, so that training never runs a frozen vision tower.

    accelerate launch -m data_pipelines.extract_features --shards data/photos \
        --model runs/eyes --out data/photos_features

Only the tower runs, over the crops of every image of a sample; the projector is still trained.
Images are cut as `--model` cuts them, the several of a sample as those of one conversation. A
crop takes (patches x width of the tower) numbers: SigLIP so400m at 384 pixels makes 729 x 1152 of
them, 1.7 MB in float16, where LLaDA-V's tiling has 2 to 37 crops an image (5 at 1024 x 768).

Each process takes every n-th shard. A shard is written beside and then renamed, and the same
command goes on after an interruption.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from data_pipelines.jobs.report import Report
from data_pipelines.jobs.shard_job import (
    Rewriter,
    batched,
    needs_no_image,
    own_device,
    rewrite_shards,
    sample_name,
    whole_samples,
)
from data_pipelines.jobs.sole_writer import sole_writer
from data_pipelines.shards.sample_stats import one_line
from data_pipelines.shards.shards import Sample, expand_urls
from data_pipelines.sources.source import BROKEN_CONTENT, field_names
from data_pipelines.sources.vision_samples import IMAGE_FIELD, Eye, feature_fields, fingerprint
from mmdlm.cli import recipe as command_line
from mmdlm.models.checkpoints.checkpoint import Checkpoint
from mmdlm.models.configuration import read_config
from mmdlm.models.from_pretrained import checkpoint_names
from mmdlm.vision.encoders.adapter import VisionAdapter, VisionConfig
from mmdlm.vision.encoders.crops import CropViews
from mmdlm.vision.encoders.tower_weights import load_tower
from mmdlm.vision.image_files import MAX_PIXELS

RECORD = "features.json"  # which tower the features are of
Floats = Literal["float32", "bfloat16", "float16"]


@sole_writer
def main(
    shards: str | list[str],
    out: Path,
    *,
    model: Path | None = None,
    vision: VisionConfig | None = None,
    tower_weights: Path | None = None,
    dtype: Literal["float32", "float16"] = "float16",
    compute_dtype: Floats = "float32",
    batch_size: int = 16,
    keep_images: bool = False,
    max_broken: float = 0.01,
    max_pixels: int = MAX_PIXELS,
    allow_pipe: bool = False,
    device: str | None = None,
    threads: int = 4,
) -> None:
    """Replace the images of shards by what a vision tower makes of them; all else stays.

    Conversations without an image stay as they are.

    Args:
        shards: Folder, path, glob, brace range or URL of image shards, or several of them.
        out: Folder for the feature shards, which keep the names of their image shards.
        model: Folder of a model that sees, ours or of a published family.
        vision: In place of `model`: the adapter, as train.pretrain has it,
        tower_weights: with the folder of the weights of its tower.
        dtype: That features are stored in.
        compute_dtype: That the tower computes in.
        batch_size: Crops that the tower sees at once.
        keep_images: Keep the images beside their features.
        max_broken: Share of broken samples that are left out and listed; more stop the job.
        max_pixels: Images of more pixels are not decoded, and count as broken.
        allow_pipe: Run the commands of shards that are given as pipe:COMMAND.
        device: Where to compute; default: this process's GPU, else the CPU.
        threads: Threads that cut images.
    """
    if batch_size < 1 or threads < 1:
        raise ValueError(f"batch_size {batch_size} and threads {threads} must be 1 or more")
    # A path that is wrong is said before the tower is read.
    expand_urls(shards, allow_pipe=allow_pipe)
    adapter = _adapter(model, vision, tower_weights)
    made_by = fingerprint(adapter)

    def build() -> Extractor:
        adapter.crops_per_pass = batch_size
        ready = adapter.to(device or own_device(), getattr(torch, compute_dtype)).eval()
        return Extractor(ready, made_by, np.dtype(dtype), batch_size, keep_images, max_pixels)

    record: dict[str, object] = {
        "fingerprint": made_by,
        "dtype": dtype,
        "compute_dtype": compute_dtype,
        "keep_images": keep_images,
    }
    rewrite_shards(
        shards,
        out,
        record=(RECORD, record),
        build=build,
        threads=threads,
        max_broken=max_broken,
        allow_pipe=allow_pipe,
    )


@dataclass(frozen=True)
class Extractor(Rewriter):
    """Samples with images -> samples with features, `batch_size` of them at a time."""

    adapter: VisionAdapter
    made_by: str
    dtype: np.dtype
    batch_size: int
    keep_images: bool
    max_pixels: int

    def samples(self, url: str, report: Report, *, pool: Executor) -> Iterator[Sample]:
        """Yield the samples of a shard with features; broken ones are counted and left out."""
        for batch in batched(whole_samples(url), self.batch_size):
            report.read += len(batch)
            read = []
            for sample, views in zip(batch, pool.map(self._views, batch), strict=True):
                if isinstance(views, Exception):
                    report.add_broken(sample_name(sample), one_line(views))
                else:
                    read.append((sample, views))
            seen = iter(self._look([image for _, views in read for image in views]))
            for sample, views in read:
                if not views:
                    yield sample
                    continue
                images = list(islice(seen, len(views)))
                fields = feature_fields(sample, images, made_by=self.made_by, dtype=self.dtype)
                kept = {
                    name: value
                    for name, value in sample.items()
                    if self.keep_images or not IMAGE_FIELD.fullmatch(name)
                }
                yield {**kept, **fields}

    def _views(self, sample: Sample) -> list[CropViews] | Exception:
        try:
            views = Eye(self.adapter.config.tiling, max_pixels=self.max_pixels).views(sample)
            if not views and not needs_no_image(sample):
                raise ValueError(f"no image among its fields ({', '.join(field_names(sample))})")
            return views
        except BROKEN_CONTENT as error:
            return error

    @torch.inference_mode()
    def _look(self, views: list[CropViews]) -> list[CropViews]:
        device = next(self.adapter.parameters()).device
        moved = [image.map(lambda crops: crops.to(device)) for image in views]
        return [image.map(lambda crops: crops.cpu()) for image in self.adapter.look(moved)]


def _adapter(
    model: Path | None, vision: VisionConfig | None, tower_weights: Path | None
) -> VisionAdapter:
    """Return the adapter of a model, or one with a tower only; float32."""
    if model is not None and vision is None and tower_weights is None:
        return adapter_of(model)
    if model is None and vision is not None and tower_weights is not None:
        adapter = VisionAdapter(vision, 1)  # of no model: the projector is not used
        load_tower(adapter.tower, tower_weights)
        return adapter
    raise ValueError("name a model, or vision and tower_weights: features are of one tower")


def adapter_of(model: Path) -> VisionAdapter:
    """Return the vision adapter of a model's folder in float32; read nothing else of the model.

    Raises ValueError for a model that does not see.
    """
    checkpoint = Checkpoint.open(model)
    config = read_config(checkpoint.config)
    if config.vision is None:
        raise ValueError(f"model {model} has no vision adapter; name one that sees")
    adapter = VisionAdapter(VisionConfig.from_dict(config.vision), config.hidden_size)
    names = checkpoint_names(checkpoint)
    ours = {name: names.get(name, name) for name in checkpoint.tensors}
    names = {
        name: our.removeprefix("vision.") for name, our in ours.items() if our.startswith("vision.")
    }
    part = replace(checkpoint, tensors={name: checkpoint.tensors[name] for name in names})
    wanted = {name: tuple(tensor.shape) for name, tensor in adapter.state_dict().items()}
    part.check_fits(wanted, names=names)
    adapter.load_state_dict(
        {names[name]: tensor.to(torch.float32)[...] for name, tensor in part.tensors.items()}
    )
    return adapter


if __name__ == "__main__":
    command_line.run(main)
