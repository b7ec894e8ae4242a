"""Pretrain one denoiser on text -> image, image -> text and text, mixed in every batch.

`python -m train.pretrain --config configs/pretrain/emoji.yaml`, on several GPUs under
`accelerate launch -m`. Start it again after a kill and it continues.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.modeling_layers import GradientCheckpointingLayer

from data_pipelines.command_line import run
from data_pipelines.loader import build_loader
from data_pipelines.seen import see_through
from data_pipelines.source import Source
from mmdlm.core.forward import Corruption
from mmdlm.core.objective import Objective
from mmdlm.core.sequence import Batch
from mmdlm.core.vocabulary import Vocabulary
from mmdlm.decoding import GENERATION, Defaults
from mmdlm.models.pretrained import PretrainedDenoiser, load_denoiser
from mmdlm.models.transformer import MmdlmConfig, MmdlmForMaskedDiffusion
from mmdlm.vision.adapter import VisionAdapter, VisionConfig
from mmdlm.vision.image_tokenizer import ImageTokenizer, load_image_tokenizer
from mmdlm.vision.tower_weights import load_tower
from train.annealing import AttentionAnnealing
from train.checkpoint import replace_folder
from train.loop import FitSettings, Stage, fit, launched
from train.optimizer import Rates
from train.parts import Parts
from train.samples import SampleSheet


@dataclass(frozen=True)
class Shape:
    """Shape of a new Transformer; the fields are those of `MmdlmConfig`."""

    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    attention_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    text_slots: int | None = None


@dataclass(frozen=True)
class Data:
    """Where the samples come from and how they make a batch; see `build_loader`.

    batch_size  rows a batch, per process
    length      tokens a row
    packed      several documents a row
    """

    sources: list[Source]
    batch_size: int = 64
    length: int = 82
    packed: bool = False
    num_workers: int = 0
    shuffle_buffer: int = 4096
    max_broken: float = 0.01


@dataclass(frozen=True)
class Coefficients:
    """Weight of each modality in the loss."""

    text: float = 1.0
    image: float = 1.0


@dataclass(frozen=True)
class Noise:
    """What is drawn for a batch: its corruption, and how far to the right each row sees."""

    corruption: Corruption
    ahead: Tensor | None


class DenoisingStage(Stage):
    """A batch is corrupted, denoised, and scored by an objective."""

    def __init__(
        self,
        denoiser: PretrainedDenoiser,
        objective: Objective,
        coefficients: Coefficients,
        *,
        annealing: AttentionAnnealing | None = None,
        parts: Parts = Parts(),
    ) -> None:
        super().__init__()
        self.denoiser, self.objective, self.annealing = denoiser, objective, annealing
        self.parts = parts
        self.coefficients = asdict(coefficients)
        self.step = 0
        self._no_split_modules = denoiser._no_split_modules  # what accelerate shards apart

    def begin(self, step: int) -> None:
        """Where annealing is."""
        self.step = step

    def draw(self, batch: Batch, *, generator: torch.Generator) -> Noise:
        """Times and noise, then what annealing draws."""
        corruption = self.objective.corrupt(batch, self.denoiser.vocabulary, generator=generator)
        if self.annealing is None:
            return Noise(corruption, None)
        return Noise(corruption, self.annealing.ahead(batch, self.step, generator=generator))

    def counts(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        """As the objective's normalisers say."""
        return self.objective.counts(batch, noise.corruption)

    def forward(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        """Loss sums by modality. Pictures are looked at once, however many copies are masked."""
        batch = self.denoiser.see(replace(batch, ahead=noise.ahead))
        sums = self.objective.terms(self.denoiser, batch, noise.corruption).sums
        vision = getattr(self.denoiser, "vision", None)
        if vision is not None and batch.features is None:
            # Without pictures its gradient is zero, not absent: other processes may have some, and
            # would wait for it.
            sums["text"] = sums["text"] + _nothing(vision)
        return sums

    def rates(self) -> Rates:
        """Those of the parts."""
        return self.parts.rates(self.denoiser)

    def compile_layers(self) -> None:
        """One compiled layer serves the whole depth."""
        for module in self.denoiser.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.compile()


def _nothing(module: nn.Module) -> Tensor | float:
    """Zero, as a function of each trainable parameter."""
    return sum(0.0 * p.flatten()[0] for p in module.parameters() if p.requires_grad)


def main(
    out: Path,
    data: Data,
    text_tokenizer: Path,
    objective: Objective,
    *,
    image_tokenizer: Path | None = None,
    start_from: Path | None = None,
    model: Shape = Shape(),
    vision: VisionConfig | None = None,
    tower_weights: Path | None = None,
    parts: Parts = Parts(),
    coefficients: Coefficients = Coefficients(),
    annealing: AttentionAnnealing | None = None,
    fit_settings: FitSettings = FitSettings(),
    prompts: list[str] | None = None,
    decoding: Defaults | None = None,
    attention: Literal["sdpa", "flex_attention"] = "sdpa",
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    threads: int | None = None,
) -> None:
    """Train, and write the averaged weights with all that they need to `out`/final.

    Args:
        out: Folder of checkpoints, log and samples; a run found there is continued.
        data: What to train on.
        text_tokenizer: Folder of a transformers tokenizer with an end-of-text token.
        objective: Forward process, losses and times.
        image_tokenizer: Folder of the tokenizer that made the codes; none for text alone.
        start_from: Checkpoint to start from, in place of `model` and random weights; ours, of a
            published family, or what `mmdlm convert` made of an autoregressive model or an encoder.
        model: Shape of a new Transformer.
        vision: Adapter through which a new model sees, or one to start from that did not see yet.
        tower_weights: Folder of transformers' SigLIP or of an open_clip model, for the tower of
            `vision`; by default its weights are random.
        parts: Which parts of a model that sees stay frozen, and the learning rates of others.
        coefficients: Weight of each modality.
        annealing: How attention turns from causal to bidirectional, for weights of an
            autoregressive model; by default it is bidirectional at once.
        fit_settings: Steps, optimizer, checkpoints.
        prompts: What to draw (and caption back) on every sample sheet.
        decoding: Steps, guidance and temperatures that the final weights carry; by default they
            carry none, and the library's own are used.
        attention: Kernel; flex_attention for packed rows on a GPU.
        save_dtype: Of the final weights.
        threads: CPU threads; all by default.
    """
    if threads:
        torch.set_num_threads(threads)
    state = launched()
    if not (text_tokenizer / "tokenizer.json").is_file():
        raise ValueError(
            f"text_tokenizer {text_tokenizer}: no tokenizer.json there; correct the path, or train "
            "one with data_pipelines.text_tokenizer"
        )
    words = PreTrainedTokenizerFast.from_pretrained(text_tokenizer)
    pictures = load_image_tokenizer(image_tokenizer) if image_tokenizer else None
    denoiser = _denoiser(start_from, model, words, pictures, fit_settings.seed, attention)
    denoiser.config.full_vocabulary = objective.full_vocabulary
    if vision is not None:
        _open_eyes(denoiser, vision, tower_weights, seed=fit_settings.seed)
    elif tower_weights is not None:
        raise ValueError(f"tower_weights {tower_weights}: there is no `vision` that they are for")
    parts.freeze(denoiser)

    loader = build_loader(
        see_through(data.sources, getattr(denoiser, "vision", None)),
        denoiser.vocabulary,
        tokenizer=words,
        batch_size=data.batch_size,
        length=data.length,
        packed=data.packed,
        seed=fit_settings.seed,
        num_workers=data.num_workers,
        rank=state.process_index,
        world_size=state.num_processes,
        shuffle_buffer=data.shuffle_buffer,
        max_broken=data.max_broken,
        pin_memory=state.device.type == "cuda" and data.num_workers > 0,
    )
    sheet = None
    if pictures is not None and prompts:
        sheet = SampleSheet(denoiser, words, pictures, prompts, out / "samples")
    stage = DenoisingStage(denoiser, objective, coefficients, annealing=annealing, parts=parts)
    trained = fit(stage, loader, settings=fit_settings, out=out, on_sample=sheet)
    if state.is_main_process:
        weights = {name.removeprefix("denoiser."): value for name, value in trained.items()}
        final = out / "final"
        save(denoiser, weights, words, image_tokenizer, final, dtype=save_dtype, decoding=decoding)
        print(f"trained weights: {final}")


def save(
    denoiser: PretrainedDenoiser,
    weights: dict[str, Tensor],
    words: PreTrainedTokenizerFast,
    image_tokenizer: Path | None,
    folder: Path,
    *,
    dtype: str = "float32",
    decoding: Defaults | None = None,
) -> None:
    """Write all that `mmdlm.load` needs, beside and then renamed."""

    def write(part: Path) -> None:
        rounded = {name: tensor.to(getattr(torch, dtype)) for name, tensor in weights.items()}
        denoiser.save_pretrained(part, state_dict=rounded)
        words.save_pretrained(part)
        if image_tokenizer is not None:
            load_image_tokenizer(image_tokenizer).save_pretrained(part / "image_tokenizer")
        if decoding is not None:
            (part / GENERATION).write_text(json.dumps(asdict(decoding), indent=2) + "\n")

    replace_folder(folder, write)


def _denoiser(
    start_from: Path | None,
    shape: Shape,
    words: PreTrainedTokenizerFast,
    pictures: ImageTokenizer | None,
    seed: int,
    attention: str,
) -> PretrainedDenoiser:
    codes = pictures.codebook_size if pictures is not None else 0
    if start_from is not None:
        if not (start_from / "config.json").is_file():
            raise ValueError(f"start_from {start_from}: no config.json there; correct the path")
        # float32 whatever was stored: small steps would be lost in half precision
        denoiser = load_denoiser(start_from, attn_implementation=attention, dtype=torch.float32)
        known = denoiser.vocabulary
        given = (len(words), words.eos_token_id, codes)
        size = known.text[1] - known.text[0]
        if known.text[0] <= known.mask_id < known.text[1]:
            size = min(size, len(words))  # published embeddings have rows to spare
        if given != (size, known.eos_id - known.text[0], known.image_codes):
            raise ValueError(
                f"{start_from} has another vocabulary, {known}, than the tokenizers given, with "
                f"{len(words)} text ids, end of text {words.eos_token_id} and {codes} image codes; "
                "give those that it was trained with"
            )
        return denoiser
    if words.eos_token_id is None:
        raise ValueError("the text tokenizer has no end-of-text token; set its eos_token")
    vocabulary = Vocabulary.build(
        text_size=len(words),
        eos_id=words.eos_token_id,
        image_codes=codes,
    )
    config = MmdlmConfig(vocabulary=vocabulary.to_dict(), **asdict(shape))
    config._attn_implementation = attention
    with torch.random.fork_rng():  # the weights follow from the seed, the caller's state stays
        torch.manual_seed(seed)
        return MmdlmForMaskedDiffusion(config)


def _open_eyes(
    denoiser: PretrainedDenoiser, vision: VisionConfig, tower_weights: Path | None, *, seed: int
) -> None:
    """Give a model that does not see a vision adapter, whose projector is new."""
    if not isinstance(denoiser, MmdlmForMaskedDiffusion):
        raise ValueError("vision: an encoder of text takes no pictures; start from another model")
    if denoiser.vision is not None:
        raise ValueError(
            "vision: the model to start from sees already, with an adapter of its own; leave "
            "`vision` out"
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapter = VisionAdapter(vision, denoiser.config.hidden_size)
        if tower_weights is not None:
            load_tower(adapter.tower, tower_weights)
    denoiser.vision = adapter
    denoiser.config.vision = vision.to_dict()


if __name__ == "__main__":
    run(main)
