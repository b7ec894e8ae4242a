"""The stage that recipes share, through the loop: in half precision, and compiled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from data_pipelines.sources.conversations import Conversation
from data_pipelines.sources.image_text import ImageText
from data_pipelines.sources.source import Source
from mmdlm.core.diffusion.forward import Absorbing
from mmdlm.core.diffusion.schedule import Linear
from mmdlm.core.losses.objective import Objective
from mmdlm.core.sequence import Batch, pack
from mmdlm.models.modeling import MmdlmForMaskedDiffusion
from mmdlm.templates.native import Native
from tests.models.tiny import VOCABULARY, document, tiny_model
from tests.templates.tiny import words_of
from tests.train.tiny import logged, settings
from train.loop import fit
from train.optimizer import AdamW
from train.stages.denoising import Coefficients, Data, DenoisingStage, read_sources
from train.stages.meter import MEASURED


class Again:
    """The same batch, without end."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """accelerate has one precision for a process, in which other tests run."""
    yield
    AcceleratorState._reset_state(True)


def trained(out: Path, **options: Any) -> tuple[list[dict[str, Any]], MmdlmForMaskedDiffusion]:
    """The log of a short run, and its model."""
    AcceleratorState._reset_state(True)
    model = tiny_model().train()
    stage = DenoisingStage(model, Objective(Absorbing(Linear())), Coefficients())
    batch = pack([document(3, 4, seed=n) for n in range(6)], VOCABULARY, length=32)
    given = {"max_steps": 30, "optimizer": AdamW(learning_rate=0.01), "save_steps": 30}
    fit(stage, Again(batch), settings=settings(**{**given, **options}), out=out)
    return logged(out), model


def mean(entries: list[dict[str, Any]], name: str) -> float:
    return sum(entry[name] for entry in entries) / len(entries)


@pytest.mark.slow
def test_half_precision_learns_as_float32_does(tmp_path: Path) -> None:
    """The weights stay float32: its products are in half precision, and what is summed is not."""
    whole, _ = trained(tmp_path / "whole")
    half, model = trained(tmp_path / "half", mixed_precision="bf16")
    for kind in ("loss/text", "loss/image"):
        assert half[0][kind] != whole[0][kind]
        for one, other in zip(half[:5], whole[:5], strict=True):
            assert one[kind] == pytest.approx(other[kind], rel=0.02)
        assert mean(half[-5:], kind) < 0.7 * mean(half[:5], kind)
        assert mean(half[-5:], kind) == pytest.approx(mean(whole[-5:], kind), rel=0.2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert set(MEASURED) <= set(half[-1])


@pytest.mark.slow
def test_compiled_layers_learn_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Forward and backward are traced as on a GPU, but run as they are; one layer serves all."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, mode: compile_(module, backend="aot_eager")
    )
    plain, _ = trained(tmp_path / "plain", max_steps=8)
    assert not torch._dynamo.utils.counters["stats"]  # "auto": there is no GPU
    compiled, _ = trained(tmp_path / "compiled", max_steps=8, compile=True)
    # one layer for all but the last, which is that of some places, then of any number of them
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
    assert not torch._dynamo.utils.counters["graph_break"]
    assert "compiling the layers" in caplog.text
    for one, other in zip(compiled, plain, strict=True):
        for name in ("loss/text", "loss/image", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4)


def test_images_have_as_many_codes_as_the_image_tokenizer_makes() -> None:
    """A source that says nothing else refuses other numbers; one that has its own keeps it."""
    words = replace(words_of("mmada"), grid=(2, 3))
    sources = [Source("x.tar", ImageText()), Source("x.tar", ImageText(codes_per_image=4))]
    data = Data(sources=sources, batch_size=1, length=9)
    denoiser = tiny_model()
    read = read_sources(data, denoiser, words, Native())
    assert [source.to_sequence.codes_per_image for source in read] == [6, 4]
    unknown = read_sources(data, denoiser, replace(words, grid=None), Native())
    assert [source.to_sequence.codes_per_image for source in unknown] == [None, 4]


def test_shards_of_ones_own_are_read_as_the_recipe_says() -> None:
    read = Conversation(answers="last", cut_long_answers=True)
    data = Data(sources=[Source("data/s1k", read, weight=2.0)], urls="data/chats")
    assert data.sources == [Source("data/chats", read, weight=2.0)]
    both = [Source("a", read), Source("b", read)]
    with pytest.raises(ValueError, match="data/chats are for a recipe of one source, but it has 2"):
        Data(sources=both, urls="data/chats")
