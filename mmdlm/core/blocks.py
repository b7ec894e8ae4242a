"""Number the blocks of a batch: block diffusion denoises them one after the other.

A training row of block diffusion holds two copies of itself, whose tokens have the same positions:

    noisy copy x_t    sees its own block of x_t, and the blocks of x_0 before it
    clean copy x_0    sees its own block of x_0, and the blocks of x_0 before it

so that one pass gives -log p(block b | clean blocks before b, what x_t shows of b) for all b.
Source: arXiv:2503.09573 (BD3-LM), section 3.1 and appendix B.6.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.core.denoiser import BlockDenoiser, Denoiser
from mmdlm.core.sequence import Batch
from mmdlm.core.vocabulary import Modality

PromptBlocks = Literal["blocks", "prefix", "causal"]


def block_numbers(batch: Batch, length: int, *, prompt: PromptBlocks = "blocks") -> Tensor:
    """Return the number [B, L] int64 of each token's block in its document.

    A token sees its own block and those of smaller numbers (`Batch.block`). The prompt is what
    stands before the first target of a document.

    Args:
        batch: [B, L] tokens; documents may be packed or padded.
        length: Tokens of a block; the last one of a document may be shorter.
        prompt: "blocks": blocks are counted from the start of the document, so that the prompt is
            cut like the rest, and its end may share a block with the first targets (SDAR, LLaDA2,
            Fast-dLLM v2). "prefix": the prompt is one block, and blocks are counted from its end.
            "causal": each token of the prompt is a block, and blocks are counted from its end.

    Returns:
        Numbers that do not fall within a document; they mean nothing at padding.

    Raises:
        ValueError: For a length below 1, or a name that is not one of the three.

    Source: arXiv:2503.09573, section 3 (block diffusion); arXiv:2510.06303 (SDAR) for "blocks".
    """
    check_blocks(length, prompt)
    if prompt == "blocks":
        return batch.position // length
    before = batch.prefix
    known = torch.zeros_like(batch.position).scatter_add(
        1, batch.document.clamp_min(0), (before & ~batch.is_padding).long()
    )
    known = known.gather(1, batch.document.clamp_min(0))  # [B, L] tokens of the prompt
    answer = (batch.position - known).div(length, rounding_mode="floor")
    if prompt == "prefix":
        return torch.where(before, 0, 1 + answer)
    return torch.where(before, batch.position, known + answer)


def in_blocks(batch: Batch, length: int, *, prompt: PromptBlocks = "blocks") -> Batch:
    """Return the batch with the numbers of its blocks; arguments as `block_numbers` has them."""
    return batch.with_blocks(block_numbers(batch, length, prompt=prompt))


def block_runs(batch: Batch) -> Tensor:
    """Return the number [B, L] int64 of each token's block in its row, from 0 on.

    Tokens of one document and one `Batch.block` are one run; without blocks, a document is one.
    """
    changes = batch.document[:, 1:] != batch.document[:, :-1]
    if batch.block is not None:
        changes |= batch.block[:, 1:] != batch.block[:, :-1]
    return F.pad(changes, (1, 0)).long().cumsum(1)


def own_blocks(denoiser: Denoiser, batch: Batch) -> Batch:
    """Return the batch in the blocks of a denoiser that has some, unless it is cut already."""
    return denoiser.in_blocks(batch) if isinstance(denoiser, BlockDenoiser) else batch


def hidden_beside_clean(
    denoiser: Denoiser, x_t: Tensor, batch: Batch, *, query_mask: Tensor | None = None
) -> Tensor:
    """Return `Denoiser.hidden` of noisy ids, in which earlier blocks are seen clean.

    Without blocks it is `Denoiser.hidden`. Of the clean copy the last layer computes nothing.

    Args:
        denoiser: A model of block diffusion, or any other.
        x_t: [B, L] int64, noisy ids; of context the clean copy holds the same.
        batch: Their layout and the clean ids of targets.
        query_mask: [B, L] bool, the only positions whose states will be read; None: all.

    Returns:
        [B, L, D], the states of the noisy copy.

    Raises:
        ValueError: For blocks with a bounded lookahead, which has no meaning beside a second copy.
    """
    batch = own_blocks(denoiser, batch)
    if batch.block is None:
        return denoiser.hidden(x_t, batch, query_mask=query_mask)
    clean = torch.where(batch.target, batch.ids, x_t)
    read = torch.ones_like(batch.target) if query_mask is None else query_mask
    hidden = denoiser.hidden(
        torch.cat([x_t, clean], 1),
        doubled(batch),
        query_mask=torch.cat([read, torch.zeros_like(read)], 1),
    )
    return hidden[:, : x_t.shape[1]]


def doubled(batch: Batch) -> Batch:
    """Return rows [B, 2 L] of a noisy copy and a clean copy, which has no targets.

    Args:
        batch: [B, L] in blocks.

    Returns:
        The layout of both.

    Raises:
        ValueError: For a batch without blocks, with images not looked at, or with a lookahead.
    """
    if batch.block is None:
        raise ValueError("a batch without blocks has no clean copy; call in_blocks first")
    if batch.views is not None:
        raise ValueError("the batch has images not looked at yet; call see(batch) first")
    if batch.lookahead is not None:
        raise ValueError(
            "blocks do not go with a bounded lookahead (attention annealing); leave one of them out"
        )
    twice: dict[str, Any] = {
        field.name: torch.cat([value, value], 1)
        for field in fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor) and field.name != "features"
    }
    twice["target"] = torch.cat([batch.target, torch.zeros_like(batch.target)], 1)
    is_noisy = torch.ones_like(batch.target)
    twice["noisy"] = torch.cat([is_noisy, ~is_noisy], 1)
    features = batch.features
    if features is not None:
        slots = batch.host_masks.of_modality(Modality.FEATURE).sum(1).tolist()
        features = torch.cat([one for own in features.split(slots) for one in (own, own)])
    return replace(batch, **twice, features=features)


def first_columns(batch: Batch, stop: int) -> Batch:
    """Return the first `stop` tokens of each row, with host masks and the features among them.

    Raises ValueError for images whose features are yet to be computed.
    """
    if batch.views is not None:
        raise ValueError("the batch has images not looked at yet; call see(batch) first")
    features = batch.features
    if features is not None:
        slots = batch.of(Modality.FEATURE)
        features = features[_columns(batch)[slots] < stop]
    cut: dict[str, Any] = {
        field.name: value[:, :stop]
        for field in fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor)
        and field.name not in ("features", "lookahead")
    }
    return replace(batch, **cut, features=features).with_host_masks()


def _columns(batch: Batch) -> Tensor:
    """Return the number [B, L] of each token's column."""
    return torch.arange(batch.ids.shape[1], device=batch.ids.device).expand_as(batch.ids)


def check_blocks(length: object, prompt: object) -> None:
    """Raise ValueError for a length below 1, or a way to cut a prompt that is not known."""
    if type(length) is not int or length < 1:
        raise ValueError(f"block_length must be a whole number of at least 1, not {length!r}")
    if prompt not in get_args(PromptBlocks):
        raise ValueError(
            f"prompt_blocks must be one of {', '.join(get_args(PromptBlocks))}, not {prompt!r}"
        )
