"""The loss of `labels`: masked diffusion, by the objective that our own training loop minimizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmdlm.core.denoiser import Denoiser
from mmdlm.core.diffusion.forward import Absorbing, Corruption
from mmdlm.core.diffusion.schedule import Linear
from mmdlm.core.kv_cache import KVCache
from mmdlm.core.losses.objective import Objective
from mmdlm.core.sequence import NO_DOCUMENT, Batch
from mmdlm.core.vocabulary import Modality, Vocabulary

IGNORED = -100  # in labels: this token is context


@dataclass(frozen=True)
class NoisyTargets:
    """The targets that labels name, with their noise.

    Attributes:
        batch: Clean tokens.
        corruption: The tokens that the model sees, and the weight of each masked one.
    """

    batch: Batch
    corruption: Corruption

    @classmethod
    def of(
        cls,
        ids: Tensor,
        labels: Tensor,
        vocabulary: Vocabulary,
        *,
        document: Tensor,
        position: Tensor,
        features: Tensor | None = None,
        slots: Tensor | None = None,
        loss_weight: Tensor | None = None,
        training: bool = True,
    ) -> NoisyTargets:
        """Lay out the targets, and mask some of them unless that was done.

        Args:
            ids: [B, L].
            labels: [B, L] clean ids at targets, -100 at context.
            vocabulary: Of the model. Ids outside of text and image codes are no targets.
            document: [B, L].
            position: [B, L] or [B, L, A].
            features: [F, D] of the slots.
            slots: [B, L] bool, where features stand; None: there are none.
            loss_weight: [B, L], with `ids` that hold the mask token at some targets already: what
                the cross-entropy of each of these counts. None: times and masks are drawn, by the
                random numbers of torch; outside of training by numbers that follow from the ids, so
                that a batch has the same loss each time.
            training: Whether the model is in training mode.

        Returns:
            The targets.

        Raises:
            ValueError: If the shapes differ.
        """
        if loss_weight is not None and loss_weight.shape != ids.shape:
            raise ValueError(
                f"loss_weight of shape {tuple(loss_weight.shape)} does not fit ids of "
                f"{tuple(ids.shape)}; give one for each token"
            )
        batch = clean_batch(
            ids,
            labels,
            vocabulary,
            document=document,
            position=position,
            features=features,
            slots=slots,
        )
        if loss_weight is None:
            generator = default_generator(ids.device) if training else _generator_of(batch.ids)
            objective = Objective(Absorbing(Linear()))
            return cls(batch, objective.corrupt(batch, vocabulary, generator=generator))
        masked = batch.target & (ids == vocabulary.mask_id)
        ones = torch.ones_like(loss_weight)
        return cls(
            batch,
            Corruption(
                x_t=ids,
                is_noised=masked,
                loss_mask=masked,
                t=ones,
                p_mask=ones,
                slope=ones,
                weight=loss_weight,
            ),
        )

    def loss(
        self,
        denoiser: Denoiser,
        hidden: Tensor,
        *,
        full_vocabulary: bool,
        count: Tensor | int | None = None,
    ) -> Tensor:
        """Return the loss, a scalar, from hidden states that predict their own positions.

        Args:
            denoiser: Has the head.
            hidden: [B, L, D] of `corruption.x_t`.
            full_vocabulary: Over all ids, not those of the position's modality.
            count: What the sum is divided by; None: the targets. Trainers that accumulate
                gradients count those of all their batches.

        Returns:
            A scalar, in nats for each of `count`.
        """
        objective = Objective(Absorbing(Linear()), full_vocabulary=full_vocabulary)
        terms = objective.terms(_WithStates(denoiser, hidden), self.batch, self.corruption)
        total = torch.stack([one.to(hidden.device) for one in terms.sums.values()]).sum()
        if count is None:
            count = torch.stack(list(terms.counts.values())).sum().clamp_min(1)
        return total / count


def clean_batch(
    ids: Tensor,
    labels: Tensor,
    vocabulary: Vocabulary,
    *,
    document: Tensor,
    position: Tensor,
    features: Tensor | None = None,
    slots: Tensor | None = None,
) -> Batch:
    """Return a batch whose targets are what labels name.

    Args:
        ids: As in `NoisyTargets.of`, all of them.
        labels: As there.
        vocabulary: As there.
        document: As there.
        position: As there.
        features: As there.
        slots: As there.

    Returns:
        The batch, clean.

    Raises:
        ValueError: If the shapes differ.
    """
    if labels.shape != ids.shape:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} do not fit ids of {tuple(ids.shape)}; give one "
            "for each token"
        )
    clean = torch.where(labels == IGNORED, ids, labels)
    modality = modality_of(clean, vocabulary)
    modality = modality.masked_fill(document == NO_DOCUMENT, int(Modality.CONTROL))
    if slots is not None:
        modality = modality.masked_fill(slots, int(Modality.FEATURE))
    generated = (modality == int(Modality.TEXT)) | (modality == int(Modality.IMAGE))
    return Batch(
        ids=clean,
        modality=modality,
        target=(labels != IGNORED) & generated,
        document=document,
        segment=document,
        position=position if position.ndim == 2 else position.amax(-1),
        features=features,
        axes=position if position.ndim == 3 else None,
    )


@dataclass(frozen=True)
class _WithStates:
    """A denoiser whose states are known: a pass that gives logits and a loss computes them once."""

    denoiser: Denoiser
    states: Tensor

    @property
    def vocabulary(self) -> Vocabulary:
        return self.denoiser.vocabulary

    def hidden(
        self,
        x_t: Tensor,
        batch: Batch,
        *,
        query_mask: Tensor | None = None,
        kv_cache: KVCache | None = None,
    ) -> Tensor:
        return self.states

    def logits_at(
        self, hidden: Tensor, positions: Tensor, *, ids: tuple[int, int] | None = None
    ) -> Tensor:
        return self.denoiser.logits_at(hidden, positions, ids=ids)

    def head_weight(self) -> Tensor | None:
        return self.denoiser.head_weight()


def modality_of(ids: Tensor, vocabulary: Vocabulary) -> Tensor:
    """[B, L] ids -> [B, L] int64, the modality whose range holds them."""
    found = torch.full_like(ids, int(Modality.CONTROL))
    for modality in (Modality.TEXT, Modality.IMAGE):
        start, stop = vocabulary.range(modality)
        found = found.masked_fill((ids >= start) & (ids < stop), int(modality))
    return found


def default_generator(device: torch.device) -> torch.Generator:
    """Return the generator that `torch.manual_seed` seeds."""
    if device.type == "cuda":
        torch.cuda.init()
        return torch.cuda.default_generators[device.index or 0]
    if device.type == "cpu":
        return torch.default_generator
    seed = torch.randint(2**63 - 1, ())
    return torch.Generator(device).manual_seed(int(seed))


def _generator_of(ids: Tensor) -> torch.Generator:
    """Return a generator whose seed follows from the ids [B, L] and their places."""
    place = torch.arange(1, ids.numel() + 1, device=ids.device).view(ids.shape)
    seed = int((ids * 2654435761 + place * 40503).mul(place).sum()) % 2**63
    return torch.Generator(ids.device).manual_seed(seed)
