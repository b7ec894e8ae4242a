from __future__ import annotations

import json
from itertools import chain, islice
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from data_pipelines.shards import loader as loader_module
from data_pipelines.shards import workers
from data_pipelines.shards.images import image_loader
from data_pipelines.shards.loader import build_loader
from data_pipelines.shards.shards import write_shard
from data_pipelines.shards.stream import Reader
from data_pipelines.sources.image_text import ImageText, Tasks
from data_pipelines.sources.source import Source
from data_pipelines.sources.text import Text
from data_pipelines.write_shards import png_bytes
from mmdlm.core.sequence import Batch

FIELDS = ("ids", "modality", "target", "document", "segment", "position")


@pytest.fixture
def make(number_shards, vocabulary, tokenizer):
    urls = number_shards(4, 12)

    def build(sources=None, **options):
        given = {"batch_size": 3, "length": 12, "shuffle_buffer": 10, "seed": 1, **options}
        return build_loader(
            sources or [Source(urls, ImageText(Tasks(0, 0, 1), text_slots=4))],
            vocabulary,
            tokenizer=tokenizer,
            **given,
        )

    return build


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in FIELDS)


def texts(batches) -> list[int]:
    """Numbers of the samples: the first token of each text."""
    return [int(row[-4]) for batch in batches for row in batch.ids]


def test_shapes(make, vocabulary):
    batch = next(iter(make(length=10)))
    assert batch.ids.shape == (3, 10)
    assert not batch.is_padding.any()


def test_row_length_is_fixed(make):
    assert next(iter(make(length=30))).ids.shape == (3, 30)


@pytest.mark.parametrize("workers", [0, 2])
def test_two_nodes_share_one_pass(make, workers):
    loaders = [
        make(length=10, num_workers=workers, rank=rank, world_size=2, repeat=False)
        for rank in range(2)
    ]
    found = [texts(loader) for loader in loaders]
    assert sorted(chain.from_iterable(found)) == list(range(48))


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("repeat", [False, True])
def test_resume_at_every_batch(make, packed, repeat):
    options = {"packed": packed, "repeat": repeat, "length": 25 if packed else 12}
    loader = make(**options)
    states, batches = [loader.state_dict()], []
    for batch in islice(loader, 25):
        batches.append(batch)
        states.append(loader.state_dict())
    assert len(batches) > 5
    # a single pass that is over starts again
    for place, state in enumerate(json.loads(json.dumps(states[: len(batches)]))):
        again = make(**options)
        again.load_state_dict(state)
        rest = list(islice(again, 25 - place))
        assert len(rest) == len(batches) - place
        assert all(map(same, rest, batches[place:]))


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("repeat", [False, True])
def test_resume_with_workers(make, packed, repeat, monkeypatch):
    monkeypatch.setattr(loader_module, "_TOKENS_TOGETHER", 60)  # windows of three batches
    options = {"num_workers": 2, "repeat": repeat, "batch_size": 5, "length": 10, "packed": packed}
    if packed:
        options |= {"batch_size": 1, "length": 20}
    loader = make(**options)
    states, batches = [loader.state_dict()], []
    for batch in islice(loader, 12):
        batches.append(batch)
        states.append(loader.state_dict())
    for place in (0, 1, 2, 3, 7):
        again = make(**options)
        again.load_state_dict(json.loads(json.dumps(states[place])))
        rest = list(islice(again, 12 - place))
        assert len(rest) == len(batches) - place
        assert all(map(same, rest, batches[place:]))


def test_iterating_again_goes_on(make):
    loader, whole = make(), list(islice(make(), 9))
    got = [*islice(loader, 4), *islice(loader, 5)]
    assert all(map(same, got, whole))


def test_a_single_pass_can_be_made_again(make):
    loader = make(repeat=False)
    first, second = list(loader), list(loader)
    assert len(first) == 16
    assert all(map(same, first, second))


def test_state_of_other_settings(make):
    state = make().state_dict()
    with pytest.raises(ValueError, match="batch_size was 3 and is 4; num_workers was 0 and is 2"):
        make(batch_size=4, num_workers=2).load_state_dict(state)


def test_a_state_does_not_change_afterwards(make):
    loader = make()
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    before = json.dumps(state)
    list(islice(batches, 5))
    assert json.dumps(state) == before


def test_packing_fills_rows_and_loses_nothing(make, number_shards, vocabulary):
    sources = [Source(number_shards(3, 30, folder="texts"), Text(max_tokens=6))]  # 2 tokens each
    batches = list(make(sources, packed=True, repeat=False, length=7, batch_size=4))
    documents = [
        int(batch.ids[row][batch.document[row] == document][0])
        for batch in batches
        for row in range(len(batch))
        for document in range(int(batch.document[row].max()) + 1)
    ]
    assert sorted(documents) == list(range(90))
    full = batches[:-1]
    assert all(len(batch) == 4 and (~batch.is_padding).sum() == 4 * 6 for batch in full)
    assert all((batch.position[batch.document >= 0] < 2).all() for batch in batches)


# Tokens of a question and its answer in GSM8K: the shortest, quantiles, the longest.
GSM8K = {0: 53, 0.05: 80, 0.25: 110, 0.5: 142, 0.75: 182, 0.95: 262, 0.99: 323, 1: 452}


@pytest.mark.parametrize("batch_size", [4, 48])
def test_documents_of_real_lengths_leave_little_padding(make, tmp_path, batch_size):
    generator = torch.Generator().manual_seed(0)
    lengths = np.interp(torch.rand(1200, generator=generator), list(GSM8K), list(GSM8K.values()))
    texts = [
        {"__key__": f"{n:04d}", "txt": b"1 " * int(count - 1)} for n, count in enumerate(lengths)
    ]
    write_shard(tmp_path / "texts.tar", texts)
    sources = [Source(str(tmp_path / "texts.tar"), Text(max_tokens=512))]
    options = {"packed": True, "length": 512, "batch_size": batch_size, "repeat": False}
    batches = list(make(sources, **options))
    tokens = sum(int((~batch.is_padding).sum()) for batch in batches)
    assert tokens == sum(int(count) for count in lengths)  # none is lost
    full = batches[: -(-64 // batch_size)]  # of a window that the end of the data did not cut short
    padding = [float(batch.is_padding.float().mean()) for batch in full]
    assert fmean(padding) < 0.05
    assert max(padding) < 0.2  # the rows of short documents are spread over the batches


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_samples_reach_the_tally_and_stop_the_run(make, workers, number_shards):
    urls = number_shards(1, 40, folder="cut")
    data = Path(urls[0]).read_bytes()
    Path(urls[0]).write_bytes(data[: len(data) // 2])
    sources = [Source(urls, Text(max_tokens=6))]
    loader = make(sources, num_workers=workers, repeat=False)
    list(islice(loader, 3))
    loader = make(sources, num_workers=workers, max_broken=0.0)
    with pytest.raises(ValueError, match=rf"{urls[0]}, rest of the shard: ") as caught:
        list(islice(loader, 30))
    assert "Traceback" not in str(caught.value)


def test_tally(make, number_shards):
    sources = [Source(number_shards(2, 20, folder="t"), Text(max_tokens=6), w) for w in (1, 2)]
    loader = make(sources, num_workers=2)
    list(islice(loader, 10))
    first, second = loader.stats()
    assert first["good"] + second["good"] == 30
    assert first["broken"] == 0


def test_commands_are_run_only_where_a_source_allows_it(make, number_shards, tmp_path):
    (url,) = number_shards(1, 4)
    command = f"pipe:touch {tmp_path}/ran; cat {url}"
    to_sequence = Text(max_tokens=6)
    with pytest.raises(ValueError, match="allow_pipe"):
        make([Source(command, to_sequence)])
    assert not (tmp_path / "ran").exists()
    loader = make([Source(command, to_sequence, allow_pipe=True)], repeat=False)
    assert sum(len(batch.ids) for batch in loader) == 4
    assert (tmp_path / "ran").exists()


def test_nothing_usable(make, number_shards):
    sources = [Source(number_shards(1, 2, folder="t"), ImageText(text_slots=1))]
    with pytest.raises(ValueError, match="no sample that can be used"):
        list(make(sources, repeat=False, max_broken=1.0))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"length": 0}, "length is 0"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"max_broken": 2.0}, "max_broken is 2.0"),
        ({"rank": 2, "world_size": 2}, "rank is 2"),
    ],
)
def test_numbers_out_of_range(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_no_sources(vocabulary, tokenizer):
    with pytest.raises(ValueError, match="sources is empty"):
        build_loader([], vocabulary, tokenizer=tokenizer, batch_size=1, length=1)


def test_no_shards(make):
    with pytest.raises(ValueError, match=r"nowhere/\*\.tar"):
        make([Source("nowhere/*.tar", Text(max_tokens=6))])


class TestImages:
    @pytest.fixture
    def urls(self, tmp_path):
        def sample(number):
            image = Image.new("RGB", (6, 4), (number, 0, 0))
            weight = b"1" if number % 3 == 0 else b"0.1"
            return {"__key__": f"{number:03d}", "png": png_bytes(image), "txt": weight}

        paths = [tmp_path / f"{shard}.tar" for shard in range(3)]
        for shard, path in enumerate(paths):
            write_shard(path, map(sample, range(shard * 7, shard * 7 + 7)))
        return [str(path) for path in paths]

    def load(self, urls, **options):
        return image_loader(urls, batch_size=4, image_size=2, shuffle_buffer=9, **options)

    @pytest.mark.parametrize("num_workers", [0, 1, 2])
    def test_batches(self, urls, num_workers):
        batches = list(islice(self.load(urls, num_workers=num_workers), 21))
        assert all(batch.shape == (4, 3, 2, 2) for batch in batches)
        reds = ((torch.cat(batches)[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
        assert set(reds) == set(range(21))
        if num_workers < 2:  # each has epochs of its own
            assert sorted(reds) == sorted([*range(21)] * 4)

    def test_sampling_weights(self, urls):
        batches = list(islice(self.load(urls, sampling_weight="txt"), 84))
        reds = ((torch.cat(batches)[:, 0, 0, 0] + 1) * 127.5).round().int()
        assert 0.75 < float((reds % 3 == 0).double().mean()) < 0.9  # 7 of 7 + 14 / 10

    @pytest.mark.slow
    @pytest.mark.parametrize("num_workers, weight", [(0, None), (2, None), (0, "txt")])
    def test_resume_at_every_batch(self, urls, num_workers, weight):
        options = {"seed": 2, "num_workers": num_workers, "sampling_weight": weight}
        loader = self.load(urls, **options)
        states, batches = [loader.state_dict()], []
        for batch in islice(loader, 12):
            batches.append(batch)
            states.append(loader.state_dict())
        for place, state in enumerate(json.loads(json.dumps(states))):
            again = self.load(urls, **options)
            again.load_state_dict(state)
            rest = list(islice(again, 12 - place))
            assert all(map(torch.equal, rest, batches[place:]))

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_a_broken_image_is_named(self, urls, num_workers):
        write_shard(Path(urls[1]), [{"__key__": "bad", "png": b"\x89PNG"}])
        with pytest.raises(ValueError, match=rf"{urls[1]}, sample bad"):
            list(islice(self.load(urls, max_broken=0.0, num_workers=num_workers), 19))

    def test_broken_images_are_counted(self, urls):
        write_shard(Path(urls[1]), [{"__key__": "bad", "png": b"\x89PNG"}])
        loader = self.load(urls, max_broken=0.5, num_workers=2)
        list(islice(loader, 8))
        (stats,) = loader.stats()
        assert stats["good"] >= 32
        assert stats["broken"] >= 1
        assert {one["key"] for one in stats["listed"]} == {"bad"}

    def test_a_state_of_other_settings(self, urls):
        state = self.load(urls).state_dict()
        with pytest.raises(ValueError, match="image_size was 2 and is 3"):
            image_loader(urls, batch_size=4, image_size=3, shuffle_buffer=9).load_state_dict(state)


def test_a_gpu_has_workers_that_pin(make, monkeypatch):
    """Their batches lie in page-locked memory, unless somebody has chosen otherwise."""
    given = []

    class Recorded(DataLoader):
        def __init__(self, *arguments, **options):
            given.append((options["num_workers"], options["pin_memory"]))
            super().__init__(*arguments, **{**options, "pin_memory": False})

    monkeypatch.setattr(workers, "DataLoader", Recorded)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    next(iter(make(num_workers=None, pin_memory=True)))
    next(iter(make(num_workers=1, pin_memory=True)))
    next(iter(make(num_workers=1)))
    assert given == [(2, True), (1, True), (1, False)]
    for on_this_process in ({"num_workers": None}, {"num_workers": 0, "pin_memory": True}):
        next(iter(make(**on_this_process)))
    assert len(given) == 3
    pinned = []
    monkeypatch.setattr(Batch, "pin_memory", lambda batch: pinned.append(batch) or batch)
    next(workers._parts(make().make, 0, Reader(), None)).pin_memory()
    assert len(pinned) == 1
