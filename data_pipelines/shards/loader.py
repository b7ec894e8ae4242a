"""Batches for training: the sequences of all sources in rows, one or several in each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice

from data_pipelines.room import check_batch
from data_pipelines.shards.sample_stats import State
from data_pipelines.shards.stream import Reader, SequenceStream, permutation
from data_pipelines.shards.workers import Loader, check_numbers, workers_for
from data_pipelines.sources.source import Source, TextTokenizer
from mmdlm.core.sequence import Batch, Sequence, arrange, collate, concatenate, pack
from mmdlm.core.vocabulary import Vocabulary

# Documents are packed into so many rows at once, of so many tokens together, or into one batch.
_ROWS_TOGETHER, _TOKENS_TOGETHER = 64, 1 << 16


def build_loader(
    sources: Iterable[Source],
    vocabulary: Vocabulary,
    *,
    tokenizer: TextTokenizer,
    batch_size: int,
    length: int,
    packed: bool = False,
    seed: int = 0,
    num_workers: int | None = 0,
    rank: int = 0,
    world_size: int = 1,
    shuffle_buffer: int = 4096,
    repeat: bool = True,
    max_broken: float = 0.01,
    cache_bytes: int = 1 << 28,
    pin_memory: bool = False,
) -> Loader:
    """Return a loader of batches [batch_size, length], mixed from `sources` by weight.

    No sample goes to two processes or workers in an epoch, and all go to one. The samples follow
    from the arguments only, and after `load_state_dict` the very same ones follow that would have.

    Args:
        sources: Shards, how their samples become sequences, and their weights.
        vocabulary: Of the denoiser.
        tokenizer: Of texts; its ids are those of `vocabulary.text`.
        batch_size: Rows of a batch of this process.
        length: Tokens of a row.
        packed: Several documents in a row, as many as fit; otherwise one, padded to `length`.
        seed: Of shuffling and of all random choices of the sources.
        num_workers: Processes that read ahead; 0 reads in this one. None: two if pin_memory.
        rank: Number of this process among all that train.
        world_size: Number of processes that train.
        shuffle_buffer: Samples that are shuffled together, per worker and source; 0 keeps the order
            of samples and shards, though not that of packed rows.
        repeat: Epoch after epoch without end; otherwise one pass, whose last batch may have fewer
            rows (and processes may differ in their number of batches).
        max_broken: Share of broken samples that are skipped and listed; more stop the run.
        cache_bytes: A data set that fits in so much memory, per worker, is read only once.
        pin_memory: Give out batches in page-locked memory, where workers read ahead.

    Returns:
        The loader of this process, whose state can be stored and loaded.

    Raises:
        ValueError: For an empty list of sources or shards, a number out of its range, and a batch
            that no memory holds.
    """
    sources = list(sources)
    if not sources:
        raise ValueError("the list of sources is empty; name at least one")
    num_workers = workers_for(num_workers, on_gpu=pin_memory)
    numbers = {
        "batch_size": batch_size,
        "length": length,
        "packed": packed,
        "seed": seed,
        "num_workers": num_workers,
        "rank": rank,
        "world_size": world_size,
        "shuffle_buffer": shuffle_buffer,
        "repeat": repeat,
    }
    check_numbers({**numbers, "max_broken": max_broken, "cache_bytes": cache_bytes})
    check_batch(batch_size, length)
    # Shards are looked up once, so that all workers deal the same list.
    sources = [replace(source, urls=source.shards()) for source in sources]
    settings = {
        "shards": [len(source.urls) for source in sources],
        "weights": [source.weight for source in sources],
        **numbers,
    }
    stream = partial(
        SequenceStream,
        sources,
        vocabulary,
        tokenizer=tokenizer,
        length=length,
        seed=seed,
        shuffle_buffer=shuffle_buffer,
        repeat=repeat,
        max_broken=max_broken,
        cache_bytes=cache_bytes,
    )
    recipe = _Recipe(stream, vocabulary, batch_size, length, packed)
    return Loader(recipe, settings, pin_memory=pin_memory)


@dataclass(frozen=True)
class _Recipe:
    """All that a worker needs to make its batches."""

    stream: partial[SequenceStream]
    vocabulary: Vocabulary
    batch_size: int
    length: int
    packed: bool

    def __call__(self, reader: Reader) -> _SingleRows | _PackedRows:
        """Batches of one worker."""
        rows = _PackedRows if self.packed else _SingleRows
        return rows(self.stream(reader=reader), self)


class _SingleRows:
    """Batches with one sequence a row."""

    def __init__(self, stream: SequenceStream, recipe: _Recipe) -> None:
        self.stream = stream
        self.recipe = recipe

    def __iter__(self) -> Iterator[Batch]:
        while sequences := list(islice(self.stream, self.recipe.batch_size)):
            yield collate(sequences, self.recipe.vocabulary, length=self.recipe.length)

    def state_dict(self) -> State:
        return self.stream.state_dict()

    def load_state_dict(self, state: State) -> None:
        self.stream.load_state_dict(state)


class _PackedRows:
    """Batches with as many sequences a row as fit.

    A window of several batches is arranged together, by first-fit decreasing once it is full, and
    ends before the first sequence that does not fit. Its rows are then shuffled: the longest
    sequences come first.
    """

    def __init__(self, stream: SequenceStream, recipe: _Recipe) -> None:
        self.stream = stream
        self.recipe = recipe
        rows = min(_ROWS_TOGETHER, _TOKENS_TOGETHER // recipe.length)
        self.most = recipe.batch_size * max(1, -(-rows // recipe.batch_size))  # of a window
        self._given = 0  # batches of the window that were given out
        self._state: State = {}

    def __iter__(self) -> Iterator[Batch]:
        stream, size = self.stream, self.recipe.batch_size
        before, opens = stream.state_dict(), next(stream, None)
        while opens is not None:
            rows, after, opens = self._window(opens)
            order = permutation(
                len(rows), stream.seed, "rows", stream.reader.number, before["given"]
            )
            starts = range(0, len(rows), size)
            for start in starts[self._given :]:
                self._given += 1
                self._state = after
                if self._given < len(starts):  # the others follow from where the window began
                    self._state = after | {"window": {"start": before, "given": self._given}}
                yield self._stack([rows[i] for i in order[start : start + size]])
            before, self._given = after, 0

    def _window(self, opens: Sequence) -> tuple[list[list[Sequence]], State, Sequence | None]:
        """Its rows, the state before the sequence that opens the next one, and that sequence."""
        length = self.recipe.length
        rows: list[list[Sequence]] = []
        free: list[int] = []
        sequence: Sequence | None = opens
        while sequence is not None:
            row = next((i for i, room in enumerate(free) if room >= len(sequence)), None)
            if row is not None:
                rows[row].append(sequence)
                free[row] -= len(sequence)
            else:
                more = [*rows, [sequence]]
                if len(more) > self.most:
                    more = arrange(chain.from_iterable(more), length=length)
                if len(more) > self.most:
                    break
                rows = more
                free = [length - sum(map(len, row)) for row in rows]
            # Before the next one: that which does not fit is drawn again, and is the same.
            after = self.stream.state_dict()
            sequence = next(self.stream, None)
        return rows, after, sequence

    def _stack(self, rows: list[list[Sequence]]) -> Batch:
        """Row by row, as `pack` on its own may need another number of rows."""
        recipe = self.recipe
        return concatenate(pack(row, recipe.vocabulary, length=recipe.length) for row in rows)

    def state_dict(self) -> State:
        return self._state

    def load_state_dict(self, state: State) -> None:
        window = state.get("window", {"start": state, "given": 0})
        self._given = window["given"]
        self.stream.load_state_dict(window["start"])
