"""Read the masks and positions that transformers' callers give: which tokens see each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from mmdlm.core.sequence import NO_DOCUMENT

# What trainers send beside the inputs, and what here follows from the inputs themselves.
IMPLIED = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "max_length_k",
        "max_length_q",
        "seq_idx",
    }
)


@dataclass(frozen=True)
class TokenLayout:
    """Where the tokens of a call stand, and which of them see each other.

    Attributes:
        position: [B, L] int64, or [B, L, A] on several axes.
        document: [B, L] int64, -1 at padding; tokens see their document.
        undivided: Whether every row is one document from end to end; None: not known.
        mask: What is seen in place of documents: [B, 1, L, L] or a BlockMask; None: documents.
    """

    position: Tensor
    document: Tensor
    undivided: bool | None
    mask: Tensor | BlockMask | None = None

    @classmethod
    def of(
        cls,
        shape: tuple[int, int],
        device: torch.device,
        *,
        attention_mask: Tensor | BlockMask | None,
        position_ids: Tensor | None,
        past: int = 0,
    ) -> TokenLayout:
        """Read what a caller gives.

        Args:
            shape: (B, L) of the tokens.
            device: Of the tokens.
            attention_mask: [B, L], 0 at padding, on either side, which changes no other logits:
                positions are counted over real tokens. Or a mask of pairs [B, 1, L, L] (or of each
                head), bool, or floats that are added to the scores; or FlexAttention's own. None:
                all tokens are seen.
            position_ids: [B, L] or [B, L, A]. Without a mask a document begins wherever they begin
                at 0 again: rows that are packed, without padding, as TRL makes them. None: counted.
            past: Tokens to the left whose keys and values are known; a mask covers them, too.

        Returns:
            The layout.

        Raises:
            ValueError: For a mask of another shape.
        """
        rows, length = shape
        counted = torch.arange(past, past + length, device=device).expand(rows, -1)
        no_document = torch.zeros(shape, dtype=torch.int64, device=device)
        if attention_mask is None:
            if position_ids is None or past:
                position = counted if position_ids is None else position_ids
                return cls(position, no_document, True)
            start = (position_ids if position_ids.ndim == 2 else position_ids.amax(-1)) == 0
            document = (start.cumsum(-1) - start[:, :1].long()).expand(rows, -1)
            return cls(position_ids.expand(rows, *position_ids.shape[1:]), document, None)
        if not isinstance(attention_mask, Tensor) or attention_mask.ndim == 4:
            position = counted if position_ids is None else position_ids
            return cls(position, no_document, None, attention_mask)
        if attention_mask.shape != (rows, past + length):
            raise ValueError(
                f"attention_mask of shape {tuple(attention_mask.shape)} does not fit "
                f"{rows} x {past + length} tokens; give one number for each token, or a mask of "
                "pairs [B, 1, L, L]"
            )
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        if past:
            return cls(position_ids, no_document, None, attention_mask.bool()[:, None, None, :])
        document = torch.where(attention_mask.bool(), 0, NO_DOCUMENT)
        return cls(position_ids, document, None)


def given_inputs(
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    labels: Tensor | None,
    loss_weight: Tensor | None,
) -> Tensor:
    """Return ids or embeddings, whichever is given; ValueError for what does not go together."""
    if loss_weight is not None and labels is None:
        raise ValueError("loss_weight weighs targets, which labels name; give labels")
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("forward takes either input_ids or inputs_embeds; give one of them")
    if labels is not None and input_ids is None:
        raise ValueError("labels need input_ids, of which targets are masked; give them")
    given = input_ids if inputs_embeds is None else inputs_embeds
    assert given is not None
    return given


def check_options(options: dict[str, object]) -> None:
    """Raise ValueError for an option of a call that would have no effect."""
    types = options.pop("token_type_ids", None)  # which tokenizers give without being asked
    if isinstance(types, Tensor) and not torch.compiler.is_compiling() and bool(types.any()):
        raise ValueError("token_type_ids: a denoiser knows only type 0; leave them out")
    for name, value in options.items():
        if name not in IMPLIED and value is not None:
            raise ValueError(
                f"forward takes no {name!r} (given: {type(value).__name__}); leave it out"
            )
