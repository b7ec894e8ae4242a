"""Draw the images of a list of prompts: what is there already stays, also after a kill."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from tqdm import tqdm

from data_pipelines.jobs.shard_job import batched
from data_pipelines.jobs.sole_writer import sole_writer
from data_pipelines.shards.shards import read_json, write_json
from data_pipelines.sources.local_files import file_inside
from data_pipelines.sources.source import png_bytes
from eval.images.layouts import Item, items_of, note_bytes
from eval.provenance import describe_model
from mmdlm import load
from mmdlm.atomic_files import atomic_write
from mmdlm.pipeline.model import Model
from mmdlm.pipeline.sampler_names import CacheName
from mmdlm.vision.image_files import open_image

LayoutName = Literal["prompts", "geneval", "dpg_bench", "t2i_compbench", "wise", "imgedit"]


@dataclass(frozen=True)
class Drawn:
    """How a model draws; what is not given is the model's own.

    Args:
        num_inference_steps: Denoising steps of an image.
        guidance_scale: Classifier-free guidance; 1 is off.
        negative_prompt: What to keep out of the images.
        temperature: Of the draw of codes.
        cache: What a step remembers of the steps before: "stable" for images.
        seed: Of everything that is drawn at random.
        batch_size: Images in one call of the model; the images depend on it, as on the seed.
    """

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    temperature: float | None = None
    cache: CacheName | None = None
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)} is too small; give {least} or more")

    @property
    def options(self) -> dict[str, Any]:
        """What is given of the options of a task."""
        names = ("num_inference_steps", "guidance_scale", "negative_prompt", "temperature")
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value is not None}


@sole_writer
def draw(
    out: Path,
    prompts: Path,
    *,
    model: str = "emoji",
    layout: LayoutName = "prompts",
    count: int | None = None,
    limit: int | None = None,
    sources: Path | None = None,
    drawn: Drawn = Drawn(),
    device: str | None = None,
) -> None:
    """Draw the images of a benchmark, in the layout that its official scorer reads.

    The same command goes on where it was stopped. Each process of `accelerate launch` draws its
    share. A file beside the folder, OUT.json, says how the images were drawn.

    Args:
        out: Folder for the images.
        prompts: List of prompts of the benchmark: a .txt file, or rows with `prompt`; GenEval's
            evaluation_metadata.jsonl; the folder dpg_bench/prompts; a list of T2I-CompBench or
            WISE; ImgEdit's basic_edit.json.
        model: Bundled name, or the folder of a checkpoint or a run.
        layout: Name of the benchmark; "prompts": none, any list.
        count: Images of each prompt; default: as many as the benchmark asks for.
        limit: Draw the first so many prompts only.
        sources: Folder of the images that ImgEdit edits.
        drawn: How the model draws.
        device: "cpu", "cuda" and so on; default: a GPU where there is one, else the CPU.
    """
    items = items_of(layout, prompts, count)
    if limit is not None:
        if limit < 1:
            raise ValueError(f"limit is {limit}; give 1 or more")
        items = items[:limit]
    if layout == "imgedit" and sources is None:
        raise ValueError("ImgEdit edits images; name their folder with --sources")
    unfit = {"negative_prompt", "temperature"} & drawn.options.keys()
    if layout == "imgedit" and unfit:
        raise ValueError(f"an edit takes no {' and no '.join(sorted(unfit))}; leave it out")
    loaded = load(model, device=device)
    record = {
        "layout": layout,
        "prompts": [item.prompt for item in items],
        "drawn": asdict(drawn),
        "model": describe_model(model, loaded),
    }
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    _check_record(out.with_name(f"{out.name}.json"), record, write=rank == 0)
    if drawn.cache is not None:
        loaded = loaded.with_generation(cache=drawn.cache)
    # Blocks are the same whoever draws them, and whenever: so are the images.
    blocks = list(batched(iter(items), max(1, drawn.batch_size // items[0].count)))
    todo = [
        (number, block)
        for number, block in list(enumerate(blocks))[rank::world]
        if not all((out / name).is_file() for item in block for name in (*item.files, *item.notes))
    ]
    for number, block in tqdm(todo, desc="drawing", unit=" batches", disable=rank > 0):
        generator = torch.Generator().manual_seed(drawn.seed + number)
        _write(out, block, _images(loaded, block, drawn, sources, generator=generator))
    if rank == 0:
        print(f"{out}: {sum(item.count for item in items)} images of {len(items)} prompts")


def _images(
    model: Model,
    block: Sequence[Item],
    drawn: Drawn,
    sources: Path | None,
    *,
    generator: torch.Generator,
) -> list[Image.Image]:
    """Return the images of some items, those of the first come first."""
    if block[0].source is None:
        return model.text_to_image(
            [item.prompt for item in block],
            num_images_per_prompt=block[0].count,
            generator=generator,
            **drawn.options,
        )
    assert sources is not None
    given = [
        open_image(file_inside(sources, item.source, allow_outside=False).read_bytes())
        for item in block
    ]
    return [
        model.edit(image, item.prompt, generator=generator, **drawn.options)
        for image, item in zip(given, block, strict=True)
    ]


def _write(out: Path, block: Sequence[Item], images: Sequence[Image.Image]) -> None:
    rest = iter(images)
    for item in block:
        own = [next(rest) for _ in range(item.count)]
        for name, image in zip(item.files, [tiled(own)] if item.grid else own, strict=True):
            _write_file(out / name, png_bytes(image))
        for name, value in item.notes.items():
            _write_file(out / name, note_bytes(value))


def _write_file(path: Path, data: bytes) -> None:
    atomic_write(path, lambda file: file.write(data))


def tiled(images: Sequence[Image.Image]) -> Image.Image:
    """Return images of one size as tiles of one, two in a row, in reading order."""
    width, height = images[0].size
    sheet = Image.new("RGB", (2 * width, height * -(-len(images) // 2)), "white")
    for number, image in enumerate(images):
        sheet.paste(image, (number % 2 * width, number // 2 * height))
    return sheet


def _check_record(path: Path, record: dict[str, Any], *, write: bool) -> None:
    """Write how images are drawn, or raise ValueError where those there were drawn otherwise."""
    if path.is_file():
        before = read_json(path)
        changed = [name for name in record if before.get(name) != record[name]]
        if changed:
            raise ValueError(
                f"{path.with_suffix('')} was drawn with another {' and '.join(changed)} (see "
                f"{path}); name another --out, or delete both"
            )
    elif write:
        write_json(path, record)
