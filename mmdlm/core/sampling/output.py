"""Hold what a sampler gives: the state after each denoising step, and the result of a run."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SampleStep:
    """The state after one denoising step.

    Attributes:
        ids: [B, L] committed and given tokens; noise where a target is still open.
        committed: [B, L] bool, targets committed so far.
        step: 0, 1, ...; at most `steps` of them, fewer if everything was committed before.
        steps: Denoising steps of the run.
        log_prob: [B, L] of each committed token when it was committed, 0 elsewhere: under the
            model's guided logits over the ids that can be drawn (`Sampler.undrawable`), at
            temperature 1 and before top-k and top-p, whatever it was drawn by.
    """

    ids: Tensor
    committed: Tensor
    step: int
    steps: int
    log_prob: Tensor


@dataclass(frozen=True)
class SampleOutput:
    """The result of a run.

    Attributes:
        ids: [B, L] the ids of the batch with the targets filled.
        steps: [B, L] the step at which each target was committed (for good); -1 elsewhere, and
            where the mask token was drawn for good or the row was stopped before.
        log_prob: [B, L] of each of these tokens when it was committed, see `SampleStep`; 0
            elsewhere.
    """

    ids: Tensor
    steps: Tensor
    log_prob: Tensor
