"""Packing and collating lose nothing, repeat nothing and mix nothing up."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmdlm.core.sequence import (
    NO_DOCUMENT,
    Batch,
    Segment,
    Sequence,
    arrange,
    collate,
    concatenate,
    control_segment,
    feature_segment,
    image_segments,
    pack,
    text_segment,
)
from mmdlm.core.vocabulary import Modality
from tests import properties  # noqa: F401 (its settings)
from tests.core.fakes import CODES, TEXT, VOCABULARY

LONGEST = 24  # tokens of a document: three images of six codes
FEATURES = 3  # numbers of each
Key = tuple[Any, ...]  # a document as what can be counted


def marked(stop: int) -> st.SearchStrategy[tuple[Tensor, Tensor]]:
    """Ids [n] below `stop`, and which of them are targets, [n] bool."""
    drawn = st.lists(st.integers(0, 2 * stop - 1), min_size=1, max_size=6).map(torch.tensor)
    return drawn.map(lambda numbers: (numbers // 2, numbers % 2 == 1))


def seen(numbers: list[int]) -> tuple[Segment, ...]:
    features = torch.tensor(numbers).float()[:, None].expand(-1, FEATURES)
    return (feature_segment(features, VOCABULARY),)


PARTS = st.one_of(
    marked(TEXT).map(lambda found: (text_segment(found[0], target=found[1]),)),
    marked(CODES).map(lambda found: image_segments(found[0], VOCABULARY, target=found[1])),
    st.integers(1, 3).map(lambda n: (control_segment(*[VOCABULARY.eos_id] * n),)),
    st.lists(st.integers(-9, 9), min_size=1, max_size=4).map(seen),
)
DOCUMENTS = st.lists(PARTS, min_size=1, max_size=3).map(lambda parts: Sequence(sum(parts, ())))
PAIRS = st.builds(
    lambda document, partner: Sequence(document.segments, partner), DOCUMENTS, DOCUMENTS
)
SEQUENCES = st.lists(st.one_of(DOCUMENTS, PAIRS), min_size=1, max_size=8)


def with_a_length(sequences: list[Sequence]) -> st.SearchStrategy[tuple[list[Sequence], int]]:
    """And a length of rows in which the longest fits, and sometimes several do exactly."""
    longest = max(map(len, sequences))
    return st.tuples(st.just(sequences), st.integers(longest, 3 * longest))


Packed = tuple[list[Sequence], int]
PACKED = SEQUENCES.flatmap(with_a_length)


def key(sequence: Sequence) -> Key:
    """Modalities, ids, targets and features of a document, its partner apart."""
    segments = sequence.segments
    ids = [one for segment in segments for one in segment.ids.tolist()]
    target = [one for segment in segments for one in segment.target.tolist()]
    modality = [int(segment.modality) for segment in segments for _ in segment.ids]
    seen = [segment.features for segment in segments if segment.features is not None]
    features = [one for part in seen for one in part[:, 0].tolist()]
    return tuple(zip(modality, ids, target, strict=True)), tuple(features)


def found(batch: Batch) -> list[list[Key]]:
    """The documents of each row of a batch, read off its tensors."""
    features = iter([] if batch.features is None else batch.features[:, 0].tolist())
    tokens = torch.stack([batch.modality, batch.ids, batch.target.long()], dim=-1).tolist()
    positions, numbers = batch.position.tolist(), batch.document.tolist()
    rows = []
    for of_row, position, number in zip(tokens, positions, numbers, strict=True):
        documents: list[Key] = []
        for here in range(max(number) + 1):
            places = [i for i, one in enumerate(number) if one == here]
            assert places == [*range(places[0], places[-1] + 1)]  # in one piece
            assert [position[i] for i in places] == [*range(len(places))]
            document = tuple((of_row[i][0], of_row[i][1], bool(of_row[i][2])) for i in places)
            slots = sum(modality == Modality.FEATURE for modality, *_ in document)
            documents.append((document, tuple(next(features) for _ in range(slots))))
        rows.append(documents)
    assert not list(features)
    return rows


@given(PACKED)
def test_packing_loses_and_repeats_nothing(packed: Packed) -> None:
    sequences, length = packed
    batch = pack(sequences, VOCABULARY, length=length)
    assert batch.ids.shape[1] == length
    given_ = Counter(key(document) for one in sequences for document in one.documents)
    assert Counter(one for row in found(batch) for one in row) == given_


@given(PACKED)
def test_what_a_row_has_left_is_padding(packed: Packed) -> None:
    sequences, length = packed
    batch = pack(sequences, VOCABULARY, length=length)
    padding = batch.is_padding
    assert int((~padding).sum()) == sum(map(len, sequences))
    assert (padding.int().diff(dim=1) >= 0).all()  # all of it on the right
    assert (batch.ids[padding] == VOCABULARY.pad_id).all()
    assert (batch.modality[padding] == Modality.CONTROL).all()
    assert (batch.segment[padding] == NO_DOCUMENT).all()
    assert not batch.target[padding].any()


@given(PACKED)
def test_no_two_rows_would_fit_into_one(packed: Packed) -> None:
    sequences, length = packed
    rows = arrange(sequences, length=length)
    filled = [sum(map(len, row)) for row in rows]
    assert all(filled)
    assert max(filled) <= length
    assert all(a + b > length for i, a in enumerate(filled) for b in filled[:i])


@given(st.lists(PAIRS, min_size=1, max_size=8).flatmap(with_a_length))
def test_partners_stay_side_by_side(packed: Packed) -> None:
    pairs, length = packed
    rows = found(pack(pairs, VOCABULARY, length=length))
    couples = Counter(
        (row[i], row[i + 1])
        for row in rows
        for i in range(0, len(row), 2)  # IndexError for a partner that is elsewhere
    )
    assert couples == Counter((key(one), key(one.partner)) for one in pairs if one.partner)


@given(SEQUENCES)
def test_collating_gives_each_sequence_its_row(sequences: list[Sequence]) -> None:
    batch = collate(sequences, VOCABULARY)
    assert batch.ids.shape == (len(sequences), max(map(len, sequences)))
    assert found(batch) == [[key(document) for document in one.documents] for one in sequences]


@given(SEQUENCES)
def test_rows_are_collated_as_if_alone(sequences: list[Sequence]) -> None:
    length = 2 * LONGEST
    together = collate(sequences, VOCABULARY, length=length)
    apart = concatenate(collate([one], VOCABULARY, length=length) for one in sequences)
    for name in ("ids", "modality", "target", "document", "segment", "position"):
        assert torch.equal(getattr(together, name), getattr(apart, name)), name
    assert found(together) == found(apart)


@given(SEQUENCES, st.data())
def test_rows_bring_their_features_along(sequences: list[Sequence], data: st.DataObject) -> None:
    batch = collate(sequences, VOCABULARY)
    index = data.draw(st.lists(st.integers(0, len(sequences) - 1), min_size=1, max_size=8))
    rows = found(batch)
    for one in (batch, batch.with_host_masks()):
        assert found(one.rows(torch.tensor(index))) == [rows[number] for number in index]


@given(SEQUENCES)
def test_the_prefix_is_what_stands_before_the_first_target(sequences: list[Sequence]) -> None:
    batch = collate(sequences, VOCABULARY)
    for row, one in enumerate(sequences):
        host_masks = [
            [bool(mark) for segment in document.segments for mark in segment.target]
            for document in one.documents
        ]
        expected = [not any(of[: i + 1]) for of in host_masks for i in range(len(of))]
        assert batch.prefix[row][: len(one)].tolist() == expected


@given(DOCUMENTS, st.integers(1, LONGEST))
def test_what_does_not_fit_is_refused(document: Sequence, short: int) -> None:
    length = len(document) - short
    if length < 1:
        return
    for lay_out in (pack, collate):
        with pytest.raises(ValueError, match=f"{len(document)} tokens does not fit in a row of"):
            lay_out([document], VOCABULARY, length=length)
