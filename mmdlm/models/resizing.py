"""What becomes of a vocabulary, and of its rows, when a model gets more or fewer ids."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmdlm.core.vocabulary import Vocabulary

SPECIALS = ("mask_id", "pad_id", "eos_id", "begin_image_id", "end_image_id")


@dataclass(frozen=True)
class Resized:
    """A vocabulary of another size.

    Attributes:
        vocabulary: With new ids at the end of the text; what stood behind the text has moved on.
        order: [V] rows of tensors that have grown at their end -> the rows of the vocabulary.
    """

    vocabulary: Vocabulary
    order: Tensor

    @torch.no_grad()
    def arrange(self, tensors: Iterable[Tensor]) -> None:
        """Put the rows of tensors [V, ...] in order, in place."""
        for tensor in {id(one): one for one in tensors}.values():  # a tied one once
            tensor.copy_(tensor[self.order.to(tensor.device)])


def resized(vocabulary: Vocabulary, count: int, *, rows: int) -> Resized:
    """Make room for new text ids, or drop ids at the end that nothing has.

    Args:
        vocabulary: Before.
        count: Ids that are wanted: of text, specials and image codes together.
        rows: Of the tensors, which may be padded beyond `count`.

    Returns:
        The new vocabulary and the order of its rows.

    Raises:
        ValueError: Where an id that the model uses would be lost.
    """
    size, end = vocabulary.size, vocabulary.text[1]
    ids = {name: getattr(vocabulary, name) for name in SPECIALS}
    last = max(
        id for id in (*ids.values(), vocabulary.image_codes and vocabulary.image[1] - 1) if id
    )
    if count <= last:
        raise ValueError(
            f"resize_token_embeddings({count}) would lose ids of the model, which has {size} of "
            f"text, specials and image codes together; for N more text tokens give {size} + N"
        )
    if last < end:  # the text is last: nothing moves
        text, added, order = count, 0, torch.arange(rows)
    else:
        added = max(count - size, 0)
        text, old = end + added, torch.arange(min(count, size))
        new = torch.arange(size, size + added)
        order = torch.cat((old[:end], new, old[end:], torch.arange(count, rows)))
    moved = {name: id if id is None or id < end else id + added for name, id in ids.items()}
    start, stop = (one + added if one >= end else one for one in vocabulary.image)
    image = (start, stop) if start < stop else (rows, rows)
    return Resized(
        replace(vocabulary, size=rows, text=(vocabulary.text[0], text), image=image, **moved), order
    )


def padded(count: int, multiple: int | None) -> int:
    """Return the number of rows for `count` ids where rows come in multiples."""
    return count if multiple is None else -(-count // multiple) * multiple
