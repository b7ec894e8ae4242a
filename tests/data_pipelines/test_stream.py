from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import pytest

from data_pipelines.shards.sample_stats import BrokenSample, SampleStats
from data_pipelines.shards.shards import write_shard
from data_pipelines.shards.stream import Reader, SequenceStream, ShardStream, permutation
from data_pipelines.sources.source import Source, ToSequence
from data_pipelines.sources.text import Text
from mmdlm.core.sequence import Sequence, text_segment
from tests.data_pipelines.conftest import number_sample


def numbers(stream, n=None):
    return [int(item["__key__"]) for item in islice(stream, n)]


def one_pass(urls, **options):
    return numbers(ShardStream(urls, repeat=False, **options))


class TestOrder:
    def test_without_shuffling_nothing_moves(self, number_shards):
        urls = number_shards(3, 5)
        assert one_pass(urls) == list(range(15))
        assert numbers(ShardStream(urls), 40) == [*range(15), *range(15), *range(10)]

    @pytest.mark.parametrize("buffer", [1, 4, 7, 15, 100])
    def test_each_epoch_has_every_sample_once_in_an_order_of_its_own(self, number_shards, buffer):
        stream = ShardStream(number_shards(3, 5), shuffle_buffer=buffer, seed=3)
        epochs = [tuple(numbers(stream, 15)) for _ in range(4)]
        assert all(sorted(epoch) == list(range(15)) for epoch in epochs)
        assert len(set(epochs)) > 1

    def test_the_seed_decides(self, number_shards):
        urls = number_shards(3, 5)
        first = one_pass(urls, shuffle_buffer=8, seed=1)
        assert one_pass(urls, shuffle_buffer=8, seed=1) == first
        assert one_pass(urls, shuffle_buffer=8, seed=2) != first

    def test_permutation(self):
        assert sorted(permutation(50, "a", 1)) == list(range(50))
        assert permutation(50, "a", 1) == permutation(50, "a", 1) != permutation(50, "a", 2)


class TestReaders:
    @pytest.mark.parametrize("shards, samples", [(8, 3), (5, 4), (4, 6), (3, 7), (1, 20)])
    @pytest.mark.parametrize("buffer", [0, 5])
    def test_readers_share_without_overlap(self, number_shards, shards, samples, buffer):
        urls = number_shards(shards, samples)
        readers = [  # 2 nodes x 2 workers
            one_pass(urls, reader=Reader(number, 4), shuffle_buffer=buffer) for number in range(4)
        ]
        assert sorted(chain.from_iterable(readers)) == list(range(shards * samples))

    def test_every_epoch_is_shared_so(self, number_shards):
        urls = number_shards(4, 5)
        streams = [ShardStream(urls, reader=Reader(i, 4), shuffle_buffer=3) for i in range(4)]
        for _ in range(3):
            assert sorted(n for s in streams for n in numbers(s, 5)) == list(range(20))

    def test_too_many_readers_for_an_endless_stream(self, number_shards):
        urls = number_shards(1, 2)
        with pytest.raises(ValueError, match="no sample for reader 3 of 4"):
            next(ShardStream(urls, reader=Reader(3, 4)))

    def test_reader_out_of_range(self):
        with pytest.raises(ValueError, match="reader 2 of 2"):
            Reader(2, 2)


class TestResume:
    @pytest.mark.parametrize("buffer", [0, 1, 4, 100])
    @pytest.mark.parametrize("repeat", [True, False])
    @pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
    def test_at_every_place(self, number_shards, buffer, repeat, cache_bytes):
        options = {
            "shuffle_buffer": buffer,
            "repeat": repeat,
            "seed": 5,
            "reader": Reader(1, 2),
            "cache_bytes": cache_bytes,
        }
        urls = number_shards(5, 4)
        stream = ShardStream(urls, **options)
        states, items = [stream.state_dict()], []
        for item in islice(stream, 30):
            items.append(item)
            states.append(stream.state_dict())
        for place, state in enumerate(json.loads(json.dumps(states))):
            again = ShardStream(urls, **options)
            again.load_state_dict(state)
            assert again.state_dict() == state
            assert list(islice(again, 30 - place)) == items[place:]

    def test_back_to_a_place_in_the_same_stream(self, number_shards):
        stream = ShardStream(number_shards(3, 5), shuffle_buffer=4)
        numbers(stream, 7)
        state = stream.state_dict()
        first = numbers(stream, 20)
        stream.load_state_dict(state)
        assert numbers(stream, 20) == first


class TestSamplingWeight:
    """Numbers n with the weight of their JSON field: 1, 1/2, 1/4, 1/5 in turn."""

    WEIGHTS = (1.0, 0.5, 0.25, 0.2)

    def weighted_shards(self, folder, weights=WEIGHTS, samples=40):
        paths = [folder / f"{shard:06d}.tar" for shard in range(2)]
        for shard, path in enumerate(paths):
            rows = [
                number_sample(n) for n in range(shard * samples // 2, (shard + 1) * samples // 2)
            ]
            for row in rows:
                weight = weights[int(row["__key__"]) % len(weights)]
                row["json"] = json.dumps({"share": weight}).encode()
            write_shard(path, rows)
        return [str(path) for path in paths]

    def test_an_epoch_contains_a_sample_with_its_probability(self, tmp_path):
        urls = self.weighted_shards(tmp_path)
        epochs, counts = 1000, Counter()
        stream = ShardStream(urls, sampling_weight="json.share", cache_bytes=1 << 20)
        counts = Counter(numbers(stream, int(epochs * 40 * sum(self.WEIGHTS) / 4)))
        for number in range(40):
            share = self.WEIGHTS[number % 4]
            error = (share * (1 - share) / epochs) ** 0.5
            assert abs(counts[number] / epochs - share) < 5 * error + 0.01

    def test_epochs_differ_and_the_seed_decides(self, tmp_path):
        urls = self.weighted_shards(tmp_path)
        first = one_pass(urls, sampling_weight="json.share", seed=1)
        assert one_pass(urls, sampling_weight="json.share", seed=1) == first
        assert one_pass(urls, sampling_weight="json.share", seed=2) != first
        assert set(range(0, 40, 4)) <= set(first) < set(range(40))

    @pytest.mark.slow
    @pytest.mark.parametrize("buffer", [0, 4, 100])
    def test_resumes_at_every_place(self, tmp_path, buffer):
        urls = self.weighted_shards(tmp_path)
        options = {"sampling_weight": "json.share", "shuffle_buffer": buffer, "seed": 5}
        stream = ShardStream(urls, **options)
        states, items = [stream.state_dict()], []
        for item in islice(stream, 60):
            items.append(item)
            states.append(stream.state_dict())
        for place, state in enumerate(states):
            again = ShardStream(urls, **options)
            again.load_state_dict(state)
            assert list(islice(again, 60 - place)) == items[place:]

    @pytest.mark.parametrize("weight", [0, -1, 1.5, "much", None, [1], float("nan")])
    def test_what_is_no_weight_is_a_broken_sample(self, tmp_path, weight):
        urls = self.weighted_shards(tmp_path, weights=(weight,), samples=4)
        broken = list(ShardStream(urls, sampling_weight="json.share", repeat=False))
        assert len(broken) == 4
        assert all("json.share is" in one.reason and "(0, 1]" in one.reason for one in broken)

    def test_an_absent_field_is_named(self, number_shards):
        (broken, *_) = ShardStream(number_shards(1, 2), sampling_weight="json.share", repeat=False)
        assert "its json has no 'share'" in broken.reason

    def test_fields_that_nobody_else_reads_are_kept_for_it(self, tmp_path):
        urls = self.weighted_shards(tmp_path)
        stream = ShardStream(urls, fields=("txt",), sampling_weight="json.share", repeat=False)
        assert set(next(stream)) == {"__key__", "__url__", "txt", "json"}


class TestMemory:
    def test_small_data_is_read_once(self, number_shards):
        urls = number_shards(2, 5)
        stream = ShardStream(urls, shuffle_buffer=10, cache_bytes=1 << 20)
        expected = numbers(ShardStream(urls, shuffle_buffer=10), 50)
        got = numbers(stream, 25)
        for url in urls:
            Path(url).unlink()
        assert got + numbers(stream, 25) == expected

    def test_large_data_is_not_kept(self, number_shards):
        urls = number_shards(2, 5)
        stream = ShardStream(urls, cache_bytes=2000)
        assert numbers(stream, 30) == [*range(10)] * 3
        assert stream._cache is None

    def test_fields_that_nobody_reads_are_dropped(self, number_shards):
        stream = ShardStream(number_shards(1, 5), fields=("txt",))
        assert set(next(stream)) == {"__key__", "__url__", "txt"}


@dataclass(frozen=True)
class Picky(ToSequence):
    """Cannot use multiples of `refuses`."""

    refuses: int

    def __call__(self, sample, vocabulary, *, tokenizer, generator) -> Sequence:
        (number,) = tokenizer.encode(sample["txt"].decode())
        if number % self.refuses == 0:
            raise ValueError(f"{number} is a multiple of {self.refuses}")
        return Sequence((text_segment([number]),))


def ids(stream, n=None):
    return [int(sequence.segments[0].ids[0]) for sequence in islice(stream, n)]


class TestBroken:
    def test_a_broken_sample_is_named_and_skipped(
        self, number_shards, vocabulary, tokenizer, caplog
    ):
        urls = number_shards(2, 60)
        stream = SequenceStream(
            [Source(urls, Picky(119))], vocabulary, tokenizer=tokenizer, length=8, repeat=False,
            max_broken=0.02,
        )  # fmt: skip
        with caplog.at_level(logging.WARNING):
            assert ids(stream) == [n for n in range(120) if n not in (0, 119)]
        tally = stream.state_dict()["sources"][0]["stats"]
        assert (tally["good"], tally["broken"]) == (118, 2)
        assert tally["listed"][1] == {
            "url": urls[1],
            "key": "000119",
            "reason": "119 is a multiple of 119",
        }
        assert f"{urls[1]}, sample 000119: 119 is a multiple of 119" in caplog.text

    def test_a_truncated_shard_is_named_and_the_others_go_on(
        self, number_shards, vocabulary, tokenizer, caplog
    ):
        urls = number_shards(3, 10)
        whole = Path(urls[1]).read_bytes()
        Path(urls[1]).write_bytes(whole[: len(whole) // 2])
        index = Path(urls[1]).with_name("index.json")
        index.write_text('{"shards": {"": {"000001.tar": 10}}}')
        stream = SequenceStream(
            [Source(urls, Text(max_tokens=5))], vocabulary, tokenizer=tokenizer, length=8,
            repeat=False,
        )  # fmt: skip
        with caplog.at_level(logging.WARNING):
            got = ids(stream)
        lost = set(range(30)) - set(got)
        assert len(got) == len(set(got))
        assert set() < lost < set(range(10, 20))
        assert f"{urls[1]}, rest of the shard" in caplog.text
        assert f"{min(lost):06d}" in caplog.text
        assert f"{index} says 10: {len(lost)} are missing" in caplog.text

    def test_too_many_stop_the_run_with_the_list(self, number_shards, vocabulary, tokenizer):
        urls = number_shards(1, 100)
        stream = SequenceStream(
            [Source(urls, Picky(20))], vocabulary, tokenizer=tokenizer, length=8, max_broken=0.03
        )
        with pytest.raises(ValueError, match=r"4 of 61 .* 0\.03") as caught:
            ids(stream)
        for number in (0, 20, 40, 60):
            assert f"{urls[0]}, sample {number:06d}" in str(caught.value)

    def test_a_sequence_that_does_not_fit(self, number_shards, vocabulary, tokenizer):
        stream = SequenceStream(
            [Source(number_shards(1, 9), Text(max_tokens=5))], vocabulary, tokenizer=tokenizer,
            length=1, max_broken=0,
        )  # fmt: skip
        with pytest.raises(ValueError, match="2 tokens do not fit in a row of 1"):
            next(stream)

    def test_a_mistake_in_the_code_is_not_a_broken_sample(
        self, number_shards, vocabulary, tokenizer
    ):
        @dataclass(frozen=True)
        class Wrong(ToSequence):
            def __call__(self, sample, vocabulary, *, tokenizer, generator):
                return sample.nothing

        stream = SequenceStream(
            [Source(number_shards(1, 9), Wrong())], vocabulary, tokenizer=tokenizer, length=9
        )
        with pytest.raises(AttributeError):
            next(stream)

    def test_the_share_counts_from_a_hundred_samples(self):
        tally = SampleStats(0.02)
        for key in "ab":
            tally.add_broken(BrokenSample("x.tar", key, "bad"))
        with pytest.raises(ValueError, match="3 of 3"):
            tally.add_broken(BrokenSample("x.tar", "c", "bad"))
        tally = SampleStats(0.02, good=900)
        for key in range(18):
            tally.add_broken(BrokenSample("x.tar", str(key), "bad"))

    def test_the_tally_survives_a_stop(self, number_shards, vocabulary, tokenizer):
        sources = [Source(number_shards(2, 10), Picky(7))]
        options = {"tokenizer": tokenizer, "length": 8, "max_broken": 0.9, "shuffle_buffer": 6}
        stream = SequenceStream(sources, vocabulary, **options)
        states, items = [], []
        for _ in range(60):
            states.append(stream.state_dict())
            items += ids(stream, 1)
        for place, state in enumerate(json.loads(json.dumps(states))):
            again = SequenceStream(sources, vocabulary, **options)
            again.load_state_dict(state)
            assert ids(again, 60 - place) == items[place:]
            assert again.state_dict() == stream.state_dict()


class TestMixing:
    def sources(self, number_shards, weights=(3.0, 1.0)):
        return [
            Source(number_shards(2, 40, folder=str(i), start=100 * i), Text(max_tokens=4), weight)
            for i, weight in enumerate(weights)
        ]

    @pytest.mark.slow
    def test_weights(self, number_shards, vocabulary, tokenizer):
        stream = SequenceStream(
            self.sources(number_shards), vocabulary, tokenizer=tokenizer, length=4,
            shuffle_buffer=10,
        )  # fmt: skip
        counts = Counter(number // 100 for number in ids(stream, 4000))
        assert counts[0] / 4000 == pytest.approx(0.75, abs=0.03)  # 4 standard errors

    def test_one_pass_has_all_of_both(self, number_shards, vocabulary, tokenizer):
        stream = SequenceStream(
            self.sources(number_shards), vocabulary, tokenizer=tokenizer, length=4, repeat=False
        )
        assert sorted(ids(stream)) == [*range(80), *range(100, 180)]

    @pytest.mark.slow
    def test_resume_at_every_place(self, number_shards, vocabulary, tokenizer):
        sources = self.sources(number_shards, (2.0, 1.0, 0.5))
        options = {"tokenizer": tokenizer, "length": 4, "repeat": False, "shuffle_buffer": 9}
        stream = SequenceStream(sources, vocabulary, **options)
        states, items = [stream.state_dict()], []
        while found := ids(stream, 1):
            items += found
            states.append(stream.state_dict())
        for place in range(0, len(states), 7):
            again = SequenceStream(sources, vocabulary, **options)
            again.load_state_dict(states[place])
            assert ids(again) == items[place:]

    def test_a_weight_of_nothing(self):
        with pytest.raises(ValueError, match="weight 0"):
            Source("x.tar", Text(4), weight=0)


def test_an_empty_shard_among_others(tmp_path):
    for name, count in (("a", 3), ("b", 0), ("c", 3)):
        write_shard(tmp_path / f"{name}.tar", map(number_sample, range(count)))
    urls = [str(tmp_path / f"{name}.tar") for name in "abc"]
    assert one_pass(urls) == [0, 1, 2, 0, 1, 2]
