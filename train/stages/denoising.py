"""What the recipes that denoise documents share: data, stage, batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import prod

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from data_pipelines.room import check_batch
from data_pipelines.shards.loader import build_loader
from data_pipelines.shards.workers import Loader
from data_pipelines.sources.conversations import apply_chat_template
from data_pipelines.sources.image_text import expect_codes
from data_pipelines.sources.preferences import Preference
from data_pipelines.sources.source import NoLonger, Source
from data_pipelines.sources.vision_samples import attach_vision
from mmdlm.core.blocks import own_blocks
from mmdlm.core.diffusion.forward import Corruption
from mmdlm.core.losses.objective import Objective
from mmdlm.core.sequence import Batch
from mmdlm.core.vocabulary import GENERATED
from mmdlm.models.auto import PretrainedDenoiser
from mmdlm.models.compilation import compile_layers
from mmdlm.models.costs import Costs
from mmdlm.models.modeling import MmdlmForMaskedDiffusion
from mmdlm.pipeline.engine import Engine
from mmdlm.templates.auto import prompt_template_for
from mmdlm.templates.prompt_template import PromptTemplate
from mmdlm.templates.text_codec import TextCodec
from mmdlm.vision.tokenizers.base import ImageTokenizer
from train.optimizer import Rates
from train.stages.annealing import AttentionAnnealing
from train.stages.meter import Load
from train.stages.param_groups import Parts
from train.stages.stage import Stage


@dataclass(frozen=True)
class Data:
    """Where the samples come from and how they make a batch; see `build_loader`.

    Attributes:
        batch_size: Rows a batch, per process.
        length: Tokens a row; None: as many as the longest document has, see
            `train.stages.row_lengths`; conversations, which are cut or left out by it, need a
            number.
        packed: Several documents a row.
        num_workers: Processes that read ahead; None: two on a GPU, for which they pin their
            batches, and none elsewhere. A run goes on with as many as it was begun with, and each
            needs a sample of every source.
        urls: Shards in place of those of the only source, which is read as before: a recipe for
            data of one's own.
    """

    sources: list[Source]
    batch_size: int = 64
    length: int | None = None
    packed: bool = False
    num_workers: int | None = None
    shuffle_buffer: int = 4096
    max_broken: float = 0.01
    urls: str | list[str] | None = None

    def __post_init__(self) -> None:
        if self.urls is None:
            return
        if len(self.sources) != 1:
            raise ValueError(
                f"urls {self.urls} are for a recipe of one source, but it has "
                f"{len(self.sources)}; give the sources as a whole"
            )
        object.__setattr__(self, "sources", [replace(self.sources[0], urls=self.urls)])

    @property
    def row_length(self) -> int:
        """`length`, where it was given or has been settled."""
        assert self.length is not None
        return self.length


@dataclass(frozen=True)
class Coefficients:
    """Weight of each modality in the loss."""

    text: float = 1.0
    image: float = 1.0


@dataclass(frozen=True)
class Noise:
    """What is drawn for a batch.

    Attributes:
        lookahead: How far to the right each row sees.
        seed: Of the dropout, where there is any.
    """

    corruption: Corruption
    lookahead: Tensor | None
    seed: int | None = None


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
        """Draw times and noise, then what annealing and dropout need."""
        batch = own_blocks(self.denoiser, batch)
        corruption = self.objective.corrupt(batch, self.denoiser.vocabulary, generator=generator)
        lookahead = None
        if self.annealing is not None:
            lookahead = self.annealing.lookahead(batch, self.step, generator=generator)
        return Noise(corruption, lookahead, dropout_seed(self.denoiser, generator=generator))

    def counts(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        """As the objective's normalizations say."""
        return self.objective.counts(batch, noise.corruption)

    def forward(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        """Loss sums by modality. Images are looked at once, however many copies are masked."""
        with dropout(noise.seed, batch.ids.device):
            batch = self.denoiser.see(replace(batch, lookahead=noise.lookahead))
            sums = self.objective.terms(self.denoiser, batch, noise.corruption).sums
        vision = getattr(self.denoiser, "vision", None)
        if vision is not None and batch.features is None:
            # Without images its gradient is zero, not absent: other processes may have some, and
            # would wait for it.
            sums["text"] = sums["text"] + _nothing(vision)
        return sums

    def load(self, batch: Batch, noise: Noise) -> Load:
        """Of all copies that are masked; what a vision tower does is not counted."""
        return load_of(self.denoiser, batch, noise.corruption.loss_mask)

    def rates(self) -> Rates:
        """Those of the parts."""
        return self.parts.rates(self.denoiser)

    def compile_layers(self) -> None:
        """One compiled layer serves the whole depth."""
        compile_layers(self.denoiser)


def load_of(denoiser: PretrainedDenoiser, batch: Batch, read: Tensor) -> Load:
    """Return the tokens and operations of a step on a batch.

    Args:
        denoiser: The model.
        batch: Of the step.
        read: [B, L] bool, the tokens whose logits are wanted; [K B, L] for K copies of the batch.

    Returns:
        The tokens of all copies; operations only of a model of ours.
    """
    copies = len(read) // len(batch)
    batch = own_blocks(denoiser, batch)
    tokens = copies * int((~batch.is_padding).sum())
    targets = int(batch.target.sum())  # copies are complementary: each covers its own
    if not isinstance(denoiser, MmdlmForMaskedDiffusion):
        return Load(tokens, targets)
    rows, length = batch.ids.shape
    place = batch.document + length * torch.arange(rows, device=batch.document.device)[:, None]
    documents = torch.bincount(place[~batch.is_padding])
    modality = batch.modality.to(read.device, non_blocking=True).repeat(copies, 1)
    head = sum(
        (read & (modality == kind)).sum() * (stop - start)  # not asked for before it is logged
        for kind in GENERATED
        for start, stop in [denoiser.vocabulary.range(kind)]
    )
    beside_clean = 1 if batch.block is None else 2  # copies of a row; together they see about as
    flops = Costs(denoiser.config).training(  # many pairs as one that sees all of itself
        tokens=beside_clean * tokens,
        pairs=copies * int(documents.square().sum()),
        head=head,
        learning=_share_that_learns(denoiser.model.layers),
        head_learns=any(p.requires_grad for p in denoiser.lm_head.parameters()),
    )
    return Load(tokens, targets, flops)


def _share_that_learns(module: nn.Module) -> float:
    parameters = list(module.parameters())
    learning = sum(p.numel() for p in parameters if p.requires_grad)
    return learning / max(1, sum(p.numel() for p in parameters))


def _nothing(module: nn.Module) -> Tensor | float:
    """Zero, as a function of each trainable parameter."""
    return sum(0.0 * p.flatten()[0] for p in module.parameters() if p.requires_grad)


def dropout_seed(denoiser: nn.Module, *, generator: torch.Generator) -> int | None:
    """Draw a seed for `dropout`; return None, and draw nothing, where a model has none."""
    if not any(isinstance(one, nn.Dropout) and one.p > 0 for one in denoiser.modules()):
        return None
    return int(torch.randint(1 << 62, (), generator=generator, device=generator.device))


@contextmanager
def dropout(seed: int | None, device: torch.device) -> Iterator[None]:
    """Within the block dropout follows from a seed; torch knows no generator for it."""
    if seed is None:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


# ---- data ---------------------------------------------------------------------------------------


def prompt_template_for_denoiser(
    denoiser: PretrainedDenoiser, *, asked: bool = False
) -> PromptTemplate:
    """Return the prompt template of a model: that of its family, where it was published.

    Args:
        denoiser: The model.
        asked: Restrict it to tasks that the model was trained for, as in inference.

    Returns:
        The template.
    """
    family = (getattr(denoiser.config, "published", None) or {}).get("family")
    tasks = denoiser.config.trained_tasks if asked else None
    return prompt_template_for(
        family, seeing=getattr(denoiser, "vision", None) is not None, tasks=tasks
    )


def positions_of(denoiser: PretrainedDenoiser, prompt_template: PromptTemplate) -> int:
    """Return the tokens of the longest document that a model takes, as where it is asked."""
    return max(denoiser.config.max_position_embeddings, prompt_template.longest)


def words_for(
    denoiser: PretrainedDenoiser,
    tokenizer: PreTrainedTokenizerFast,
    images: ImageTokenizer | None = None,
) -> TextCodec:
    """Return the tokenizer over the vocabulary of a model, the same as in inference.

    Raises ValueError where they do not fit.
    """
    config = denoiser.config
    engine = Engine(
        denoiser,
        tokenizer,
        images,
        text_slots=getattr(config, "text_slots", None),
        max_length=config.max_position_embeddings,
        prompt_template=prompt_template_for_denoiser(denoiser),
    )
    return engine.codec


def read_sources(
    data: Data, denoiser: PretrainedDenoiser, codec: TextCodec, prompt_template: PromptTemplate
) -> list[Source]:
    """Return the sources of a data section with the vision and the template of the model.

    Raises ValueError for what the model cannot see, and for rows that it has no positions or no
    memory for. Documents that share a row have positions each: of those, one that is too long is no
    good.
    """
    most = positions_of(denoiser, prompt_template)
    if data.length is None:
        raise ValueError(
            "data.length is null, but conversations are cut or left out by the length of a row; "
            f"give it a number, up to the {most} tokens that the model takes"
        )
    shared = data.packed or all(isinstance(one.to_sequence, Preference) for one in data.sources)
    if data.length > most and not shared:
        raise ValueError(
            f"data.length is {data.length}, but the model takes {most} tokens at most "
            "(max_position_embeddings); shorten the rows, or give a new model as many positions"
        )
    _check_rows(data, denoiser)
    sources = data.sources
    if codec.grid is not None:
        sources = expect_codes(sources, prod(codec.grid))
    spoken = apply_chat_template(
        sources, prompt_template, codec, length=data.length, packed=data.packed
    )
    seen = attach_vision(spoken, getattr(denoiser, "vision", None))
    if data.length <= most:
        return seen
    return [replace(one, to_sequence=NoLonger(one.to_sequence, most)) for one in seen]


def _check_rows(data: Data, denoiser: PretrainedDenoiser) -> None:
    """Raise ValueError for a batch whose states no memory holds."""
    device, states = PartialState().device, 0
    if isinstance(denoiser, MmdlmForMaskedDiffusion):
        numbers = Costs(denoiser.config).states(data.batch_size * data.row_length)
        states = numbers * (2 if device.type == "cuda" else 4)
    check_batch(data.batch_size, data.row_length, states=states, device=device)


def load_batches(
    data: Data, sources: list[Source], codec: TextCodec, *, seed: int, process: PartialState
) -> Loader:
    """Batches of this process; see `build_loader`."""
    return build_loader(
        sources,
        codec.vocabulary,
        tokenizer=codec.tokenizer,
        batch_size=data.batch_size,
        length=data.row_length,
        packed=data.packed,
        seed=seed,
        num_workers=data.num_workers,
        rank=process.process_index,
        world_size=process.num_processes,
        shuffle_buffer=data.shuffle_buffer,
        max_broken=data.max_broken,
        pin_memory=process.device.type == "cuda",
    )
