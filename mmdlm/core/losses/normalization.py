"""What a summed loss is divided by, in the objectives and in the policy losses."""

from __future__ import annotations

from typing import Literal, get_args

# "token"         all scored tokens together: the targets of a batch, or what a policy's views cover
# "masked_token"  the tokens that are noised in this draw: a plain mean of the cross-entropy
# "sequence"      each sequence's own scored tokens, then the sequences that have any
# "batch"         the sequences that have any: nats a sequence
# "constant"      the sequences that have any, times a fixed length
LossNormalization = Literal["token", "masked_token", "sequence", "batch", "constant"]
OBJECTIVE: tuple[LossNormalization, ...] = ("token", "masked_token", "sequence", "batch")
POLICY: tuple[LossNormalization, ...] = ("token", "sequence", "constant")


def check_normalization(value: str, known: tuple[LossNormalization, ...], owner: str) -> None:
    """Check that a loss knows its normalization.

    Args:
        value: The `loss_normalization` that was given.
        known: Those that the loss has, `OBJECTIVE` or `POLICY`.
        owner: The loss, for the message.

    Raises:
        ValueError: If `value` is none of `known`.
    """
    if value in known:
        return
    other = " (another kind of loss has it)" if value in get_args(LossNormalization) else ""
    raise ValueError(
        f"{owner}: loss_normalization {value!r} is not one of {', '.join(known)}{other}"
    )
