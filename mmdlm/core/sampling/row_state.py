"""Hold what the sampling loop knows: about a run, about its rows between steps, about one step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.core.blocks import block_runs
from mmdlm.core.host_masks import numbers_of, on_host
from mmdlm.core.kernels.linear import PackedLayers
from mmdlm.core.sampling.forward_passes import ForwardPasses
from mmdlm.core.sampling.generators import RowGenerators
from mmdlm.core.sampling.positions import IdRange
from mmdlm.core.sampling.unmasking import Progress
from mmdlm.core.sequence import Batch
from mmdlm.core.vocabulary import Modality, Vocabulary


@dataclass(frozen=True)
class Blocks:
    """The blocks of each row, and how many of the run's steps each block may take.

    Attributes:
        of: [B, L] int64, number of the block of each target; meaningless elsewhere.
        count: [B] int64, blocks of each row.
        steps: Denoising steps of a row, spread evenly over its blocks, remainder first; or those of
            each block.
        per_block: Whether they are those of each block.
        total: Steps that the longest row may take.
    """

    of: Tensor
    count: Tensor
    steps: int
    per_block: bool
    total: int

    @classmethod
    def split(
        cls,
        batch: Batch,
        *,
        block_length: int | None,
        steps: int,
        per_block: bool = False,
        first_alone: bool = False,
    ) -> Blocks:
        """Cut the targets of each row into blocks, in reading order.

        Without `Batch.block` they are runs of `block_length` targets. With it they are the targets
        of each of its blocks, which `block_length` cuts further, counting from where it begins.

        Args:
            batch: [B, L] rows, with host masks.
            block_length: Targets of a block; None: one block, or those of the batch.
            steps: Denoising steps of a row, or of each block.
            per_block: Whether they are those of each block.
            first_alone: Whether the first token of each of the batch's blocks is one by itself.

        Returns:
            The block of each target, and the number of blocks of each row.

        Raises:
            ValueError: If there are fewer steps than blocks.
        """
        target = batch.target
        length = block_length or target.shape[1]
        if batch.block is None:
            count = (target.sum(1) + length - 1) // length
            per_row = batch.host_masks.target.numpy().sum(1)
            most = (int(per_row.max()) + length - 1) // length if len(per_row) else 0
            number = (target.cumsum(1) - 1) // length
        else:
            number = _blocks_with_targets(batch, length, first_alone=first_alone)
            count = number.amax(1) + 1
            most = int(count.max()) if len(count) else 0
        if per_block:
            return cls(number, count, steps, per_block, steps * most)
        if most > steps:
            of, also = (f" of {length} tokens", " or block_length") if block_length else ("", "")
            raise ValueError(
                f"sampler: {steps} steps are too few for {most} blocks{of}; raise steps{also}"
            )
        return cls(number, count, steps, per_block, steps)

    def steps_of(self, block: Tensor) -> Tensor:
        """Return [B] int64, the steps that block number `block` [B] of each row may take."""
        if self.per_block:
            return torch.full_like(block, self.steps)
        blocks = self.count.clamp_min(1)
        return self.steps // blocks + (block < self.steps % blocks)


def _blocks_with_targets(batch: Batch, length: int, *, first_alone: bool) -> Tensor:
    """Return the number [B, L] of the piece of a block in which each token is.

    The batch's blocks are cut into pieces of `length` tokens; those without targets do not count.
    """
    run = block_runs(batch)
    column = torch.arange(run.shape[1], device=run.device).expand_as(run)
    begins = F.pad(run[:, 1:] != run[:, :-1], (1, 0), value=True)
    start = column.masked_fill(~begins, 0).cummax(1).values
    begins = begins | ((column - start) % length == 0)
    if first_alone:
        begins = begins | (column - start == 1)
    piece = begins.long().cumsum(1)  # from 1 on
    filled = torch.zeros(len(run), run.shape[1] + 1, dtype=torch.int64, device=run.device)
    filled = filled.scatter_reduce(1, piece, batch.target.long(), "amax")
    return (filled.cumsum(1) - 1).gather(1, piece)


@dataclass(frozen=True)
class SamplingRun:
    """What stays the same in all steps of one run.

    Attributes:
        batch: Rows to fill, as they were given.
        vocabulary: Ids of the denoiser.
        blocks: Blocks of each row.
        generators: Random numbers of each row.
        ranges: Ids that a target of each modality may become.
        packed: Layers of the denoiser, laid out for a CPU while a forward pass runs.
        is_text: [B, L] bool.
        no_words: [N] int64, ids that are not words: ends and the mask token.
        stops: [S] int64, ids that end the last text of a row.
    """

    batch: Batch
    vocabulary: Vocabulary
    blocks: Blocks
    generators: RowGenerators
    ranges: dict[Modality, IdRange]
    packed: PackedLayers
    is_text: Tensor
    no_words: Tensor
    stops: Tensor

    def stopped(self, x_t: Tensor, committed: Tensor) -> Tensor:
        """Tell which rows have committed a stop in their last text, and all before it: [B] bool."""
        target, segment = self.batch.target, self.batch.segment
        stop = torch.isin(x_t, self.stops)
        none_before = (target & ~committed).cumsum(1) == 0
        last = segment.masked_fill(~target, -1).amax(1, keepdim=True)
        return (stop & committed & none_before & self.is_text & (segment == last)).any(1)


@dataclass(frozen=True)
class RowState:
    """How far each row has come between two denoising steps.

    Attributes:
        passes: Forward passes of the rows that are not finished.
        x_t: [B, L] int64, noisy ids.
        committed: [B, L] bool, targets that are committed.
        just_committed: [B, L] bool, those committed in the last step.
        confidence: [B, L] probability of the token drawn in the last step; 0 where none was.
        probability: [B, L] of each committed token, when it was committed.
        log_prob: [B, L] of each committed token, see `SampleStep`.
        block: [B] int64, number of the current block; the number of blocks in a finished row.
        taken: [B] int64, steps taken in the current block.
        void: [B] int64, planned tokens for which the mask token was drawn.
        broken: [B] bool, rows in which a number was not finite.
    """

    passes: ForwardPasses
    x_t: Tensor
    committed: Tensor
    just_committed: Tensor
    confidence: Tensor
    probability: Tensor
    log_prob: Tensor
    block: Tensor
    taken: Tensor
    void: Tensor
    broken: Tensor

    @classmethod
    def first(cls, passes: ForwardPasses, x_t: Tensor, block: Tensor) -> RowState:
        """Return the state before the first step: all targets are noise.

        Args:
            passes: Forward passes of all rows.
            x_t: [B, L] int64, ids with noise at the targets.
            block: [B] int64 zeros.

        Returns:
            The state of all rows, none of them finished.
        """
        nothing = torch.zeros(x_t.shape, dtype=torch.bool, device=x_t.device)
        zero = torch.zeros(x_t.shape, device=x_t.device)
        broken = torch.zeros_like(block, dtype=torch.bool)
        return cls(passes, x_t, nothing, nothing, zero, zero, zero, block, block, block, broken)


@dataclass(frozen=True)
class StepPlan:
    """Which targets one step may commit.

    Attributes:
        in_block: [B, L] bool, targets of the current blocks.
        begun: [B, L] bool, those and the targets of earlier blocks; none in a finished row.
        still_open: [B, L] bool, targets of `begun` that are not committed.
        progress: Of each row in its block.
        host: What the host knows of the step.
    """

    in_block: Tensor
    begun: Tensor
    still_open: Tensor
    progress: Progress
    host: HostState


@dataclass(frozen=True)
class Choice:
    """What one step commits and takes back.

    Attributes:
        chosen: [B, L] bool, targets to commit.
        again: [B, L] bool, committed targets that become noise again.
        remaining: [B] int64, planned number of targets of the block that stay open.
        void: [B] int64, planned tokens of this step for which the mask token was drawn.
    """

    chosen: Tensor
    again: Tensor
    remaining: Tensor
    void: Tensor


@dataclass(frozen=True)
class HostState:
    """What the host knows before a step; all tensors are on the CPU.

    Attributes:
        unfinished: [B] bool.
        broken: [B] bool, rows in which a number was not finite.
        still_open: [B, L] bool.
        query_mask: [B, L] bool, positions that are computed.
        progress: [4, B] int64, see `Progress.on_host`.
    """

    unfinished: Tensor
    broken: Tensor
    still_open: Tensor
    query_mask: Tensor
    progress: Tensor

    @classmethod
    def of(
        cls,
        unfinished: Tensor,
        broken: Tensor,
        still_open: Tensor,
        query_mask: Tensor,
        progress: Progress,
    ) -> HostState:
        """Ask the device once for all that the host has to know; arguments as the attributes."""
        length = still_open.shape[1]
        numbers = torch.stack([unfinished, broken, *progress.each], dim=1)  # [B, 6] int64
        known = on_host(torch.cat([numbers, still_open, query_mask], dim=1))
        return cls(
            unfinished=known[:, 0].bool(),
            broken=known[:, 1].bool(),
            still_open=known[:, 6 : 6 + length].bool(),
            query_mask=known[:, 6 + length :].bool(),
            progress=known[:, 2:6].T,
        )

    @property
    def columns(self) -> int:
        """Number of columns up to the last position that is computed."""
        return 1 + int(numbers_of(self.query_mask.any(0)).amax())

    @property
    def is_finished(self) -> bool:
        """Whether no row is left."""
        return not self.unfinished.numpy().any()

    def refuse_broken(self) -> None:
        """Refuse numbers that are not finite.

        Raises:
            ValueError: If a row has a logit that is NaN or infinite.
        """
        broken = int(self.broken.numpy().sum())
        if broken:
            raise ValueError(
                f"the model's numbers are not finite: it gives NaN or infinite logits for {broken} "
                f"of {len(self.broken)} outputs; its weights are damaged, or overflow in this "
                "dtype: load it in another (bfloat16 or float32 in place of float16), or download "
                "or copy the checkpoint again"
            )
