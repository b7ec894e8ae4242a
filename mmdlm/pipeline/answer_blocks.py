"""Fit tasks to a model of block diffusion: whole blocks, and steps of each of them."""

from __future__ import annotations

import math
from collections.abc import Sequence as Many
from dataclasses import replace

import torch

from mmdlm.core.denoiser import BlockDenoiser, Denoiser
from mmdlm.core.sampling.block_rules import BlockTransfer
from mmdlm.core.sampling.cache import FinishedBlocks
from mmdlm.core.sampling.sampler import Sampler
from mmdlm.core.sampling.unmasking import Parallel, UniformTransfer, UnmaskingRule
from mmdlm.core.sequence import Sequence, collate
from mmdlm.core.vocabulary import Modality
from mmdlm.templates.task_prompt import TaskPrompt


def block_sampler(sampler: Sampler, denoiser: Denoiser, task_prompts: Many[TaskPrompt]) -> Sampler:
    """Return the sampler whose steps are those of each block, if the model has blocks.

    Each block gets its share of the steps that the longest result was to have. `UniformTransfer`
    becomes `BlockTransfer`. Unless the sampler has a cache, finished blocks are kept: it is exact.

    Raises ValueError for a `block_length` that does not divide that of the model.
    """
    if not isinstance(denoiser, BlockDenoiser) or denoiser.block_length is None:
        return sampler
    block, piece = denoiser.block_length, sampler.block_length or denoiser.block_length
    if block % piece:
        raise ValueError(
            f"block_length {piece} does not divide the blocks of {block} tokens that this model "
            "was trained with; leave it out, or give a divisor"
        )
    targets = [sum(int(s.target.sum()) for s in one.sequence.segments) for one in task_prompts]
    steps = math.ceil(sampler.steps * piece / max(1, *targets))
    return replace(
        sampler,
        steps=steps,
        steps_per_block=True,
        cache=sampler.cache or FinishedBlocks(),
        unmasking=_of_whole_blocks(sampler.unmasking, piece),
    )


def _of_whole_blocks(rule: UnmaskingRule, length: int) -> UnmaskingRule:
    if isinstance(rule, Parallel):
        return replace(rule, fallback=_of_whole_blocks(rule.fallback, length))
    return BlockTransfer(length) if isinstance(rule, UniformTransfer) else rule


def with_whole_blocks(task_prompt: TaskPrompt, denoiser: Denoiser) -> TaskPrompt:
    """Return the task with a last block as long as the others, if the model has blocks.

    A model of block diffusion has seen whole blocks only. What is added to a text is generated with
    it and is no part of the result.
    """
    if not isinstance(denoiser, BlockDenoiser) or denoiser.block_length is None:
        return task_prompt
    sequence = task_prompt.sequence
    last = sequence.segments[-1]
    if last.modality != Modality.TEXT or not len(last.ids) or not bool(last.target.all()):
        return task_prompt
    (number,) = _numbers(sequence, denoiser)
    missing = -int((number == number[-1]).sum()) % denoiser.block_length
    return replace(
        task_prompt,
        sequence=_longer(sequence, missing),
        unconditional=tuple(_longer(one, missing) for one in task_prompt.unconditional),
    )


def _numbers(sequence: Sequence, denoiser: BlockDenoiser) -> torch.Tensor:
    """Return the numbers [1, L] of the blocks of one document."""
    block = denoiser.in_blocks(collate([sequence], denoiser.vocabulary)).block
    assert block is not None, "the model has blocks"
    return block


def _longer(sequence: Sequence, missing: int) -> Sequence:
    """Return a document whose last segment has more targets at its end."""
    *first, last = sequence.segments
    ids = torch.cat([last.ids, last.ids[-1:].expand(missing)])
    target = torch.cat([last.target, torch.ones(missing, dtype=torch.bool)])
    return replace(sequence, segments=(*first, replace(last, ids=ids, target=target)))
