"""Between text and ids: a tokenizer beside the vocabulary that its ids lie in."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mmdlm.core.vocabulary import Vocabulary

HOLE = re.compile(r"\[MASK(?::(\d+))?\]")
# A tokenizer is told how to read special names by a setting of its own, which threads share.
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Words:
    """A text tokenizer over a vocabulary.

    slots    tokens of text of every document, end included; None: texts have the length they need
    longest  most tokens of a text, its end not counted
    grid     (rows, columns) of the codes of a picture; None: a model without an image tokenizer
    """

    tokenizer: PreTrainedTokenizerFast
    vocabulary: Vocabulary
    slots: int | None = None
    longest: int = 2048
    grid: tuple[int, int] | None = None

    def ids(self, text: str) -> list[int]:
        """Text -> ids; the name of a special token in it stands for that token."""
        with _ONE_AT_A_TIME:
            return list(self.tokenizer.encode(text, add_special_tokens=False))

    def spoken(self, text: str) -> list[int]:
        """What a user wrote -> ids; the name of a special token in it is no more than letters.

        So that no message can end its own turn and begin another's.
        """
        with _ONE_AT_A_TIME:
            return list(
                self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
            )

    def special(self, wanted: Mapping[str, tuple[tuple[str, ...], int]]) -> dict[str, int]:
        """Special tokens, each by the first of its names that the tokenizer has -> their ids.

        wanted  name here -> (names there, the id that the family was published with), under which
                an added token of another name counts too

        Raises ValueError that names all that are missing, or one that a tokenizer as large as the
        published one has elsewhere.
        """
        found: dict[str, int] = {}
        missing = []
        for here, (names, published) in wanted.items():
            at = self.first_of(names)
            if at is None and published in self.tokenizer.added_tokens_decoder:
                found[here] = published
            elif at is None:
                missing.append(" or ".join(names))
            elif at != published and published < len(self.tokenizer):
                raise ValueError(
                    f"the text tokenizer has {' or '.join(names)} as id {at}, but the model was "
                    f"published with id {published}; give it the tokenizer that it was trained with"
                )
            else:
                found[here] = at
        if missing:
            raise ValueError(
                f"the text tokenizer has no {', no '.join(missing)}, which this "
                "model needs; give it the tokenizer that it was trained with"
            )
        return found

    def first_of(self, names: tuple[str, ...]) -> int | None:
        """The id of the first of some tokens that the tokenizer has; None: it has none."""
        ids = map(self.tokenizer.backend_tokenizer.token_to_id, names)
        return next((int(i) for i in ids if i is not None), None)

    def masks(self, count: int) -> Tensor:
        """[count] mask tokens."""
        return torch.full((count,), self.vocabulary.mask_id)

    def closed(self, ids: Tensor) -> Tensor:
        """Ids -> the same with the end of text, to the end of the slots where there are slots."""
        closed = torch.full((self.slots or len(ids) + 1,), self.vocabulary.eos_id)
        closed[: len(ids)] = ids
        return closed

    def prompt(self, text: str) -> Tensor:
        """Text -> its ids without an end, [T]. Raises ValueError where it is too long."""
        return torch.tensor(self.checked(self.spoken(text.strip()), text), dtype=torch.int64)

    def checked(self, ids: list[int], text: str) -> list[int]:
        """The ids, unless there are too many of them."""
        if len(ids) > self.longest:
            raise ValueError(
                f"text {shortened(text)!r} has {len(ids)} tokens, but this model takes at most "
                f"{self.longest}; shorten it"
            )
        return ids

    def template(self, text: str) -> tuple[Tensor, Tensor]:
        """Text with holes -> (ids, which of them are holes), both [T].

        Raises ValueError for a text without a hole, a hole of no tokens, and a text too long.
        """
        ids: list[int] = []
        hole: list[bool] = []

        def add_words(piece: str) -> None:
            piece = piece.rstrip()  # the token after it brings its own space
            if piece.strip():
                added = self._continue(piece) if ids else self._start(piece)
                ids.extend(added)
                hole.extend([False] * len(added))

        end = 0
        for match in HOLE.finditer(text):
            add_words(text[end : match.start()])
            length = int(match[1] or 1)
            if length < 1:
                raise ValueError(
                    f"{match[0]} in {text!r} is a hole of no tokens; give it at least one"
                )
            length = min(length, self.longest + 1)  # enough to be refused below
            ids.extend([self.vocabulary.mask_id] * length)
            hole.extend([True] * length)
            end = match.end()
        add_words(text[end:])
        if not any(hole):
            raise ValueError(
                f"text {text!r} has no hole; write [MASK] for each token to fill in, or [MASK:3] "
                "for three"
            )
        return torch.tensor(self.checked(ids, text)), torch.tensor(hole)

    def _start(self, piece: str) -> list[int]:
        return self.spoken(piece.lstrip())

    def _continue(self, piece: str) -> list[int]:
        """Ids of a piece in the middle of a text, where a tokenizer must not put a space first."""
        before, ids = self.spoken("\n"), self.spoken("\n" + piece)
        return ids[len(before) :] if ids[: len(before)] == before else self._start(piece)


def shortened(text: str) -> str:
    """A text as an error shows it."""
    return text if len(text) <= 60 else text[:59] + "\N{HORIZONTAL ELLIPSIS}"
