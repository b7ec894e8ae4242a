"""Images seen through an adapter: their order, their slots, and whose features are taken."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines.shards.loader import build_loader
from data_pipelines.shards.shards import Sample, read_shard, write_shard
from data_pipelines.sources.image_text import ImageText
from data_pipelines.sources.source import BROKEN_CONTENT, Source
from data_pipelines.sources.vision_samples import (
    Eye,
    SeenCaption,
    Through,
    attach_vision,
    feature_fields,
    fingerprint,
    numbered,
)
from mmdlm.core.sequence import Batch, Sequence, collate
from mmdlm.core.vocabulary import Modality, Vocabulary
from mmdlm.vision.encoders.adapter import VisionAdapter
from mmdlm.vision.encoders.crops import CropViews
from tests.data_pipelines.tiny_vision import SQUARE, TILES, adapter, plain

EOS = 999


def sample(**fields: Any) -> Sample:
    given = {name.replace("_", "."): value for name, value in fields.items()}
    return {"__key__": "k", "__url__": "x.tar", **given}


def read(
    to_sequence: Any, fields: Sample, vocabulary: Vocabulary, tokenizer: Any, eye: Eye | None = None
) -> Sequence:
    return Through(to_sequence, eye or Eye(SQUARE))(
        fields, vocabulary, tokenizer=tokenizer, generator=torch.Generator().manual_seed(0)
    )


def reds(views: list[CropViews]) -> list[int]:
    return [int(image.crops[0, 0, 0, 0]) for image in views]


# ---- images of a sample -----------------------------------------------------------------------


def test_images_come_in_the_order_of_their_numbers() -> None:
    names = {"10.png": 10, "2.jpeg": 2, "0.png": 0}
    fields = {"txt": b"x", **{name: plain(red) for name, red in names.items()}}
    fields["2.jpeg"] = plain(2)
    assert reds(Eye(SQUARE).views(fields)) == [0, 2, 10]
    assert reds(Eye(SQUARE).views({"png": plain(7)})) == [7]
    assert Eye(SQUARE).views({"txt": b"x", "mask.png": plain(1)}) == []


@pytest.mark.parametrize("names", [("png", "jpg"), ("png", "0.png"), ("1.png", "1.jpg")])
def test_images_without_an_order(names: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="no order among its images"):
        Eye(SQUARE).views({name: plain(1) for name in names})


def test_a_shard_keeps_the_names_of_several_images(tmp_path: Path) -> None:
    write_shard(
        tmp_path / "x.tar",
        [{"__key__": "a.b/c", "0.png": plain(0), "1.png": plain(1), "json": b"{}"}],
    )
    (stored,) = read_shard(str(tmp_path / "x.tar"))
    assert set(stored) - {"__url__"} == {"__key__", "0.png", "1.png", "json"}


# ---- captions -----------------------------------------------------------------------------------


def test_a_caption_is_target_and_its_image_context(vocabulary, tokenizer) -> None:
    fields = sample(png=plain(3), txt=b"11 12")
    batch = collate([read(SeenCaption(5), fields, vocabulary, tokenizer)], vocabulary)
    assert batch.modality[0].tolist() == [Modality.FEATURE] * 4 + [Modality.TEXT] * 5
    assert batch.target[0].tolist() == [False] * 4 + [True] * 5
    assert batch.ids[0, 4:].tolist() == [11, 12, EOS, EOS, EOS]
    (views,) = batch.views
    assert isinstance(views, CropViews)
    assert views.crops.dtype == torch.uint8
    assert reds([views]) == [3]


def test_several_images_of_a_caption_come_first(vocabulary, tokenizer) -> None:
    fields = {**sample(txt=b"11"), "1.png": plain(1), "0.png": plain(0)}
    sequence = read(SeenCaption(2), fields, vocabulary, tokenizer)
    assert [segment.modality for segment in sequence.segments] == [
        Modality.FEATURE,
        Modality.FEATURE,
        Modality.TEXT,
    ]
    assert reds([s.views for s in sequence.segments[:2]]) == [0, 1]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"txt": b"1"}, "no image among its fields"),
        ({"png": plain(1)}, "no 'txt'"),
        ({"png": plain(1), "txt": b"1 2 3"}, "needs 3 tokens and eos but text_slots is 3"),
        ({"png": plain(1, (1, 1)), "txt": b"1"}, "1x1 pixels is too small"),
        ({"png": plain(1)[:40], "txt": b"1"}, "damaged, cut off"),
        ({"features.json": b"{}"}, "features.json is damaged"),
        ({"features.json": b'{"fingerprint": "a", "layouts": [{"x": 1}]}'}, "is damaged"),
    ],
)
def test_samples_that_cannot_be_used(fields, message, vocabulary, tokenizer) -> None:
    with pytest.raises(BROKEN_CONTENT, match=message):
        read(SeenCaption(3), {**sample(), **fields}, vocabulary, tokenizer)


# ---- features -----------------------------------------------------------------------------------


def extracted(eye: VisionAdapter, fields: Sample, dtype: Any = np.float32) -> Sample:
    seen = eye.look(Eye(eye.config.tiling).views(fields))
    return feature_fields(fields, seen, made_by=fingerprint(eye), dtype=np.dtype(dtype))


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-6), (np.float16, 2e-2)])
def test_features_come_back_as_if_the_tower_had_looked(dtype: Any, tolerance: float) -> None:
    eye = adapter(TILES)
    fields = {"2.png": plain(20, (11, 19)), "0.png": plain(10, (16, 8))}
    pixels = Eye(TILES).views(fields)
    stored = extracted(eye, fields, dtype)
    assert set(stored) == {"0.features.npy", "2.features.npy", "features.json"}
    views = Eye(TILES, fingerprint(eye)).views(stored)
    assert all(image.seen for image in views)
    assert [v.layout for v in views] == [v.layout for v in pixels]
    torch.testing.assert_close(eye(views), eye(pixels), atol=tolerance, rtol=0)


def test_features_of_one_image_have_no_number() -> None:
    assert set(extracted(adapter(), {"jpg": plain(1)})) == {"features.npy", "features.json"}


def test_features_too_large_for_their_storage() -> None:
    eye = adapter()
    (views,) = eye.look(Eye(SQUARE).views({"png": plain(1)}))
    large = [views.map(lambda x: x * 1e7)]
    with pytest.raises(ValueError, match="do not fit in float16"):
        feature_fields({"png": b""}, large, made_by="", dtype=np.dtype(np.float16))


def test_the_fingerprint_is_of_what_the_features_depend_on() -> None:
    eye = adapter()
    same = adapter(projector="linear")
    same.tower.load_state_dict(eye.tower.state_dict())
    assert fingerprint(same) == fingerprint(eye)  # only the projector differs
    with torch.no_grad():
        for parameter in eye.tower.idle_parameters():
            parameter.add_(1.0)
    assert fingerprint(same) == fingerprint(eye)  # what lies behind the selected layer
    for other in (adapter(seed=1), adapter(mean=(0.4, 0.5, 0.5)), adapter(TILES)):
        if other.config.tiling == TILES or other.config.mean[0] == 0.4:
            other.tower.load_state_dict(eye.tower.state_dict())
        assert fingerprint(other) != fingerprint(eye)


# ---- sources ------------------------------------------------------------------------------------


@pytest.fixture
def shard(tmp_path: Path):
    def write(name: str, samples: list[Sample]) -> str:
        numbered_samples = [{"__key__": f"{n:03d}", **one} for n, one in enumerate(samples)]
        write_shard(tmp_path / name, numbered_samples)
        return str(tmp_path / name)

    return write


def captioned(numbers: range, eye: VisionAdapter | None = None) -> list[Sample]:
    images = [{"png": plain(n), "txt": b"%d" % n} for n in numbers]
    if eye is None:
        return images
    return [{"txt": one["txt"], **extracted(eye, one)} for one in images]


def loader(sources: list[Source], vocabulary: Vocabulary, tokenizer: Any, **options: Any):
    given = {"batch_size": 2, "length": 10, "shuffle_buffer": 5, "repeat": False, **options}
    return build_loader(sources, vocabulary, tokenizer=tokenizer, **given)


def pairs(batch: Batch) -> list[tuple[int, int]]:
    """(number in the image, number in the text) of each document."""
    texts = batch.ids[batch.target & (batch.ids != EOS)].tolist()
    return list(zip(reds(list(batch.views)), texts, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_each_image_stays_with_its_text(
    workers: int, packed: bool, shard, vocabulary, tokenizer
) -> None:
    """Through packing and worker processes; every sample once."""
    urls = [shard("a.tar", captioned(range(6))), shard("b.tar", captioned(range(6, 12)))]
    sources = attach_vision([Source(urls, SeenCaption(2))], adapter())
    options = {"packed": packed, "length": 19, "num_workers": workers}
    batches = list(loader(sources, vocabulary, tokenizer, **options))
    found = [pair for batch in batches for pair in pairs(batch)]
    assert sorted(found) == [(n, n) for n in range(12)]
    if packed:
        assert max(len(batch.views) for batch in batches) == 6
    assert pickle.loads(pickle.dumps(batches[0])).views[0].slots == 4


def test_a_image_with_more_slots_than_a_row(shard, vocabulary, tokenizer) -> None:
    sources = attach_vision(
        [Source(shard("a.tar", captioned(range(2))), SeenCaption(2))], adapter()
    )
    with pytest.raises(ValueError, match="sample 00.: 6 tokens do not fit in a row of 5"):
        list(loader(sources, vocabulary, tokenizer, length=5, max_broken=0.0))


def test_other_sources_stay_as_they_are(number_shards) -> None:
    text = Source(number_shards(1, 3), ImageText())
    assert attach_vision([text], None) == [text]
    assert attach_vision([text], adapter()) == [text]


def test_images_for_a_model_without_eyes(shard) -> None:
    source = Source(shard("a.tar", captioned(range(1))), SeenCaption())
    with pytest.raises(ValueError, match=r"a.tar: SeenCaption needs a model that sees"):
        attach_vision([source], None)


def test_features_are_read_for_their_own_tower_when_it_is_frozen(
    shard, vocabulary, tokenizer
) -> None:
    eye = adapter()
    source = Source(shard("a.tar", captioned(range(4), eye)), SeenCaption(2))
    with pytest.raises(
        ValueError, match="through which the tower cannot learn; freeze vision_tower"
    ):
        attach_vision([source], eye)
    eye.tower.requires_grad_(False)
    batches = list(loader(attach_vision([source], eye), vocabulary, tokenizer))
    assert all(image.seen for batch in batches for image in batch.views)

    other = adapter(seed=1)
    other.tower.requires_grad_(False)
    with pytest.raises(ValueError, match=r"a.tar holds features of another vision tower"):
        attach_vision([source], other)


def test_a_later_sample_of_another_tower_is_broken(shard, vocabulary, tokenizer) -> None:
    eye = adapter()
    eye.tower.requires_grad_(False)
    mixed = captioned(range(1), eye) + captioned(range(1, 2), adapter(seed=1))
    sources = attach_vision([Source(shard("a.tar", mixed), SeenCaption(2))], eye)
    with pytest.raises(ValueError, match="sample 001: it holds features of another vision tower"):
        list(loader(sources, vocabulary, tokenizer, max_broken=0.0))


def test_numbers_are_compared_as_numbers() -> None:
    field = re.compile(r"(?:(\d+)\.)?x")
    assert numbered({"10.x": b"", "9.x": b"", "y": b""}, field) == ["9.x", "10.x"]
    with pytest.raises(ValueError, match="no order"):
        numbered({"1.x": b"", "01.x": b""}, field)
