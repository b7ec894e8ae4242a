"""Train an image tokenizer: `python -m train.image_tokenizer --config X.yaml`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_pipelines.jobs.sole_writer import sole_writer
from data_pipelines.room import bytes_of, check_room
from data_pipelines.shards.images import image_loader
from mmdlm.cli.recipe import run
from mmdlm.cli.settings import checked
from mmdlm.vision.checkpoint_files import reason_of
from mmdlm.vision.image_files import MAX_PIXELS
from mmdlm.vision.pixels import Fit, to_image
from mmdlm.vision.tokenizers.auto import load_image_tokenizer
from mmdlm.vision.tokenizers.base import ImageTokenizer
from mmdlm.vision.tokenizers.magvit2 import Magvit2Tokenizer
from mmdlm.vision.tokenizers.patch_tokenizer import PatchTokenizer
from mmdlm.vision.tokenizers.stored_tokenizer import CONFIG
from train.checkpoints.checkpoint import latest
from train.checkpoints.rehearsal import rehearse_saving
from train.loop import fit, launched
from train.stages.meter import Load
from train.stages.stage import Stage
from train.training_config import TrainingConfig

FAMILIES = {family.family: family for family in (PatchTokenizer, Magvit2Tokenizer)}
SHOWN = 16  # images on a sample sheet


@dataclass(frozen=True)
class PixelLoss:
    """Weights of the terms of the reconstruction loss, on pixels in [-1, 1].

    Attributes:
        l1: Mean absolute error.
        l2: Mean squared error.
        gradient: Mean absolute error of the differences between neighbouring pixels: edges stay
            sharp.
    """

    l1: float = 1.0
    l2: float = 1.0
    gradient: float = 1.0

    def __call__(self, reconstruction: Tensor, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] twice -> [], the mean over images."""
        error = reconstruction - pixels
        across, down = error.diff(dim=-1), error.diff(dim=-2)
        return (
            self.l1 * error.abs().mean()
            + self.l2 * error.square().mean()
            + self.gradient * (across.abs().mean() + down.abs().mean())
        )


class ReconstructionStage(Stage):
    """Images in, the same images out; the quantizer's own loss is added, already weighted."""

    def __init__(self, tokenizer: ImageTokenizer, loss: PixelLoss) -> None:
        super().__init__()
        self.tokenizer, self.loss = tokenizer, loss
        self.coefficients = {"pixels": 1.0, "quantizer": 1.0}
        self.image_flops = forward_flops(tokenizer)

    def draw(self, batch: Tensor, *, generator: torch.Generator) -> None:
        """Nothing is random."""

    def counts(self, batch: Tensor, noise: Any) -> dict[str, Tensor]:
        """Images."""
        count = torch.tensor(len(batch), device=batch.device)
        return {"pixels": count, "quantizer": count}

    def forward(self, batch: Tensor, noise: Any) -> dict[str, Tensor]:
        """Pixels [N, 3, H, W] -> sums over images."""
        reconstruction, auxiliary = self.tokenizer.reconstruct(batch)
        loss = self.loss(reconstruction.float(), batch)
        return {"pixels": loss * len(batch), "quantizer": auxiliary * len(batch)}

    def load(self, batch: Tensor, noise: Any) -> Load:
        """Codes are its tokens, all of which are learned; backward counts as twice forward."""
        codes = len(batch) * (self.tokenizer.image_size // self.tokenizer.downsampling) ** 2
        flops = torch.tensor(3.0 * len(batch) * self.image_flops, dtype=torch.float64)
        return Load(codes, codes, flops)


def forward_flops(tokenizer: ImageTokenizer) -> int:
    """Of one image: convolutions, matrix products and attention."""
    shapes = copy.deepcopy(tokenizer).to("meta")
    image = torch.zeros(1, 3, tokenizer.image_size, tokenizer.image_size, device="meta")
    counter = FlopCounterMode(display=False)
    # Torch does not count the attention kernel of a CPU, but what it is made of.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        shapes.reconstruct(image)
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class Images:
    """Shards of images, and how they become batches; see `image_loader`.

    Attributes:
        num_workers: As in `Data` of the other recipes.
        sampling_weight: As in `Source` of the other recipes.
        max_pixels: Of an image; larger ones count as broken.
        allow_pipe: Run the commands of shards that are given as pipe:COMMAND.
    """

    urls: str | list[str]
    batch_size: int = 16
    fit: Fit = "crop"
    num_workers: int | None = None
    shuffle_buffer: int = 4096
    sampling_weight: str | None = None
    max_broken: float = 0.01
    max_pixels: int = MAX_PIXELS
    allow_pipe: bool = False


@dataclass(frozen=True)
class TokenizerConfig:
    """The image tokenizer that is trained.

    Args:
        start_from: Folder of a tokenizer to start from, of any family, in place of a new one.
        family: PatchTokenizer or MAGVITv2.
        options: Of a new tokenizer of the family; an unknown one is an error. Beside `start_from`
            only encoder_depth and decoder_depth of a PatchTokenizer: blocks that change nothing at
            first are added to its stacks.
        decoder_only: Leave the encoder of `start_from` as it is, and with it the codes of images:
            a Transformer that was trained on them draws with the new decoder.
    """

    start_from: Path | None = None
    family: str = PatchTokenizer.family
    options: dict[str, Any] | None = None
    decoder_only: bool = False

    def __post_init__(self) -> None:
        if self.decoder_only and self.start_from is None:
            raise ValueError("model.decoder_only is true, and no encoder is given: set start_from")
        if self.family not in FAMILIES:
            raise ValueError(
                f"model.family {self.family!r} cannot be trained; choose {' or '.join(FAMILIES)}"
            )

    def build(self) -> ImageTokenizer:
        """Read the tokenizer to start from, or make a new one."""
        if self.start_from is not None:
            tokenizer = self._deeper(load_image_tokenizer(self.start_from))
            if self.decoder_only:
                freeze_encoder(tokenizer)
            return tokenizer
        try:
            return FAMILIES[self.family].from_config(self.options or {})
        except (AttributeError, TypeError, LookupError, ArithmeticError) as error:
            raise ValueError(
                f"model.options {self.options} describe no {self.family} ({reason_of(error)}); "
                "correct them"
            ) from error

    def _deeper(self, tokenizer: ImageTokenizer) -> ImageTokenizer:
        if not self.options:
            return tokenizer
        depths = {"encoder_depth", "decoder_depth"}
        if not isinstance(tokenizer, PatchTokenizer) or self.options.keys() - depths:
            raise ValueError(
                f"model.options {self.options} beside model.start_from {self.start_from}: only "
                "encoder_depth and decoder_depth of a PatchTokenizer can change; leave the others "
                "out, or leave out start_from"
            )
        return tokenizer.deeper(
            **{**{name: tokenizer.config[name] for name in depths}, **self.options}
        )


def freeze_encoder(tokenizer: ImageTokenizer) -> None:
    """Let only those parameters train that `decode` uses."""
    cells = (tokenizer.image_size // tokenizer.downsampling) ** 2
    parameters = list(tokenizer.parameters())
    pixels = tokenizer.decode(torch.zeros(1, cells, dtype=torch.long))
    reached = torch.autograd.grad(pixels.sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, reached, strict=True):
        parameter.requires_grad_(gradient is not None)


@sole_writer
def main(
    out: Path,
    images: Images,
    *,
    model: TokenizerConfig = TokenizerConfig(),
    loss: PixelLoss = PixelLoss(),
    training: TrainingConfig = TrainingConfig(),
    on_sample: Callable[[int, ImageTokenizer], None] | None = None,
    threads: int | None = None,
) -> None:
    """Train, and write the averaged weights to `out`/final.

    Args:
        out: Folder of checkpoints, log and samples; a run found there is continued.
        images: What to train on.
        model: What to start from, or the family and the options of a new tokenizer.
        loss: Weights of the reconstruction loss.
        training: Steps, optimizer, checkpoints.
        on_sample: Called with the step and the averaged weights every `sample_steps` steps, and
            with step 0 before the first, in place of writing a sheet of reconstructions; a function
            by its import path.
        threads: CPU threads; all by default.
    """
    told = checked(locals())
    if threads:
        torch.set_num_threads(threads)
    state = launched()
    if model.start_from is None:
        size = bytes_of(model.build)
        check_room(
            f"the tokenizer that model.options {model.options or {}} describe",
            {"weights": size, "gradients": size},
            mend="its options",
        )
    with torch.random.fork_rng():  # the weights follow from the seed, the caller's state stays
        torch.manual_seed(training.seed)
        tokenizer = model.build()
    loader = image_loader(
        images.urls,
        batch_size=images.batch_size,
        image_size=tokenizer.image_size,
        fit=images.fit,
        seed=training.seed,
        num_workers=images.num_workers,
        rank=state.process_index,
        world_size=state.num_processes,
        shuffle_buffer=images.shuffle_buffer,
        sampling_weight=images.sampling_weight,
        max_broken=images.max_broken,
        max_pixels=images.max_pixels,
        allow_pipe=images.allow_pipe,
        pin_memory=state.device.type == "cuda",
    )

    @cache  # every sheet shows the same images, read when the first is made
    def shown() -> Tensor:
        size = tokenizer.image_size
        some = image_loader(
            images.urls,
            batch_size=SHOWN,
            image_size=size,
            fit=images.fit,
            max_pixels=images.max_pixels,
            allow_pipe=images.allow_pipe,
        )
        return next(iter(some)).to(state.device)

    def reconstructions(step: int, tokenizer: ImageTokenizer) -> None:
        """Real images above, what the tokenizer makes of them below."""
        real = shown()
        with torch.no_grad():
            again, _ = tokenizer.reconstruct(real)
        rows = [torch.cat(list(each), dim=-1) for each in (real, again)]
        image = to_image(torch.cat(rows, dim=-2).cpu())
        folder = out / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        larger = (2 * image.width, 2 * image.height)
        image.resize(larger, Image.Resampling.NEAREST).save(folder / f"step_{step:08d}.png")

    def look(step: int) -> None:
        (on_sample or reconstructions)(step, tokenizer)

    if state.is_main_process and latest(out) is None:
        rehearse_saving(tokenizer.save_pretrained, load_image_tokenizer, out)
    stage = ReconstructionStage(tokenizer, loss)
    fit(stage, loader, settings=training, out=out, told=told, on_sample=look)
    if state.is_main_process:
        tokenizer.save_pretrained(out / "final")
        print(f"trained tokenizer: {out / 'final' / CONFIG}")


if __name__ == "__main__":
    run(main)
