"""Encode and decode text: a tokenizer beside the vocabulary that its ids lie in."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mmdlm.core.vocabulary import Vocabulary
from mmdlm.templates.infill import check_whole, shortened, split_at_holes, without_blank

# A tokenizer is told how to read special names by a setting of its own, which threads share.
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class TextCodec:
    """A text tokenizer over a vocabulary.

    Attributes:
        tokenizer: Of text.
        vocabulary: Ids of the denoiser.
        slots: Tokens of text of every document, end included; None: texts have the length they
            need.
        longest: Most tokens of a text, its end not counted.
        grid: (rows, columns) of the codes of an image; None: a model without an image tokenizer.
    """

    tokenizer: PreTrainedTokenizerFast
    vocabulary: Vocabulary
    slots: int | None = None
    longest: int = 2048
    grid: tuple[int, int] | None = None

    def encode_with_specials(self, text: str) -> list[int]:
        """Encode text; the name of a special token in it stands for that token."""
        check_whole(text)
        with _ONE_AT_A_TIME:
            return list(self.tokenizer.encode(text, add_special_tokens=False))

    def encode(self, text: str) -> list[int]:
        """Encode what a user wrote; the name of a special token in it is letters.

        So no message can end its own turn and begin another.
        """
        check_whole(text)
        with _ONE_AT_A_TIME:
            return list(
                self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
            )

    def special(self, wanted: Mapping[str, tuple[tuple[str, ...], int]]) -> dict[str, int]:
        """Find special tokens, each by the first of its names that the tokenizer has.

        Args:
            wanted: Name here -> (names there, the id that the family was published with); an added
                token of another name with that id counts too.

        Returns:
            Name here -> id.

        Raises:
            ValueError: If some are missing, or if a tokenizer as large as the published one has one
                elsewhere.
        """
        found: dict[str, int] = {}
        missing = []
        for name, (names, published) in wanted.items():
            at = self.first_of(names)
            if at is None and published in self.tokenizer.added_tokens_decoder:
                found[name] = published
            elif at is None:
                missing.append(" or ".join(names))
            elif at != published and published < len(self.tokenizer):
                raise ValueError(
                    f"the text tokenizer has {' or '.join(names)} as id {at}, but the model was "
                    f"published with id {published}; give it the tokenizer that it was trained with"
                )
            else:
                found[name] = at
        if missing:
            raise ValueError(
                f"the text tokenizer has no {', no '.join(missing)}, which this "
                "model needs; give it the tokenizer that it was trained with"
            )
        return found

    def first_of(self, names: tuple[str, ...]) -> int | None:
        """Return the id of the first of some tokens that the tokenizer has; None: it has none."""
        ids = map(self.tokenizer.backend_tokenizer.token_to_id, names)
        return next((int(i) for i in ids if i is not None), None)

    def masks(self, count: int) -> Tensor:
        """Return [count] mask tokens."""
        return torch.full((count,), self.vocabulary.mask_id)

    def append_eos(self, ids: Tensor) -> Tensor:
        """Append the end of text to ids, up to the end of the slots if there are slots."""
        append_eos = torch.full((self.slots or len(ids) + 1,), self.vocabulary.eos_id)
        append_eos[: len(ids)] = ids
        return append_eos

    def prompt(self, text: str) -> Tensor:
        """Encode what a user asks for, without an end: [T].

        Args:
            text: The prompt.

        Returns:
            [T] int64 ids.

        Raises:
            ValueError: If it is too long.
        """
        return torch.tensor(self.checked(self.encode(text.strip()), text), dtype=torch.int64)

    def checked(self, ids: list[int], text: str) -> list[int]:
        """Return the ids, unless there are too many of them."""
        if len(ids) > self.longest:
            raise ValueError(
                f"text {shortened(text)!r} has {len(ids)} tokens, but this model takes at most "
                f"{self.longest}; shorten it"
            )
        return ids

    def parse_infill_template(self, text: str) -> tuple[Tensor, Tensor]:
        """Encode a text with holes.

        Everything outside the holes is kept, except one blank before a hole: the tokens that fill
        it bring their own.

        Args:
            text: With holes such as [MASK] or [MASK:5].

        Returns:
            Ids [T], and which of them are holes, [T] bool.

        Raises:
            ValueError: For a text without a hole, a hole of no tokens, and a text that is too long.
        """
        ids: list[int] = []
        hole: list[bool] = []
        before, after = split_at_holes(text)
        for outside, length in before:
            added = self.follows(without_blank(outside), ids)
            length = min(length, self.longest + 1)  # enough to be refused below
            ids += [*added, *[self.vocabulary.mask_id] * length]
            hole += [*[False] * len(added), *[True] * length]
        added = self.follows(after, ids)
        ids, hole = [*ids, *added], [*hole, *[False] * len(added)]
        return torch.tensor(self.checked(ids, text)), torch.tensor(hole)

    def follows(self, piece: str, before: list[int]) -> list[int]:
        """Encode what follows the ids `before`; a tokenizer must not put a space before it."""
        if not piece or not before:
            return self.encode(piece) if piece else []
        for anchor in ("\n", "a"):  # one of them is no part of a token with what follows it
            start, ids = self.encode(anchor), self.encode(anchor + piece)
            if start and ids[: len(start)] == start:
                return ids[len(start) :]
        return self.encode(piece)
