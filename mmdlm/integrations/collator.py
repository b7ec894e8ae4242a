"""Turn tokenized examples into noisy batches, for `transformers.Trainer` and its kin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.core.diffusion.forward import Absorbing
from mmdlm.core.diffusion.schedule import Linear
from mmdlm.core.losses.objective import Objective
from mmdlm.core.losses.token_losses import WeightedCrossEntropy
from mmdlm.core.sequence import NO_DOCUMENT, concatenate
from mmdlm.core.vocabulary import Modality, Vocabulary
from mmdlm.models.noisy_targets import IGNORED, clean_batch

# LLaDA's: no weight is above 1,000. Source: arXiv:2502.09992, section 2.2.
OBJECTIVE = Objective(Absorbing(Linear(eps=1e-3)))
_MASKS = ("completion_mask", "assistant_masks")  # 1 at targets, as TRL and transformers call them


@dataclass(frozen=True)
class MaskedDiffusionCollator:
    """Pad examples to one length, and mask some of their targets.

    An example has `input_ids`, and its targets as `labels` (-100 at context), or as
    `completion_mask` or `assistant_masks` (1 at targets); without these all of it is target.
    Images of an example are what the processor made: `pixel_values`, `image_sizes`,
    `mm_token_type_ids`.

    A batch has `input_ids` with the mask token at some targets, `labels` with the clean id of each
    target, `attention_mask`, and `loss_weight`, what the cross-entropy of each masked target
    counts. The model's loss of it is that of `objective`, in nats for each target.

    Args:
        vocabulary: Of the model: `model.vocabulary`.
        objective: Draws times and masks, and weighs them. Its sums are divided by the targets.
        noise: False: leave the targets as they are, with no `loss_weight`. The model masks them
            itself, outside of training by the same random numbers each time: for evaluation.
        max_length: Cut examples to so many tokens; None: do not.
        pad_to_multiple_of: Pad rows to a multiple of so many tokens.
        fill_with_eos: Pad examples that end in a target with ends of text that are targets, too, as
            LLaDA's fine-tuning does, so that a model learns to write short answers into long room.
        rank: Of the process, so that each draws other masks.
    """

    vocabulary: Vocabulary
    objective: Objective = OBJECTIVE
    noise: bool = True
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    fill_with_eos: bool = False
    rank: int = 0

    def __post_init__(self) -> None:
        """Check that the loss of the batches is the objective's."""
        _check_objective(self.objective)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate examples.

        Args:
            examples: Tokenized ones.

        Returns:
            The batch.

        Raises:
            ValueError: If there are none, or for an example without `input_ids` or with a mask of
                another length.
        """
        if not examples:
            raise ValueError("MaskedDiffusionCollator: no examples")
        rows = [self._row(example) for example in examples]
        length = max(len(ids) for ids, _ in rows)
        if self.pad_to_multiple_of is not None:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        padded = [self._padded(ids, labels, length) for ids, labels in rows]
        ids, labels, real = (torch.stack(parts) for parts in zip(*padded, strict=True))
        batch = {"input_ids": ids, "labels": labels, "attention_mask": real.long()}
        batch |= _images(examples, length)
        return self._noisy(batch) if self.noise else batch

    def _row(self, example: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the ids [L] and labels [L] of an example."""
        if "input_ids" not in example:
            raise ValueError(
                f"an example has no input_ids, but {', '.join(example) or 'nothing'}; tokenize it "
                "first, or give the data set to MaskedDiffusionTrainer, which does"
            )
        ids = torch.as_tensor(example["input_ids"], dtype=torch.int64)
        labels = ids
        if example.get("labels") is not None:
            labels = torch.as_tensor(example["labels"], dtype=torch.int64)
        for name in _MASKS:
            if example.get(name) is not None:
                marks = torch.as_tensor(example[name])
                _check_length(name, marks, ids)
                labels = torch.where(marks.bool(), labels, IGNORED)
        _check_length("labels", labels, ids)
        if example.get("attention_mask") is not None:
            real = torch.as_tensor(example["attention_mask"]).bool()
            _check_length("attention_mask", real, ids)
            ids, labels = ids[real], labels[real]
        return ids[: self.max_length], labels[: self.max_length]

    def _padded(self, ids: Tensor, labels: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pad ids and labels to a length; return them, and which tokens are real."""
        missing, real = length - len(ids), torch.ones(length, dtype=torch.bool)
        fills = self.fill_with_eos and len(labels) > 0 and bool(labels[-1] != IGNORED)
        filler = self.vocabulary.eos_id if fills else self.vocabulary.pad_id
        if not fills:
            real[len(ids) :] = False
        label = filler if fills else IGNORED
        return (
            torch.cat([ids, ids.new_full((missing,), filler)]),
            torch.cat([labels, labels.new_full((missing,), label)]),
            real,
        )

    def _noisy(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Mask some targets."""
        real = batch["attention_mask"]
        clean = clean_batch(
            batch["input_ids"],
            batch["labels"],
            self.vocabulary,
            document=torch.where(real.bool(), 0, NO_DOCUMENT),
            position=(real.cumsum(-1) - 1).clamp(min=0),
        )
        seed = (int(torch.randint(2**62, ())) + 1_000_003 * self.rank) % 2**62
        generator = torch.Generator().manual_seed(seed)
        corruption = self.objective.corrupt(clean, self.vocabulary, generator=generator)
        copies = len(corruption.x_t) // len(clean)
        if copies > 1:
            clean = concatenate([clean] * copies)
            batch = {name: torch.cat([one] * copies) for name, one in batch.items()}
        weight = torch.zeros_like(corruption.weight)
        parts = ((Modality.TEXT, self.objective.text), (Modality.IMAGE, self.objective.image))
        for modality, part in parts:
            here = corruption.loss_mask & clean.of(modality)
            weight = torch.where(here, part.weighting(clean, corruption), weight)
        return {**batch, "input_ids": corruption.x_t, "loss_weight": weight}


def _check_objective(objective: Objective) -> None:
    """Raise ValueError for a loss that `loss_weight` cannot say."""
    parts = {Modality.TEXT: objective.text, Modality.IMAGE: objective.image}
    for modality, part in parts.items():
        process = objective.process.of(modality)
        if type(part.loss) is not WeightedCrossEntropy or part.loss_normalization != "token":
            raise ValueError(
                f"MaskedDiffusionCollator: the {modality.name.lower()} loss is {part}, but a "
                "Trainer sums a weighted cross-entropy and divides it by the targets; take "
                "WeightedCrossEntropy and 'token', or our own train.sft"
            )
        if not isinstance(process, Absorbing):
            raise ValueError(
                f"MaskedDiffusionCollator: {type(process).__name__} puts other noise than the mask "
                "token; take Absorbing, or our own train.sft"
            )


def _check_length(name: str, values: Tensor, ids: Tensor) -> None:
    if values.shape != ids.shape:
        raise ValueError(
            f"an example has {len(ids)} input_ids, but {name} of shape {tuple(values.shape)}; give "
            "one for each token"
        )


def _images(examples: Sequence[Mapping[str, Any]], length: int) -> dict[str, Tensor]:
    """Return the images of examples, one after the other; nothing where none has any."""
    crops, sizes, counts = [], [], []
    slots = torch.zeros(len(examples), length, dtype=torch.int64)
    for row, example in enumerate(examples):
        if example.get("pixel_values") is None:
            counts.append(0)
            continue
        crops.append(torch.as_tensor(example["pixel_values"]))
        sizes.append(torch.as_tensor(example["image_sizes"]).view(-1, 2))
        counts.append(len(sizes[-1]))
        marks = torch.as_tensor(example["mm_token_type_ids"])[:length]
        slots[row, : len(marks)] = marks
    if not crops:
        return {}
    height, width = (max(one.shape[axis] for one in crops) for axis in (2, 3))
    return {
        "pixel_values": torch.cat(
            [F.pad(one, (0, width - one.shape[3], 0, height - one.shape[2])) for one in crops]
        ),
        "image_sizes": torch.cat(sizes),
        "batch_num_images": torch.tensor(counts),
        "mm_token_type_ids": slots,
    }
