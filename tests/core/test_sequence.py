"""Segments in any order become rows; packing loses nothing and keeps documents apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from mmdlm.core.sequence import (
    NO_DOCUMENT,
    Segment,
    Sequence,
    collate,
    concatenate,
    control_segment,
    feature_segment,
    image_segment,
    image_segments,
    pack,
    text_segment,
)
from mmdlm.core.vocabulary import Modality
from tests.core.fakes import VOCABULARY, document, ragged, with_features


def test_interleaved_segments_keep_their_order():
    sequence = Sequence(
        (
            text_segment([1, 2]),
            *image_segments(torch.tensor([3, 4]), VOCABULARY, target=True),
            text_segment([5], target=True),
            feature_segment(torch.ones(2, 12), VOCABULARY),
            text_segment([6]),
        )
    )
    batch = collate([sequence], VOCABULARY, length=14)
    start = VOCABULARY.image[0]
    begin, end, pad = VOCABULARY.begin_image_id, VOCABULARY.end_image_id, VOCABULARY.pad_id
    assert batch.ids[0].tolist() == [
        *(1, 2, begin, start + 3, start + 4, end, 5, pad, pad, 6),
        *(pad, pad, pad, pad),
    ]
    assert batch.target[0].nonzero().flatten().tolist() == [3, 4, 6]
    assert batch.position[0, :10].tolist() == list(range(10))
    assert batch.segment[0].tolist() == [0, 0, 1, 2, 2, 3, 4, 5, 5, 6, -1, -1, -1, -1]
    assert batch.is_padding[0].nonzero().flatten().tolist() == [10, 11, 12, 13]
    assert batch.of(Modality.FEATURE)[0].nonzero().flatten().tolist() == [7, 8]


def test_target_may_be_part_of_a_segment():
    mask = torch.tensor([True, False, True])
    batch = collate([Sequence((text_segment([1, 2, 3], target=mask),))], VOCABULARY)
    assert batch.target[0].tolist() == [True, False, True]


def test_only_keeps_the_targets_of_one_modality():
    batch = ragged()
    text, image = batch.only(Modality.TEXT), batch.only(Modality.IMAGE)
    assert torch.equal(text.target | image.target, batch.target)
    assert not (text.target & image.target).any()


def test_without_context_hides_text_and_codes_but_not_targets_and_structure():
    batch = ragged()
    bare = batch.without_context(VOCABULARY)
    hidden = ~batch.target & (batch.of(Modality.TEXT) | batch.of(Modality.IMAGE))
    assert (bare.ids[hidden] == VOCABULARY.mask_id).all()
    assert torch.equal(bare.ids[~hidden], batch.ids[~hidden])
    assert not with_features().without_context(VOCABULARY).features.any()


def test_pack_keeps_every_document_whole():
    documents = [document(n, k, seed=n) for n, k in ((5, 4), (3, 0), (9, 8), (1, 4), (2, 2))]
    batch = pack(documents, VOCABULARY, length=24)
    found = []
    for row in range(len(batch)):
        for number in range(int(batch.document[row].max()) + 1):
            here = batch.document[row] == number
            assert batch.position[row, here].tolist() == list(range(int(here.sum())))
            found.append(batch.ids[row, here].tolist())
    alone = [
        collate([d], VOCABULARY).ids[0].tolist() for d in sorted(documents, key=len, reverse=True)
    ]
    assert sorted(found) == sorted(alone)
    assert len(batch) < len(documents)


def test_pack_reuses_room():
    batch = pack([document(6, 0), document(4, 0), document(4, 0)], VOCABULARY, length=12)
    assert len(batch) == 2  # 8 and 6 + 6, border markers included
    assert (batch.document[1] != NO_DOCUMENT).sum() == 12


def test_concatenate_stacks_rows_and_features():
    batch = with_features()
    twice = concatenate([batch, batch])
    assert torch.equal(twice.ids, torch.cat([batch.ids, batch.ids]))
    assert torch.equal(twice.features, torch.cat([batch.features, batch.features]))
    assert concatenate([ragged()]).features is None
    with pytest.raises(ValueError, match="lengths"):
        concatenate([batch, ragged()])


def test_too_long_a_sequence_is_refused():
    with pytest.raises(ValueError, match="11 tokens does not fit in a row of 8"):
        pack([document(9, 0)], VOCABULARY, length=8)


def test_nothing_to_collate_is_refused():
    with pytest.raises(ValueError, match="no sequences"):
        collate([], VOCABULARY)


def test_features_and_slots_must_agree():
    batch = with_features()
    with pytest.raises(ValueError, match="5 FEATURE slots but 4 feature rows"):
        type(batch)(
            **{name: getattr(batch, name) for name in batch.__dataclass_fields__}
            | {"features": batch.features[:4]}
        )


def test_segments_refuse_what_makes_no_sense():
    ids, mark = torch.tensor([1, 2]), torch.tensor([True, True])
    with pytest.raises(ValueError, match="CONTROL tokens cannot be targets"):
        Segment(Modality.CONTROL, ids, mark)
    with pytest.raises(ValueError, match="target marks"):
        text_segment(ids, target=torch.tensor([True]))
    with pytest.raises(ValueError, match="features or views"):
        Segment(Modality.TEXT, ids, mark, features=torch.ones(2, 4))
    assert not control_segment(3).target.any()


def test_to_moves_everything():
    batch = with_features()
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.ids, batch.ids)
    assert torch.equal(moved.features, batch.features)
    assert ragged().to("cpu").features is None


@dataclass(frozen=True)
class _Pixels:
    """Views that fill one slot for each of their pixels."""

    pixels: torch.Tensor
    places: torch.Tensor | None = None

    @property
    def slots(self) -> int:
        return len(self.pixels)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> _Pixels:
        return _Pixels(function(self.pixels), self.places)


def test_views_of_images_travel_with_the_batch() -> None:
    def document(n: int) -> Sequence:
        return Sequence((text_segment([1]), image_segment(_Pixels(torch.ones(n)), VOCABULARY)))

    batch = collate([document(2), document(3)], VOCABULARY)
    assert batch.views is not None
    assert [one.slots for one in batch.views] == [2, 3]
    twice = concatenate([batch, batch]).to("cpu")
    assert twice.views is not None
    assert [one.slots for one in twice.views] == [2, 3, 2, 3]
    with pytest.raises(ValueError, match="5 FEATURE slots but 2 feature rows"):
        replace(batch, views=batch.views[:1])
    seen = replace(batch, features=torch.zeros(5, 4), views=None)
    with pytest.raises(ValueError, match="compute all"):
        concatenate([batch, seen])


def test_text_goes_on_behind_the_furthest_place_of_a_image() -> None:
    places = torch.tensor([[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]])  # rows and columns
    image = image_segment(_Pixels(torch.ones(6), places), VOCABULARY)
    seeing = Sequence((text_segment([1, 2]), image, text_segment([3, 4]), image))
    blind = Sequence((text_segment([5, 6, 7]),))
    expected = [[0, 0], [1, 1], *(places + 2).tolist(), [5, 5], [6, 6], *(places + 7).tolist()]
    text = [[0, 0], [1, 1], [2, 2]]

    packed = pack([seeing, blind], VOCABULARY, length=20)
    assert packed.axes is not None
    assert packed.axes[0].tolist() == [*expected, *text, [0, 0]]
    assert packed.position[0, :16].tolist() == list(range(16))
    padded = collate([blind, seeing], VOCABULARY)
    assert padded.axes is not None
    assert padded.axes[1].tolist() == expected
    assert padded.axes[0].tolist() == [*text, *[[0, 0]] * 13]
    assert collate([blind], VOCABULARY).axes is None

    alone = [collate([one], VOCABULARY, length=16) for one in (blind, seeing)]
    joined = concatenate(alone).to("cpu")
    assert joined.axes is not None
    assert torch.equal(joined.axes, padded.axes)
    assert concatenate(alone[:1] * 2).axes is None
