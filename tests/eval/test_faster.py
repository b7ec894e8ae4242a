"""What decoding faster saves and costs: counted passes and tokens, right answers, repeats."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from data_pipelines.shards.shards import write_shard
from data_pipelines.write_shards import png_bytes
from eval.emoji.questions import Captions, Countdown, Drawings, Questions, Sudoku, WithImage
from eval.faster import Comparison, has_repeats, main, outcome, table
from eval.speed.forward_passes import counted
from eval.tasks.benchmark import Faster
from mmdlm import load
from mmdlm.pipeline.model import Model


@dataclass(frozen=True)
class Names(Questions):
    """Completions of the bundled model; "right" is what it says one token a step."""

    model: str = "emoji"
    steps: int = 16

    def answers(self, model: Model, *, generator: torch.Generator) -> tuple[list[str], Tensor]:
        texts = ["woman [MASK] [MASK] skin tone", "flag: [MASK] [MASK]"]
        said = [model.infill(one, num_inference_steps=2, generator=generator) for one in texts]
        return said, torch.tensor(["skin tone" in one for one in said])


@pytest.fixture(scope="module")
def emoji() -> Model:
    return load("emoji", device="cpu")


def test_passes_are_counted_and_the_counted_model_is_the_same(emoji: Model) -> None:
    model, passes = counted(emoji)
    text = "woman [MASK] [MASK] skin tone"
    assert model.infill(text, num_inference_steps=2) == emoji.infill(text, num_inference_steps=2)
    assert passes.rows == 2
    model.infill([text, "a [MASK]"], num_inference_steps=2)
    assert passes.rows == 2 + 3  # the second text has one hole and leaves after one step


def test_tokens_that_a_cache_remembers_are_not_counted(emoji: Model) -> None:
    usual = outcome("names", Names(), emoji, Faster())
    cached = outcome("names", Names(), emoji, Faster(cache="dual"))
    exact = outcome("names", Names(), emoji, Faster(cache="dual", cache_refresh=1))
    assert usual.forwards == cached.forwards == exact.forwards
    assert cached.tokens < usual.tokens == exact.tokens


def test_a_low_threshold_needs_fewer_passes(emoji: Model) -> None:
    usual = outcome("names", Names(), emoji, Faster())
    sure = outcome("names", Names(), emoji, Faster(threshold=0.0))
    assert (usual.forwards, sure.forwards) == (2, 1)
    assert usual.right == 0.5
    assert "2.0 x fewer" in table([usual, sure])


@pytest.mark.parametrize("task", [Sudoku("m", 16, 3), Countdown("m", 7, 3)])
def test_puzzles_know_what_is_right(task: Sudoku | Countdown) -> None:
    problems = task.benchmark(torch.Generator().manual_seed(0)).problems
    assert len(problems) == 3


@pytest.mark.parametrize("kind", [Captions, Drawings])
def test_images_of_shards(kind: type[WithImage], emoji: Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        kind(str(tmp_path / "*.tar")).answers(emoji, generator=torch.Generator())
    facts = {"names": {}, "aliases": [], "characters": "", "held_out": False}
    samples = [
        {
            "__key__": name,
            "png": png_bytes(Image.new("RGB", (64, 64), name)),
            "json": json.dumps({"name": name, **facts}).encode(),
        }
        for name in ("red", "green", "blue")
    ]
    write_shard(tmp_path / "0.tar", samples)
    task = kind(str(tmp_path / "*.tar"), trained=2, steps=1)
    said, right = task.answers(emoji, generator=torch.Generator())
    assert right.dtype == torch.bool
    assert right.shape == (2,)
    if kind is Drawings:
        assert said is None
        assert right.all()  # of three images each is among the five nearest


@pytest.mark.parametrize(
    "text, repeats",
    [("a a b", True), ("man, man", True), ("Man man", True), ("woman man", False), ("", False)],
)
def test_repeated_words(text: str, repeats: bool) -> None:
    assert has_repeats(text) == repeats


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "faster.json"
    ways = (Faster(threshold=0.0), Faster(factor=0.5))
    main({"names": Comparison(Names(), ways)}, out=out)
    found = json.loads(out.read_text())["outcomes"]
    assert [one["generation_config"] for one in found] == ["usual", "threshold 0.0", "factor 0.5"]
    assert "| names | threshold 0.0 | 1.00 (2.0 x fewer) |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no tasks"):
        main({}, out=out)
