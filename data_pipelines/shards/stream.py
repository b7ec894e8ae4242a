"""One reader's endless or single pass over shards, shuffled and mixed, that resumes exactly.

A reader is one worker of one process. Everything that it draws follows from (seed, its number, a
count), never from a generator that has run for long, so a state is a few numbers:

- shards are in an order drawn for each epoch, and dealt to the readers in turn;
- samples are shuffled within blocks of `shuffle_buffer`; a state names the place where the block
  starts and how many of it were given out, and resuming reads that one block again;
- the n-th sequence comes from a source drawn for n, by weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from data_pipelines.shards.sample_stats import BrokenSample, SampleStats, State, log, one_line
from data_pipelines.shards.shards import BrokenShard, Sample, missing_samples, read_shard
from data_pipelines.sources.source import BROKEN_CONTENT, Source, TextTokenizer, field_weight
from mmdlm.core.sequence import Sequence
from mmdlm.core.vocabulary import Vocabulary


def derived_seed(*parts: int | str) -> int:
    """Return a seed in [0, 2**63) that depends on every part and on nothing else."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def permutation(n: int, *parts: int | str) -> list[int]:
    """0 ... n - 1 in an order that depends only on the parts."""
    generator = torch.Generator().manual_seed(derived_seed(*parts))
    return torch.randperm(n, generator=generator).tolist()


@dataclass(frozen=True)
class Reader:
    """Which of all readers this is: the workers of all processes, counted through."""

    number: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.count:
            raise ValueError(f"reader {self.number} of {self.count}: count from 0")


@dataclass(frozen=True)
class _Place:
    """Where a block starts: `shard` counts within the reader's order of the epoch."""

    epoch: int = 0
    block: int = 0
    shard: int = 0
    sample: int = 0


_Block = tuple[_Place, list[Sample | BrokenSample]]


class ShardStream(Iterator[Sample | BrokenSample]):
    """Samples of one reader, shuffled; what is broken takes its place among them.

    With fewer shards than readers every reader reads all of them and keeps every count-th sample.

    Args:
        urls: Of the shards.
        reader: Which of all readers this is.
        seed: Of shuffling.
        shuffle_buffer: Samples that are shuffled together; 0 keeps the order.
        repeat: Epoch after epoch without end; otherwise one pass.
        fields: Extensions to keep; None keeps all.
        sampling_weight: Field with the probability that an epoch contains a sample; None: always.
        cache_bytes: Keep the samples in memory if all that this reader reads fits in so much.
    """

    def __init__(
        self,
        urls: list[str],
        *,
        reader: Reader = Reader(),
        seed: int = 0,
        shuffle_buffer: int = 0,
        repeat: bool = True,
        fields: tuple[str, ...] | None = None,
        sampling_weight: str | None = None,
        cache_bytes: int = 0,
    ) -> None:
        self.urls = urls
        self.reader = reader
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.repeat = repeat
        self.fields = fields
        if fields is not None and sampling_weight is not None:
            self.fields = (*fields, sampling_weight.split(".")[0])
        self.sampling_weight = sampling_weight
        self.deals_shards = len(urls) >= reader.count
        if not self.deals_shards and reader.number == 0:
            log.warning(
                "%d shards for %d readers: each reads all and keeps its share; more and smaller "
                "shards are faster",
                len(urls),
                reader.count,
            )
        self._cache: dict[str, list[Sample | BrokenSample]] | None = {} if cache_bytes else None
        self._cache_room = cache_bytes
        self._place: _Place  # where the block starts that is being given out
        self._block: list[Sample | BrokenSample]
        self._offset: int  # how many of the block were given out
        self._resume_offset: int  # the same, of a block that a loaded state names
        self._ahead: _Block | None
        self._reading: Iterator[_Block | None]
        self._start_at(_Place(), offset=0)

    def __next__(self) -> Sample | BrokenSample:
        while self._offset >= len(self._block):
            read = self._ahead or next((one for one in self._reading if one), None)
            if read is None:
                raise StopIteration
            self._ahead = None
            self._place, items = read
            self._block = self._shuffled(items)
            # after loading a state, the first block goes on where it was left
            self._offset, self._resume_offset = self._resume_offset, 0
        self._offset += 1
        if self._ahead is None:  # read the next block while this one is given out: no stalls
            self._ahead = next(self._reading, None)
        return self._block[self._offset - 1]

    def state_dict(self) -> State:
        return {**asdict(self._place), "offset": self._offset + self._resume_offset}

    def load_state_dict(self, state: State) -> None:
        place = {name: value for name, value in state.items() if name != "offset"}
        self._start_at(_Place(**place), offset=state["offset"])

    def _start_at(self, place: _Place, *, offset: int) -> None:
        self._place = place
        self._block = []
        self._offset, self._resume_offset = 0, offset
        self._ahead = None
        self._has_read = False
        self._reading = self._read_blocks(place)

    def _read_blocks(self, place: _Place) -> Iterator[_Block | None]:
        """Blocks one after another; None after each sample that does not complete one."""
        while True:
            start, items = place, []
            for item, shard, sample in self._read_epoch(place):
                items.append(item)
                if len(items) < self.shuffle_buffer:
                    yield None
                    continue
                yield start, items
                start, items = _Place(start.epoch, start.block + 1, shard, sample), []
            if items:
                yield start, items
            if not self.repeat:
                return
            if not self._has_read:
                raise ValueError(
                    f"shards {self.urls[0]} ...: no sample for reader {self.reader.number} of "
                    f"{self.reader.count}; the shards are empty, or too few for so many readers"
                )
            place = _Place(place.epoch + 1)

    def _read_epoch(self, place: _Place) -> Iterator[tuple[Sample | BrokenSample, int, int]]:
        """Items from `place` to the end of the epoch, with the shard and sample that follow."""
        urls = self.urls
        if self.shuffle_buffer:
            urls = [urls[i] for i in permutation(len(urls), self.seed, "shards", place.epoch)]
        if self.deals_shards:
            urls = urls[self.reader.number :: self.reader.count]
        for shard in range(place.shard, len(urls)):
            done = place.sample if shard == place.shard else 0
            for number, item in enumerate(self._read_shard(urls[shard])):
                self._has_read = True
                drawn = self._drawn(item, place.epoch) if number >= done else None
                if drawn is not None:
                    yield drawn, shard, number + 1

    def _drawn(self, item: Sample | BrokenSample, epoch: int) -> Sample | BrokenSample | None:
        """Return the item where the epoch contains it."""
        if self.sampling_weight is None or isinstance(item, BrokenSample):
            return item
        try:
            weight = field_weight(item, self.sampling_weight)
        except BROKEN_CONTENT as error:
            return BrokenSample(item["__url__"], item["__key__"], one_line(error))
        parts = (self.seed, "drawn", epoch, item["__url__"], item["__key__"])
        return item if derived_seed(*parts) < weight * 2**63 else None

    def _read_shard(self, url: str) -> Iterator[Sample | BrokenSample]:
        if self._cache is not None and url in self._cache:
            yield from self._cache[url]
            return
        read: list[Sample | BrokenSample] = []
        for item in self._own_samples(url):
            if self._cache is not None:
                read.append(item)
                self._cache_room -= _bytes_of(item)
                if self._cache_room < 0:  # too much: the memory is better left alone
                    self._cache = None
                    read.clear()
            yield item
        if self._cache is not None:
            self._cache[url] = read

    def _own_samples(self, url: str) -> Iterator[Sample | BrokenSample]:
        """Yield the samples of a shard that belong to this reader."""
        number, count = (0, 1) if self.deals_shards else (self.reader.number, self.reader.count)
        read = 0
        try:
            for n, sample in enumerate(read_shard(url)):
                read += 1
                if n % count == number:
                    yield {
                        name: value
                        for name, value in sample.items()
                        if self.fields is None or name in self.fields or name.startswith("__")
                    }
        except BrokenShard as error:
            if number == 0:
                yield BrokenSample(url, None, f"{error}{missing_samples(url, read)}")

    def _shuffled(self, items: list[Sample | BrokenSample]) -> list[Sample | BrokenSample]:
        if self.shuffle_buffer < 2:
            return items
        parts = ("block", self._place.epoch, self._place.block, self.reader.number)
        return [items[i] for i in permutation(len(items), self.seed, *parts)]


def _bytes_of(item: Sample | BrokenSample) -> int:
    return 200 if isinstance(item, BrokenSample) else sum(map(len, item.values())) + 400


class SequenceStream(Iterator[Sequence]):
    """Sequences of one reader from several sources, mixed by weight; broken samples are skipped.

    When it makes one pass, a source that has ended leaves its share to the others.
    """

    def __init__(
        self,
        sources: list[Source],
        vocabulary: Vocabulary,
        *,
        tokenizer: TextTokenizer,
        length: int,
        reader: Reader = Reader(),
        seed: int = 0,
        shuffle_buffer: int = 0,
        repeat: bool = True,
        max_broken: float = 0.01,
        cache_bytes: int = 0,
    ) -> None:
        self.sources = sources
        self.vocabulary = vocabulary
        self.tokenizer = _Memory(tokenizer)
        self.length = length
        self.reader = reader
        self.seed = seed
        self._streams = [
            ShardStream(
                source.shards(),
                reader=reader,
                seed=derived_seed(seed, "source", number),
                shuffle_buffer=shuffle_buffer,
                repeat=repeat,
                fields=source.to_sequence.fields,
                sampling_weight=source.sampling_weight,
                cache_bytes=cache_bytes // len(sources),
            )
            for number, source in enumerate(sources)
        ]
        self._stats = [SampleStats(max_broken) for _ in sources]
        self._taken = [0] * len(sources)  # samples, broken ones included
        self._ended = [False] * len(sources)
        self._given = 0
        self._generator = torch.Generator()

    def __next__(self) -> Sequence:
        while not all(self._ended):
            number = self._draw_source()
            sequence = self._next_of(number)
            if sequence is not None:
                self._given += 1
                return sequence
            self._ended[number] = True
        raise StopIteration

    def state_dict(self) -> State:
        return {
            "given": self._given,
            "sources": [
                {
                    "stream": stream.state_dict(),
                    "stats": stats.state_dict(),
                    "taken": taken,
                    "ended": ended,
                }
                for stream, stats, taken, ended in zip(
                    self._streams, self._stats, self._taken, self._ended, strict=True
                )
            ],
        }

    def load_state_dict(self, state: State) -> None:
        self._given = state["given"]
        for number, source in enumerate(state["sources"]):
            self._streams[number].load_state_dict(source["stream"])
            self._stats[number].load_state_dict(source["stats"])
            self._taken[number] = source["taken"]
            self._ended[number] = source["ended"]

    def _draw_source(self) -> int:
        alive = [number for number, ended in enumerate(self._ended) if not ended]
        if len(alive) == 1:
            return alive[0]
        drawn = derived_seed(self.seed, "mix", self.reader.number, self._given) / 2**63
        drawn *= sum(self.sources[number].weight for number in alive)
        for number in alive:
            drawn -= self.sources[number].weight
            if drawn < 0:
                return number
        return alive[-1]

    def _next_of(self, number: int) -> Sequence | None:
        """Return the next usable sequence of one source, or None where it has ended."""
        source, stats = self.sources[number], self._stats[number]
        for item in self._streams[number]:
            self._taken[number] += 1
            if isinstance(item, BrokenSample):
                stats.add_broken(item)
                continue
            seed = derived_seed(self.seed, number, self.reader.number, self._taken[number])
            try:
                sequence = source.to_sequence(
                    item,
                    self.vocabulary,
                    tokenizer=self.tokenizer,
                    generator=self._generator.manual_seed(seed),
                )
                if len(sequence) > self.length:
                    raise ValueError(
                        f"{len(sequence)} tokens do not fit in a row of {self.length}; shorten "
                        "it or raise length"
                    )
            except BROKEN_CONTENT as error:
                stats.add_broken(BrokenSample(item["__url__"], item["__key__"], one_line(error)))
                continue
            stats.good += 1
            return sequence
        return None


class _Memory(TextTokenizer):
    """A tokenizer that remembers short texts, as names and captions come again every epoch."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self._known: dict[tuple[str, bool, bool], list[int]] = {}

    def encode(
        self, text: str, *, add_special_tokens: bool = True, split_special_tokens: bool = False
    ) -> list[int]:
        key = (text, add_special_tokens, split_special_tokens)
        if key in self._known:
            return list(self._known[key])
        ids = self.tokenizer.encode(
            text,
            add_special_tokens=add_special_tokens,
            split_special_tokens=split_special_tokens,
        )
        if len(text) <= 200:
            if len(self._known) >= 1 << 16:
                self._known.clear()
            self._known[key] = list(ids)
        return ids
