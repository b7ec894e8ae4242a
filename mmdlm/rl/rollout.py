"""What a sampler produced for a batch of prompts, and how it came to it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from mmdlm.core.denoiser import Denoiser
from mmdlm.core.sampling.sampler import Sampler
from mmdlm.core.sequence import Batch
from mmdlm.core.vocabulary import GENERATED, Modality
from mmdlm.rl.statistics import Statistics


@dataclass(frozen=True)
class Rollout:
    """A batch whose targets a sampler filled, one rollout a row.

    Attributes:
        batch: The prompts with the answers' ids filled in; targets are all places of an answer.
            What a text has behind its end and was never committed holds the end of a text.
        steps: [B, L] int64, the step at which each target was committed, -1 elsewhere.
        log_prob: [B, L] of the committed token when it was committed, see `SampleStep`; 0
            elsewhere.
        scored: [B, L] bool, the targets that a loss is about: committed, and of a text nothing
            behind the end of its segment.
        ended: [B] bool, whether the last text of the row came to its end; true without a text.
    """

    batch: Batch
    steps: Tensor
    log_prob: Tensor
    scored: Tensor
    ended: Tensor

    @classmethod
    def sample(
        cls,
        sampler: Sampler,
        denoiser: Denoiser,
        batch: Batch,
        *,
        generator: torch.Generator,
        ends: tuple[int, ...] | None = None,
        tail: int = 0,
        unconditional: Batch | tuple[Batch, ...] | None = None,
    ) -> Rollout:
        """Fill the targets of a batch of prompts of any lengths; `batch.rows` repeats a prompt.

        Images are to be looked at before, so that they are features.

        Args:
            sampler: Fills the targets.
            denoiser: The policy.
            batch: Prompts as context, completions as targets.
            generator: Random numbers.
            ends: Ids that end a text, themselves scored. Default: the sampler's `stop_ids`, at
                which it stops early as well, or else the end of a text, at which it does not.
            tail: So many committed tokens behind an end are scored, too (TraceRL's post_num), so
                that a model goes on knowing what stands there.
            unconditional: Batches without the prompt, for guidance; None: made of `batch`.

        Returns:
            One rollout a row.
        """
        vocabulary = denoiser.vocabulary
        out = sampler(denoiser, batch, generator=generator, unconditional=unconditional)
        ends = ends or sampler.stop_ids or (vocabulary.eos_id,)
        text = batch.target & batch.of(Modality.TEXT)
        committed = batch.target & (out.steps >= 0)
        end = text & committed & torch.isin(out.ids, torch.tensor(ends, device=out.ids.device))
        ended_before = _before(end, batch.segment)
        after_end = text & (ended_before > 0)
        far = after_end & (_before(after_end, batch.segment) >= tail)
        last = batch.segment.masked_fill(~text, -1).amax(1, keepdim=True)
        return cls(
            batch=replace(
                batch, ids=out.ids.masked_fill(after_end & ~committed, vocabulary.eos_id)
            ),
            steps=out.steps,
            log_prob=out.log_prob,
            scored=committed & ~far,
            ended=~text.any(1) | (end & (batch.segment == last)).any(1),
        )

    def __len__(self) -> int:
        return len(self.batch)

    def rows(self, index: Tensor) -> Rollout:
        """Select some of the rollouts, [N] int64: a micro-batch."""
        taken = {f.name: getattr(self, f.name)[index] for f in fields(self) if f.name != "batch"}
        return Rollout(batch=self.batch.rows(index), **taken)

    @property
    def lengths(self) -> Tensor:
        """[B] int64, scored tokens of each row."""
        return self.scored.sum(1)

    def answers(self, modality: Modality = Modality.TEXT) -> list[Tensor]:
        """Return the scored ids [n] of each row in reading order: text with its end, or codes."""
        assert modality in GENERATED, f"{modality.name} holds no answers"
        of_modality = self.scored & self.batch.of(modality)
        return [ids[where] for ids, where in zip(self.batch.ids, of_modality, strict=True)]

    def statistics(self) -> Statistics:
        """Lengths under TRL's names; `completions/clipped_ratio` is the share without an end."""
        lengths, ended = self.lengths.float(), self.ended
        means = Statistics.means(
            mean_length=(lengths, None),
            mean_terminated_length=(lengths, ended),
            clipped_ratio=((~ended).float(), None),
        )
        least = {"min_length": lengths.amin()} if len(lengths) else {}
        most = {"max_length": lengths.amax()} if len(lengths) else {}
        if bool(ended.any()):
            least["min_terminated_length"] = lengths[ended].amin()
            most["max_terminated_length"] = lengths[ended].amax()
        every = means + Statistics(least=least, most=most)
        return every.named({name: f"completions/{name}" for part in every.parts for name in part})


def _before(marked: Tensor, segment: Tensor) -> Tensor:
    """[B, L] how many marked places of the same segment come before each."""
    before = marked.long().cumsum(1) - marked.long()
    # Counts never fall along a row, so that the least of a segment is what came before it.
    at_start = torch.zeros_like(before).scatter_reduce(
        1, segment.clamp_min(0), before, "amin", include_self=False
    )
    return before - at_start.gather(1, segment.clamp_min(0))
