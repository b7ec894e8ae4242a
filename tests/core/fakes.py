"""Small denoisers and batches with known answers."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from mmdlm.core.sequence import (
    Batch,
    Sequence,
    collate,
    control_segment,
    feature_segment,
    image_segments,
    text_segment,
)
from mmdlm.core.vocabulary import Vocabulary

TEXT, CODES = 11, 8
VOCABULARY = Vocabulary.build(text_size=TEXT, eos_id=0, image_codes=CODES)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TinyDenoiser(nn.Module):
    """A token's logits depend on its own token, its position and all tokens of its document."""

    def __init__(self, vocabulary: Vocabulary = VOCABULARY, *, seed: int = 0, scale: float = 2.0):
        super().__init__()
        self.vocabulary = vocabulary
        self.calls = 0
        self.head_rows: list[int] = []  # of each call of the head
        generator = rng(seed)
        width = 12

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator))

        self.token, self.place = weight(vocabulary.size, width), weight(64, width)
        self.head = nn.Parameter(scale * weight(width, vocabulary.size).data)

    def hidden(self, x_t: Tensor, batch: Batch, **_: Any) -> Tensor:
        self.calls += 1
        here = self.token[x_t] + self.place[batch.position]  # [B, L, D]
        if batch.features is not None:
            slots = torch.zeros_like(here).masked_scatter(
                (batch.modality == 3)[..., None], batch.features
            )
            here = here + slots
        same = batch.document[:, :, None] == batch.document[:, None, :]  # [B, L, L]
        same = (same / same.sum(-1, keepdim=True)).to(here.dtype)
        return torch.tanh(here + 3 * same @ torch.sin(2 * here))

    def head_weight(self) -> None:
        """None: tests count what `logits_at` is asked for."""

    def logits_at(
        self, hidden: Tensor, positions: Tensor, *, ids: tuple[int, int] | None = None
    ) -> Tensor:
        self.head_rows.append(int(positions.sum()))
        logits = hidden[positions] @ self.head
        return logits if ids is None else logits[:, ids[0] : ids[1]]


class Factorized(nn.Module):
    """Logits [L, V] by position, whatever the other tokens are: its likelihood is known exactly."""

    def __init__(self, logits: Tensor, vocabulary: Vocabulary = VOCABULARY):
        super().__init__()
        self.vocabulary = vocabulary
        self.logits = nn.Parameter(logits)
        self.calls = 0

    def hidden(self, x_t: Tensor, batch: Batch, **_: Any) -> Tensor:
        self.calls += 1
        return self.logits[batch.position]

    def head_weight(self) -> None:
        """None: tests count what `logits_at` is asked for."""

    def logits_at(
        self, hidden: Tensor, positions: Tensor, *, ids: tuple[int, int] | None = None
    ) -> Tensor:
        logits = hidden[positions]
        return logits if ids is None else logits[:, ids[0] : ids[1]]


def document(text: int, codes: int, *, seed: int = 0, prompt: int = 0) -> Sequence:
    """`codes` image codes and `text` tokens as targets, after `prompt` tokens of context."""
    generator = rng(seed)

    def draw(stop: int, n: int) -> Tensor:
        return torch.randint(stop, (n,), generator=generator)

    return Sequence(
        (
            text_segment(draw(TEXT, prompt)),
            *image_segments(draw(CODES, codes), VOCABULARY, target=True),
            text_segment(draw(TEXT, text), target=True),
        )
    )


def copies(sequence: Sequence, n: int) -> Batch:
    """The same document in each of `n` rows."""
    batch = collate([sequence], VOCABULARY)
    return Batch(
        **{
            f.name: value if (value := getattr(batch, f.name)) is None else value.expand(n, -1)
            for f in fields(batch)
        }
    )


def ragged() -> Batch:
    """Rows of different lengths, with holes, context of both kinds, and a row without targets."""
    generator = rng(7)
    hole = torch.tensor([False, True, True, False, True, False])
    text = torch.randint(TEXT, (6,), generator=generator)
    codes = torch.randint(CODES, (6,), generator=generator)
    return collate(
        [
            document(5, 8, seed=1, prompt=3),
            document(9, 0, seed=2, prompt=2),
            Sequence((text_segment(text, target=hole), control_segment(VOCABULARY.eos_id))),
            Sequence((text_segment(text), *image_segments(codes, VOCABULARY, target=hole))),
            Sequence((text_segment(text),)),
        ],
        VOCABULARY,
    )


def with_features() -> Batch:
    """Feature slots in rows of different kinds, so that their order matters."""
    generator = rng(3)
    rows = []
    for n in (2, 0, 3):
        features = torch.randn(n, 12, generator=generator)
        seen = (feature_segment(features, VOCABULARY),) if n else ()
        rows.append(
            Sequence((*seen, text_segment([1, 2]), text_segment([3, 4, 5, 6], target=True)))
        )
    return collate(rows, VOCABULARY)
