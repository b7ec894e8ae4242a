"""Tiny shards and a word tokenizer, so that each test says only what it is about."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.shards.shards import Sample, write_shard
from data_pipelines.sources.source import encode_array
from mmdlm.cli import recipe as command_line
from mmdlm.core.vocabulary import Vocabulary

CODES = 4  # per image


class NumberTokenizer:
    """Texts are numbers; a number is its own id, so that a batch shows which samples it holds."""

    def encode(
        self, text: str, *, add_special_tokens: bool = True, split_special_tokens: bool = False
    ) -> list[int]:
        return [int(word) for word in text.split()]


def number_sample(number: int) -> Sample:
    """A sample whose text and first code are its number."""
    codes = np.full(CODES, number % 50, np.uint16)
    return {
        "__key__": f"{number:06d}",
        "txt": str(number).encode(),
        "json": b'{"name": "%d"}' % number,
        "codes.npy": encode_array(codes),
    }


@pytest.fixture
def tokenizer() -> NumberTokenizer:
    return NumberTokenizer()


@pytest.fixture
def vocabulary() -> Vocabulary:
    return Vocabulary.build(text_size=1000, eos_id=999, image_codes=50)


@pytest.fixture
def number_shards(tmp_path: Path) -> Callable[..., list[str]]:
    """number_shards(3, 10) -> urls of 3 shards with samples 0 ... 29, ten in each."""

    def write(shards: int, samples: int, *, folder: str = "numbers", start: int = 0) -> list[str]:
        paths = [tmp_path / folder / f"{shard:06d}.tar" for shard in range(shards)]
        for shard, path in enumerate(paths):
            first = start + shard * samples
            write_shard(path, map(number_sample, range(first, first + samples)))
        return [str(path) for path in paths]

    return write


@pytest.fixture
def shell(monkeypatch, capsys):
    """Runs a job with options; gives its exit status and what it said on stderr."""

    def run(job, *options):
        monkeypatch.setattr(sys, "argv", ["job", *map(str, options)])
        try:
            command_line.run(job)
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run
