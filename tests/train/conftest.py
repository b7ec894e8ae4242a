"""Each test starts as a fresh process would; and published models, as small as can be."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from mmdlm.pipeline.convert import convert
from mmdlm.vision.tokenizers.magvit2 import Magvit2Tokenizer
from tests.templates.tiny import transformer, words_of


@pytest.fixture(autouse=True)
def _fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def _fresh_signals() -> Iterator[None]:
    """As in a terminal: what runs in the background ignores Ctrl-C, and under nohup SIGHUP."""
    usual = {signal.SIGINT: signal.default_int_handler}
    heard = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, usual.get(number, signal.SIG_DFL)) for number in heard}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny random models as they are published: folders `llada` and `mmada`."""
    folder = tmp_path_factory.mktemp("published")
    for family in ("llada", "mmada"):
        words = words_of(family)
        transformer(words.vocabulary).float().save_pretrained(folder / "ours" / family)
        list(convert(folder / "ours" / family, folder / family, to=family))
        words.tokenizer.save_pretrained(folder / family)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        images = Magvit2Tokenizer(
            ch=32, ch_mult=(1, 1), num_res_blocks=(1, 1), z_channels=4, resolution=8
        )
    images.save_pretrained(folder / "mmada" / "image_tokenizer")
    return folder
