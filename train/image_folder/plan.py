"""How a model of one's own images is trained: how large, how long, on what loss."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from data_pipelines.shards.shards import read_json, write_json
from data_pipelines.sources.image_text import Tasks
from mmdlm.core.diffusion.forward import Absorbing
from mmdlm.core.diffusion.schedule import Cosine as CosineMasks
from mmdlm.core.kernels.precision import fast_dtype
from mmdlm.core.losses.objective import ModalityLoss, Objective
from mmdlm.core.losses.timesteps import StratifiedTimesteps
from mmdlm.core.losses.token_losses import CrossEntropy
from mmdlm.core.vocabulary import Vocabulary
from mmdlm.models.configuration import MmdlmConfig
from mmdlm.models.costs import Costs, product_rate
from train.loop import launched
from train.optimizer import AdamW, Cosine, Muon
from train.stages.model_shape import Shape
from train.stages.row_lengths import row_length
from train.training_config import TrainingConfig

Start = Literal["auto", "emoji", "nothing"]
StageName = Literal["image_tokenizer", "model"]
BATCH, TOKENIZER_BATCH = 32, 16
LEVELS = (7, 5, 5, 5, 5)  # of the codes of an image tokenizer: 4,375
VOCABULARY = Vocabulary.build(text_size=2048, eos_id=0, image_codes=math.prod(LEVELS))
FITTING = 0.98  # share of the captions that must fit the bundled model
MASKED = 0.64  # share of the codes of an image that is masked on average, under a cosine schedule
# Of a training step, of the speed of large products; in bfloat16 on a CPU the rest takes most.
EFFICIENCY, EFFICIENCY_BFLOAT16 = 0.6, 0.35
ENOUGH = 2000  # steps that a shape needs to be worth its size
FEWEST = 20  # steps of a stage, however short the time
EPOCHS = {"image_tokenizer": 300, "model": 1000}  # after which a set has nothing left to teach
LEAST = {"image_tokenizer": 1500, "model": 2000}  # steps that do no harm to the smallest set
TOKENIZER_SHARE = {"emoji": 0.08, "nothing": 0.2}  # of the time, by the start
MODEL_SHARE = 0.93  # of the time, when the model is trained; the rest is for the figures
LOOKING = 0.06  # of the time of a stage, for looking at it

TASKS = Tasks(draw=0.5, caption=0.15, joint=0.35)
OBJECTIVE = Objective(
    process=Absorbing(CosineMasks()),
    text=ModalityLoss(loss=CrossEntropy(), loss_normalization="masked_token"),
    image=ModalityLoss(loss=CrossEntropy(), loss_normalization="masked_token"),
    times=StratifiedTimesteps(per="segment"),
)
DRAWING = {
    "num_inference_steps": 8,
    "guidance_scale": 2.0,
    "temperature": 0.5,
    "order_temperature": 1.0,
    "schedule": "cosine",
}
DECODING: dict[str, Any] = {
    "text_to_image": DRAWING,
    "inpaint": DRAWING,
    "caption": {"num_inference_steps": 16, "order": "left_to_right"},
    "infill": {"num_inference_steps": 16},
}


class Plan:
    """Decisions of a run, in a file: it is continued with them, however fast it is by then."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.decided: dict[str, Any] = read_json(path) if path.is_file() else {}

    def once(self, name: str, decide: Callable[[], Any]) -> Any:
        """Return what was decided under this name before, or else decide it now (as JSON)."""
        if name not in self.decided:
            value = json.loads(json.dumps(decide()))
            write_json(self.path, {**self.decided, name: value})
            self.decided[name] = value
        return self.decided[name]


# ---- sizes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Codes of an image of `size` pixels square."""

    size: int

    def __post_init__(self) -> None:
        if not 32 <= self.size <= 256 or self.size % self.patch:
            raise ValueError(
                f"size is {self.size}; give 32 to 256 pixels, a multiple of 8 up to 128 and of 16 "
                "above (64 is usual)"
            )

    @property
    def patch(self) -> int:
        """Return the edge of the square of pixels that becomes one code."""
        return 8 if self.size <= 128 else 16

    @property
    def codes(self) -> int:
        """Return the number of codes of an image."""
        return (self.size // self.patch) ** 2

    @property
    def tokenizer(self) -> dict[str, Any]:
        """Return the options of a new PatchTokenizer."""
        return {
            "image_size": self.size,
            "patch": self.patch,
            "width": 192,
            "heads": 6,
            "encoder_depth": 1,
            "decoder_depth": 3,
            "levels": list(LEVELS),
        }


@dataclass(frozen=True)
class Proportions:
    """Size of a Transformer, and how many images it takes to fill it."""

    width: int
    layers: int
    heads: int
    images: int

    def shape(self, *, length: int, text_slots: int) -> Shape:
        """Return the shape of a new Transformer for sequences of this length."""
        return Shape(
            hidden_size=self.width,
            intermediate_size=round(self.width * 8 / 3 / 64) * 64,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            qk_norm=True,
            max_position_embeddings=length,
            text_slots=text_slots,
        )

    def step_flops(self, *, codes: int) -> float:
        """Return the floating-point operations of a training step."""
        length = row_length(codes, BUNDLED_SLOTS)
        shape = asdict(self.shape(length=length, text_slots=BUNDLED_SLOTS))
        head = round(MASKED * codes) * math.prod(LEVELS)
        costs = Costs(MmdlmConfig(vocabulary=VOCABULARY.to_dict(), **shape))
        return BATCH * float(costs.training(tokens=length, pairs=length**2, head=head))


SHAPES = (
    Proportions(width=128, layers=4, heads=4, images=0),
    Proportions(width=192, layers=8, heads=4, images=0),  # that of the bundled model
    Proportions(width=384, layers=10, heads=6, images=5_000),
    Proportions(width=512, layers=12, heads=8, images=30_000),
)
BUNDLED_SHAPE, BUNDLED_SIZE, BUNDLED_SLOTS = 1, 64, 16


@dataclass(frozen=True)
class Choice:
    """Start of a run, which of `SHAPES` its model has, and why."""

    start: Literal["emoji", "nothing"]
    number: int
    why: str

    def shape(self, *, length: int, text_slots: int) -> Shape:
        """Return the shape of a new Transformer for sequences of this length."""
        return SHAPES[self.number].shape(length=length, text_slots=text_slots)


def choose(
    start: Start,
    grid: Grid,
    *,
    images: int,
    lengths: Sequence[int],
    seconds: float,
    device: torch.device,
) -> Choice:
    """Choose what to start from.

    The bundled model, where its size of image is wanted, nearly all captions fit its `text_slots`,
    and no larger model would be trained in the time.

    Args:
        start: What was asked for.
        grid: Of the images.
        images: To train on.
        lengths: Tokens of each caption, by the tokenizer of the bundled model.
        seconds: For all of the run.
        device: To train on.

    Returns:
        The start, and why.

    Raises:
        ValueError: For a start from a bundled model that does not fit.
    """
    number = shape_for(images, seconds=seconds, codes=grid.codes, flops_per_second=speed(device))
    short = sum(length < BUNDLED_SLOTS for length in lengths) / len(lengths)
    against = []
    if grid.size != BUNDLED_SIZE:
        against.append(f"it draws {BUNDLED_SIZE} pixels, not {grid.size}")
    if short < FITTING:
        against.append(f"{1 - short:.0%} of the captions are too long for it")
    if start == "emoji" and against:
        raise ValueError(f"start is emoji, but {' and '.join(against)}; give start nothing")
    if start == "auto" and number > BUNDLED_SHAPE:
        against.append("there are images and time enough for a larger model")
    if start == "nothing":
        against.append("so it was asked for")
    if not against:
        return Choice("emoji", BUNDLED_SHAPE, "starts from the bundled model, emoji, which fits")
    size = SHAPES[number]
    why = f"starts from nothing, with {size.layers} layers of width {size.width}"
    return Choice("nothing", number, f"{why}, not from the bundled model: {' and '.join(against)}")


def shape_for(images: int, *, seconds: float, codes: int, flops_per_second: float) -> int:
    """Return the largest of `SHAPES` that the images fill and that has `ENOUGH` steps in the time.

    Return the smallest where none has.
    """
    for number in reversed(range(len(SHAPES))):
        step = SHAPES[number].step_flops(codes=codes)
        if images >= SHAPES[number].images and seconds * flops_per_second >= ENOUGH * step:
            return number
    return 0


def speed(device: torch.device) -> float:
    """Estimate the floating-point operations a second of a training step on a device."""
    dtype = fast_dtype(device)
    slow = device.type == "cpu" and dtype == torch.bfloat16
    with torch.random.fork_rng():
        return (EFFICIENCY_BFLOAT16 if slow else EFFICIENCY) * product_rate(device, dtype)


# ---- steps ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pace:
    """Speed of a stage in its first steps.

    Attributes:
        step: Seconds of one.
        look: Seconds of one look at what it has learned.
    """

    step: float
    look: float


def settings_for(
    stage: StageName, pace: Pace, *, seconds: float, images: int, learned: bool
) -> dict[str, Any]:
    """Return how many steps a stage has in the time, and when it is looked at and saved.

    Args:
        stage: Which one.
        pace: Seconds of a step, and of a look.
        seconds: For the stage.
        images: To train on.
        learned: Whether it starts from weights that have learned already: at half the learning
            rates.

    Returns:
        Numbers of steps by name, and the share of the learning rates.
    """
    batch = TOKENIZER_BATCH if stage == "image_tokenizer" else BATCH
    most = max(LEAST[stage], math.ceil(EPOCHS[stage] * images / batch))
    looks = min(12, max(2, int(LOOKING * seconds / max(pace.look, 1e-3))))
    steps = min(most, max(FEWEST, int((seconds - looks * pace.look) / pace.step)))
    kept = min(120.0, max(5.0, seconds / 20))  # seconds from checkpoint to checkpoint
    return {
        "steps": steps,
        "sample_steps": math.ceil(steps / looks),
        "save_steps": min(steps, max(1, int(kept / pace.step))),
        "logging_steps": max(1, steps // 200),
        "rate": 0.5 if learned else 1.0,
    }


def training(
    stage: StageName,
    *,
    steps: int,
    sample_steps: int,
    save_steps: int,
    logging_steps: int,
    rate: float,
    seed: int,
) -> TrainingConfig:
    """Return settings with the bundled model's optimizer, at this share of its learning rates.

    Matrices are multiplied in bfloat16 where the device is made for it.
    """
    native = fast_dtype(launched().device) == torch.bfloat16
    if stage == "image_tokenizer":
        rest = AdamW(learning_rate=0.002 * rate, betas=(0.9, 0.99), weight_decay=0.0)
        optimizer = Muon(learning_rate=0.02 * rate, weight_decay=0.0, rest=rest)
    else:
        rest = AdamW(learning_rate=0.003 * rate, betas=(0.9, 0.98), weight_decay=0.0)
        optimizer = Muon(learning_rate=0.02 * rate, weight_decay=0.01, rest=rest)
    return TrainingConfig(
        max_steps=steps,
        mixed_precision="bf16" if native else "no",
        optimizer=optimizer,
        schedule=Cosine(warmup=min(100, steps // 10), final=0.01),
        ema=min(0.998, 1 - 10 / max(steps, FEWEST)),
        save_steps=save_steps,
        sample_steps=sample_steps,
        logging_steps=logging_steps,
        seed=seed,
    )
