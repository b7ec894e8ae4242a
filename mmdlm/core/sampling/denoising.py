"""Hold rows between two denoising steps, so that rows can join, leave and share forward passes.

One step of several groups of rows, each with a sampler of its own:

    hidden = forward(groups)
    groups = [group.after(states) for group, states in zip(groups, hidden)]

`Sampler.trajectory` is this loop over one group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmdlm.core.host_masks import sent
from mmdlm.core.sampling.forward_passes import ForwardPasses, hidden_of, of_length
from mmdlm.core.sampling.generators import RowGenerators
from mmdlm.core.sampling.output import SampleStep
from mmdlm.core.sampling.row_state import RowState, SamplingRun, StepPlan

if TYPE_CHECKING:
    from mmdlm.core.sampling.sampler import Sampler


@dataclass(frozen=True)
class Denoising:
    """Rows that are filled by one sampler, between two of its steps.

    Attributes:
        sampler: Fills the rows.
        run: What stays the same in all steps.
        state: How far each row has come.
        plan: Of the next step.
        step: Steps since the first of the rows began.
    """

    sampler: Sampler
    run: SamplingRun
    state: RowState
    plan: StepPlan
    step: int = 0

    @classmethod
    def of(cls, sampler: Sampler, run: SamplingRun, state: RowState, *, step: int = 0) -> Denoising:
        """Plan the next step of some rows."""
        return cls(sampler, run, state, sampler.plan(run, state), step)

    def __len__(self) -> int:
        return len(self.state.x_t)

    @property
    def length(self) -> int:
        """Tokens of a row, padding included."""
        return self.state.x_t.shape[1]

    @property
    def is_separable(self) -> bool:
        """Whether rows may leave and others join: each draws for itself, and nothing is cached."""
        return self.run.generators.is_own and self.state.passes.kv_cache is None

    @cached_property  # a cache is copied where rows are dropped, and must not be copied twice
    def passes(self) -> ForwardPasses:
        """Forward passes of the rows that are not finished."""
        passes, cache = self.state.passes.only(self.plan.host.unfinished), self.sampler.cache
        if cache is not None and cache.grows:
            passes = passes.up_to(self.plan.host.columns, begins=self.step == 0)
        return passes

    def after(self, hidden: Tensor) -> Denoising:
        """Return the rows after one step, of whose states `forward` returned these.

        Args:
            hidden: [R, L, D], of the R rows that are not finished.

        Returns:
            The same rows; these stay as they are, but their generators have drawn.
        """
        sampler, run, plan = self.sampler, self.run, self.plan
        state = replace(self.state, passes=self.passes)
        with torch.no_grad():
            with run.packed:
                drawn = sampler.draw(run, state.passes, hidden, plan)
            choice = sampler.choose(run, state, plan, drawn)
            state = sampler.commit(run, state, plan, drawn, choice)
            return Denoising.of(sampler, run, state, step=self.step + 1)

    def output(self) -> SampleStep:
        """Return what the last step left."""
        return SampleStep(
            ids=self.state.x_t,
            committed=self.state.committed,
            step=self.step - 1,
            steps=self.run.blocks.total,
            log_prob=self.state.log_prob,
        )

    # --- rows that join and leave ---

    def joins(self, other: Denoising) -> bool:
        """Whether the rows of both can be one group: the sampler and the branches are alike."""
        return (
            self.is_separable
            and other.is_separable
            and self.sampler == other.sampler
            and len(self.state.passes.others) == len(other.state.passes.others)
            and self.state.passes.denoiser is other.state.passes.denoiser
            and (self.run.batch.block is None) == (other.run.batch.block is None)
        )

    @classmethod
    def joined(cls, several: Sequence[Denoising]) -> Denoising:
        """Return the rows of several that can be one group, none of them finished."""
        if len(several) == 1:
            return several[0]
        length = max(one.length for one in several)
        several = [one._with_length(length) for one in several]
        first, passes = several[0], ForwardPasses.joined([one.state.passes for one in several])
        generators = [one.run.generators for one in several]
        run = replace(
            first.run,
            batch=passes.batch,
            blocks=replace(
                first.run.blocks,
                of=torch.cat([one.run.blocks.of for one in several]),
                count=torch.cat([one.run.blocks.count for one in several]),
                total=max(one.run.blocks.total for one in several),
            ),
            generators=RowGenerators(
                sum((one.generators for one in generators), ()),
                sum((one.lengths for one in generators), ()),
            ),
            is_text=torch.cat([one.run.is_text for one in several]),
        )
        rows: dict[str, Any] = {
            name: torch.cat([getattr(one.state, name) for one in several]) for name in _ROWS
        }
        step = max(one.step for one in several)
        return cls.of(first.sampler, run, RowState(passes=passes, **rows), step=step)

    def rows(self, kept: Sequence[int]) -> Denoising:
        """Return some of the rows, none of them finished, as if there had never been others."""
        passes = self.state.passes.taken(kept)
        generators, blocks = self.run.generators, self.run.blocks
        index = sent(torch.tensor(kept, dtype=torch.int64), self.state.x_t.device)
        run = replace(
            self.run,
            batch=passes.batch,
            blocks=replace(blocks, of=blocks.of[index], count=blocks.count[index]),
            generators=RowGenerators(
                tuple(generators.generators[row] for row in kept),
                tuple(generators.lengths[row] for row in kept),
            ),
            is_text=self.run.is_text[index],
        )
        rows: dict[str, Any] = {name: getattr(self.state, name)[index] for name in _ROWS}
        some = replace(self, run=run, state=RowState(passes=passes, **rows))
        some = some._with_length(max(run.generators.lengths))
        return Denoising.of(some.sampler, some.run, some.state, step=self.step)

    def _with_length(self, length: int) -> Denoising:
        """Return the rows, padded or with less padding, with the plan that they had."""
        if length == self.length:
            return self
        passes = self.state.passes.with_length(length)
        run = replace(
            self.run,
            batch=passes.batch,
            blocks=replace(self.run.blocks, of=of_length(self.run.blocks.of, length)),
            is_text=of_length(self.run.is_text, length),
        )
        values = {name: getattr(self.state, name) for name in _ROWS}
        rows: dict[str, Any] = {
            name: of_length(value, length) for name, value in values.items() if value.ndim == 2
        }
        return replace(self, run=run, state=replace(self.state, passes=passes, **rows))


_ROWS = [f.name for f in fields(RowState) if f.name != "passes"]


@torch.no_grad()
def forward(several: Sequence[Denoising]) -> list[Tensor]:
    """Return the hidden states [R, L, D] of the unfinished rows of each group, by one forward pass.

    Args:
        several: Groups of one denoiser, each with rows that are not finished. Those with a cache
            have a pass of their own.

    Returns:
        The states of each group, for `Denoising.after`.
    """
    with several[0].run.packed:
        if len(several) == 1:
            (one,) = several
            passes = one.passes
            hidden = passes.first_hidden if one.step == 0 else passes.hidden
            return [hidden(one.state.x_t, one.plan.host.query_mask)]
        return hidden_of([(one.passes, one.state.x_t, one.plan.host.query_mask) for one in several])
