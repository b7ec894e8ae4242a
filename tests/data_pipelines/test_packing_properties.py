"""Whatever the lengths of documents: the loader packs each of them once, and resumes anywhere."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import torch
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.shards import loader as loader_module
from data_pipelines.shards.loader import build_loader
from data_pipelines.shards.shards import write_shard
from data_pipelines.shards.workers import Loader
from data_pipelines.sources.source import Source
from data_pipelines.sources.text import Text
from mmdlm.core.sequence import Batch
from mmdlm.core.vocabulary import Vocabulary
from tests import properties  # noqa: F401 (its settings)
from tests.data_pipelines.conftest import NumberTokenizer

VOCABULARY = Vocabulary.build(text_size=1000, eos_id=999)
LENGTH = st.integers(2, 20)  # of a document, eos included
ROWS = st.integers(1, 5)
ROOM = st.integers(20, 50)


@contextmanager
def loaders(lengths: list[int], batch_size: int, length: int) -> Iterator[list[Loader]]:
    """Three of them that read the same shard; a document says its number over and over."""
    windows = patch.object(loader_module, "_TOKENS_TOGETHER", 100)  # several of them
    with tempfile.TemporaryDirectory() as folder, windows:
        texts = [
            {"__key__": f"{number:04d}", "txt": b"%d " % number * (count - 1)}
            for number, count in enumerate(lengths)
        ]
        write_shard(Path(folder) / "texts.tar", texts)
        yield [
            build_loader(
                [Source(str(Path(folder) / "texts.tar"), Text(max_tokens=20))],
                VOCABULARY,
                tokenizer=NumberTokenizer(),
                batch_size=batch_size,
                length=length,
                packed=True,
                shuffle_buffer=16,
                repeat=False,
            )
            for _ in range(3)
        ]


def documents(batch: Batch) -> list[list[int]]:
    """The ids of each document of a batch."""
    rows = zip(batch.ids, batch.document, strict=True)
    return [
        ids[document == number].tolist()
        for ids, document in rows
        for number in range(int(document.max()) + 1)
    ]


@given(st.lists(LENGTH, min_size=1, max_size=60), ROWS, ROOM)
def test_every_document_is_packed_once(lengths: list[int], batch_size: int, length: int) -> None:
    with loaders(lengths, batch_size, length) as (loader, *_):
        batches = list(loader)
    found = sorted(one for batch in batches for one in documents(batch))
    assert found == [[n] * (count - 1) + [999] for n, count in enumerate(lengths)]
    assert all(batch.ids.shape == (batch_size, length) for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size
    filled = [int((~row).sum()) for batch in batches for row in batch.is_padding]
    assert min(filled) > 0
    assert sum(filled) == sum(lengths)


@given(st.lists(LENGTH, min_size=30, max_size=60), ROWS, ROOM, st.integers(0, 12))
def test_a_loader_goes_on_where_another_stood(
    lengths: list[int], batch_size: int, length: int, place: int
) -> None:
    with loaders(lengths, batch_size, length) as (undisturbed, stopped, resumed):
        whole = list(undisturbed)
        first = list(islice(stopped, min(place, len(whole) - 1)))
        resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
        rest = list(resumed)
    assert len(first) + len(rest) == len(whole)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(first + rest, whole, strict=True))
