"""The steps of a run over one's own images: words, image tokenizer, codes, model.

Each is the recipe or the job that is there for it, with values that follow from the images and the
time, and each continues where it was.
"""

from __future__ import annotations

import io
import json
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from data_pipelines import text_tokenizer, tokenize_images
from data_pipelines.sources.image_set import (
    HELD_OUT,
    PARTS,
    TRAIN,
    Pair,
    Summary,
    part_captions,
    some_pairs,
    spread,
)
from data_pipelines.sources.image_text import ImageText
from data_pipelines.sources.source import Source
from data_pipelines.text_tokenizer import shortened, token_counts
from mmdlm.models.special_tokens import of_text_only
from mmdlm.pipeline.hub import find_checkpoint
from mmdlm.pipeline.model import Model
from mmdlm.vision.pixels import to_image, to_pixels
from mmdlm.vision.tokenizers.base import ImageTokenizer
from train import image_tokenizer, pretrain
from train.image_folder.plan import (
    BATCH,
    BUNDLED_SLOTS,
    DECODING,
    MODEL_SHARE,
    OBJECTIVE,
    TASKS,
    TOKENIZER_BATCH,
    TOKENIZER_SHARE,
    Choice,
    Grid,
    Pace,
    Plan,
    StageName,
    Start,
    choose,
    settings_for,
    training,
)
from train.image_folder.run_page import RunPage, Shown, held_out_losses, psnr
from train.log import LOG
from train.loop import launched
from train.stages.denoising import Data
from train.stages.model_config import ModelConfig
from train.stages.row_lengths import row_length, slots_for
from train.training_config import TrainingConfig

Train = Callable[[Path, TrainingConfig, Callable[[int, Any], None]], None]
Look = Callable[[RunPage, int, Any], None]
BUNDLED = find_checkpoint("emoji")
SHOWN = {HELD_OUT: 8, TRAIN: 4}  # images that each look shows
TRIAL, WARM_UP = 12, 4  # steps of a trial, and how many of them are not timed
WEIGHT = "json.sampling_weight"  # of an image, see `image_set.split`
LOOKED_AT = 256  # held-out images whose reconstruction is measured, at most


@dataclass(frozen=True)
class OwnRun:
    """A run in the folder `out`, where its images lie in data/ already, see `image_set.split`.

    Attributes:
        title: Of its page and of the model.
        hours: For all of it.
        start: What was asked for to start from.
        prompts: What is drawn beside captions of the images.
    """

    out: Path
    grid: Grid
    title: str
    hours: float
    start: Start
    prompts: tuple[str, ...]
    seed: int

    @cached_property
    def plan(self) -> Plan:
        """Return what was decided so far."""
        return Plan(self.out / "plan.json")

    @property
    def data(self) -> Path:
        """Return the folder of the images, train and held_out."""
        return self.out / "data"

    @property
    def final(self) -> Path:
        """Return the folder of the trained model."""
        return self.out / "model" / "final"

    @property
    def usage(self) -> str:
        """Return the command that draws with the model."""
        caption, model = shlex.quote(self.shown[0].caption), shlex.quote(str(self.final))
        return f"python -m mmdlm.cli draw {caption} --model {model} -o out.png"

    @cached_property
    def summary(self) -> Summary:
        """Return the summary of the images."""
        return Summary.read(self.data)

    @cached_property
    def pairs(self) -> dict[str, list[Pair]]:
        """Return some images with captions of each part."""
        return {part: some_pairs(self.data / part, LOOKED_AT) for part in PARTS}

    # ---- 2: words --------------------------------------------------------------------------------

    @cached_property
    def choice(self) -> Choice:
        """Return what the run starts from and how large the model is."""

        def decide() -> dict[str, str | int]:
            bundled = of_text_only(PreTrainedTokenizerFast.from_pretrained(BUNDLED))
            return asdict(
                choose(
                    self.start,
                    self.grid,
                    images=self.summary.train,
                    lengths=token_counts(bundled, part_captions(self.data / TRAIN)),
                    seconds=MODEL_SHARE * 3600 * self.hours,
                    device=launched().device,
                )
            )

        return Choice(**self.plan.once("choice", decide))

    @property
    def from_bundled(self) -> bool:
        """Return whether the run starts from the bundled model."""
        return self.choice.start == "emoji"

    @property
    def words(self) -> Path:
        """Return the folder of the text tokenizer."""
        return BUNDLED if self.from_bundled else self.out / "text_tokenizer"

    def learn_words(self) -> None:
        """Train the text tokenizer, and decide how many tokens a caption may have (step 2)."""
        if not self.from_bundled:
            text_tokenizer.main(str(self.data / TRAIN), self.words)
        lengths = token_counts(self.tokenizer, part_captions(self.data / TRAIN))
        most = BUNDLED_SLOTS if self.from_bundled else slots_for(max(lengths) + 1, cut=True)
        slots = self.plan.once("text_slots", lambda: most)
        if cut := sum(length >= slots for length in lengths):
            print(f"{cut} of {len(lengths)} captions are longer than {slots - 1} tokens, and cut")
        for prompt, short in zip(self.prompts, self.fitting(self.prompts), strict=True):
            if short != prompt:
                raise ValueError(
                    f"prompt {prompt[:60]!r} is longer than the {slots - 1} tokens that captions "
                    "of these images may have; give a shorter one"
                )
        if self.plan.once("prompts", lambda: list(self.prompts)) != list(self.prompts):
            raise ValueError(
                f"{self.out} was begun with prompts {self.plan.decided['prompts']}; give the same, "
                "or name another --out"
            )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return the text tokenizer."""
        return of_text_only(PreTrainedTokenizerFast.from_pretrained(self.words))

    def fitting(self, captions: Sequence[str]) -> list[str]:
        """Return captions, cut as in training where they are too long for the model."""
        most = self.plan.decided["text_slots"] - 1
        return [shortened(self.tokenizer, caption, most) for caption in captions]

    @cached_property
    def shown(self) -> list[Shown]:
        """Return what each look draws: captions of both parts, then the prompts."""
        found = []
        for part, count in SHOWN.items():
            pairs = spread({pair.caption: pair for pair in self.pairs[part]}.values(), count)
            captions = self.fitting([pair.caption for pair in pairs])
            kind = part.replace("_", " ")
            found += [
                Shown(caption, pair.image, kind)
                for caption, pair in zip(captions, pairs, strict=True)
            ]
        return [*found, *(Shown(prompt, None, "prompt") for prompt in self.prompts)]

    @cached_property
    def page(self) -> RunPage:
        """Return the page of the run."""
        real = [one for one in self.shown if one.image is not None]
        facts = {
            "The images": str(self.summary).splitlines(),
            "The plan": [self.choice.why, f"{self.hours:g} hours on this machine"],
        }
        return RunPage(
            self.out,
            title=self.title,
            facts=facts,
            shown={"image_tokenizer": real, "model": self.shown},
        )

    # ---- 3, 4: image tokenizer and codes ---------------------------------------------------------

    def train_tokenizer(self) -> None:
        """Train the image tokenizer (step 3)."""
        spent = self.plan.decided["seconds_of_reading"]
        seconds = TOKENIZER_SHARE[self.choice.start] * (3600 * self.hours - spent)

        def train(folder: Path, settings: TrainingConfig, look: Callable[..., None]) -> None:
            image_tokenizer.main(
                folder,
                image_tokenizer.Images(
                    str(self.data / TRAIN),
                    batch_size=TOKENIZER_BATCH,
                    fit="pad",
                    sampling_weight=WEIGHT,
                ),
                model=(
                    image_tokenizer.TokenizerConfig(BUNDLED / "image_tokenizer")
                    if self.from_bundled
                    else image_tokenizer.TokenizerConfig(options=self.grid.tokenizer)
                ),
                training=settings,
                on_sample=look,
            )

        self._train("image_tokenizer", train, self._look_at_tokenizer, seconds)

    @torch.no_grad()
    def _look_at_tokenizer(self, page: RunPage, step: int, tokenizer: ImageTokenizer) -> None:
        """Reconstruct what is shown, and all held-out images."""
        device = next(tokenizer.parameters()).device
        real = [to_pixels(one.image) for one in self.shown if one.image is not None]
        again = [to_image(one) for one in tokenizer.reconstruct(torch.stack(real).to(device))[0]]
        held_out = [pair.image for pair in self.pairs[HELD_OUT]]
        page.add("image_tokenizer", step, again, {"PSNR, dB": psnr(tokenizer, held_out)})

    def encode(self) -> None:
        """Encode the images (step 4)."""
        began = time.monotonic()
        for part in PARTS:
            tokenize_images.main(
                str(self.data / part),
                self.out / "image_tokenizer" / "final",
                self.out / "codes" / part,
            )
        self.plan.once("seconds_of_encoding", lambda: time.monotonic() - began)

    # ---- 5: model --------------------------------------------------------------------------------

    def _model_data(self, part: str, batch_size: int) -> Data:
        slots = self.plan.decided["text_slots"]
        source = Source(
            str(self.out / "codes" / part),
            ImageText(tasks=TASKS, text_slots=slots, text="json.captions", cut_long_text=True),
            sampling_weight=WEIGHT if part == TRAIN else None,
        )
        return Data([source], batch_size=batch_size, length=row_length(self.grid.codes, slots))

    def train_model(self) -> None:
        """Train the model (step 5)."""
        decided = self.plan.decided
        spent = decided["seconds_of_reading"] + decided["seconds_of_encoding"]
        tokenizer = decided["image_tokenizer"]["steps"] * decided["image_tokenizer_pace"]["step"]
        seconds = MODEL_SHARE * 3600 * self.hours - spent - tokenizer
        data = self._model_data(TRAIN, BATCH)
        shape = self.choice.shape(length=data.row_length, text_slots=decided["text_slots"])

        def train(folder: Path, settings: TrainingConfig, look: Callable[..., None]) -> None:
            pretrain.main(
                folder,
                data,
                OBJECTIVE,
                model=ModelConfig(
                    start_from=str(BUNDLED) if self.from_bundled else None,
                    shape=None if self.from_bundled else shape,
                    text_tokenizer=self.words,
                    image_tokenizer=self.out / "image_tokenizer" / "final",
                ),
                training=settings,
                on_sample=look,
                generation_config=DECODING,
            )

        self._train("model", train, self._look_at_model, seconds)

    def _look_at_model(self, page: RunPage, step: int, model: Model) -> None:
        """Draw what is shown, and measure the loss on held-out images and captions."""
        captions = [one.caption for one in self.shown]
        generator = torch.Generator(model.device).manual_seed(self.seed)
        drawn = model.text_to_image(captions, generator=generator)
        page.add("model", step, drawn, self.held_out_losses(model))

    def held_out_losses(self, model: Model) -> dict[str, float]:
        """Return the loss of text and of images, in nats a token."""
        data = self._model_data(HELD_OUT, min(BATCH, self.summary.held_out))
        return held_out_losses(model, OBJECTIVE, data, seed=self.seed)

    # ---- both stages -----------------------------------------------------------------------------

    def _train(self, stage: StageName, train: Train, look: Look, seconds: float) -> None:
        """Train a stage for so long, at the pace of a trial."""
        pace = Pace(**self.plan.once(f"{stage}_pace", lambda: self._trial(stage, train, look)))
        images, learned = self.summary.train, self.from_bundled
        settings = self.plan.once(
            stage,
            lambda: settings_for(stage, pace, seconds=seconds, images=images, learned=learned),
        )
        minutes = settings["steps"] * pace.step / 60
        print(f"{settings['steps']} steps of {pace.step:.2f} seconds: {minutes:.1f} minutes")
        ready = training(stage, **settings, seed=self.seed)

        def shown(step: int, trained: Any) -> None:
            if step:  # the trial has looked already
                look(self.page, step, trained)

        train(self.out / stage, ready, shown)

    def _trial(self, stage: StageName, train: Train, look: Look) -> dict[str, float]:
        """Measure the seconds of a step and of a look, in a few steps that are thrown away."""
        every = {"sample_steps": TRIAL, "save_steps": TRIAL, "logging_steps": 1}
        settings = training(stage, steps=TRIAL, **every, rate=1.0, seed=self.seed)
        looks = []
        with tempfile.TemporaryDirectory(prefix=".trial_", dir=self.out) as name:
            page = replace(self.page, out=Path(name))

            def timed(step: int, trained: Any) -> None:
                if not step:
                    return
                began = time.monotonic()
                look(page, step, trained)
                looks.append(time.monotonic() - began)

            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                train(page.out / stage, settings, timed)
            lines = (page.out / stage / LOG).read_text().splitlines()
        steps = [json.loads(line)["seconds"] for line in lines[WARM_UP:]]
        return {"step": median(steps), "look": max(looks)}
