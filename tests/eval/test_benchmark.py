"""Benchmarks score what a function says, and write down how a model was asked."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import eval.tasks.code
from data_pipelines.sources.problems import Prompt
from data_pipelines.sources.word_problems import read_gsm8k, read_math500
from eval import run as evaluate
from eval.tasks import countdown, gsm8k, math500, sudoku
from eval.tasks.benchmark import Asked, Asking, Benchmark, ask, rate, summarize
from eval.tasks.task import some_examples
from mmdlm import load
from mmdlm.rl.rewards.answers import math_equivalence
from mmdlm.tasks.countdown import Countdown
from mmdlm.tasks.sudoku import Puzzle, grids, make_puzzles, solutions
from mmdlm.templates.text_codec import TextCodec

TWICE = "0034341200434321"


def said(*texts: str) -> Callable[[Sequence[Prompt]], list[str]]:
    """A model that says these, one after the other."""
    rest = iter(texts)
    return lambda prompts: [next(rest) for _ in prompts]


def score(benchmark: Benchmark, complete: Any, **options: Any) -> Any:
    return rate(benchmark, ask(benchmark.problems, complete, **options))


def values(benchmark: Benchmark, complete: Any, **options: Any) -> dict[str, float]:
    found = summarize(benchmark, score(benchmark, complete, **options))
    return {name: one["value"] for name, one in found["measures"].items()}


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- scoring


def test_sudoku_of_a_model_that_knows_and_one_that_does_not() -> None:
    puzzles = make_puzzles(
        20, split="held_out", blanks=8, generator=torch.Generator().manual_seed(0)
    )
    benchmark = sudoku.benchmark(puzzles)
    right = [f"r</reasoning><answer>{one.solution}</answer>" for one in puzzles]
    assert values(benchmark, said(*right), batch_size=3) == {"grid": 1, "cells": 1}
    half = [*right[:10], *["nothing"] * 10]
    assert values(benchmark, said(*half)) == {"grid": 0.5, "cells": 0.5}


def test_the_number_of_puzzles_with_several_solutions_is_reported() -> None:
    puzzles = [Puzzle(TWICE, solutions(TWICE)[0]), Puzzle("0" + grids()[0][1:], grids()[0])]
    benchmark = sudoku.benchmark(puzzles)
    assert benchmark.facts["puzzles_with_several_solutions"] == 1
    assert benchmark.facts["puzzles_with_one_solution"] == 1
    other = [f"<answer>{solutions(TWICE)[1]}</answer>", f"<answer>{grids()[0]}</answer>"]
    assert values(benchmark, said(*other)) == {"grid": 1, "cells": 1}


def test_countdown_takes_boxes_and_equations() -> None:
    one = Countdown((30, 100, 93), 23)
    benchmark = countdown.benchmark([one] * 4)
    assert benchmark.facts["solvable"] == 4
    texts = ["\\boxed{30+93-100}", "<answer>30+93-100 = 23</answer>", "<answer>1</answer>", "no"]
    assert values(benchmark, said(*texts)) == {"right": 0.5}


def test_gsm8k_by_marks_and_by_the_last_number(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "#### 1,072"}
    rows = read_gsm8k(lines(tmp_path / "a.jsonl", *[row] * 5))
    texts = [
        "<answer>\\boxed{1072}</answer>",
        "it is $1,072.00.",
        "#### 1072",
        "<answer>7</answer> 1072",
        "none",
    ]
    assert values(gsm8k.benchmark(rows), said(*texts)) == {"right": 0.6, "strict": 0.4}


@pytest.mark.skipif(
    math_equivalence.find_spec("math_verify") is None, reason="the extra math is not installed"
)
def test_math500_by_level(tmp_path: Path) -> None:
    row = {"problem": "p", "answer": r"\frac{1}{2}", "level": 1}
    rows = read_math500(lines(tmp_path / "a.jsonl", row, {**row, "level": 5}))
    benchmark = math500.benchmark(rows)
    found = summarize(benchmark, score(benchmark, said("\\boxed{0.5}", "\\boxed{2}")))
    assert found["measures"]["right"]["value"] == 0.5
    assert found["measures"]["exact"]["value"] == 0
    assert found["by_level"]["1"]["right"]["value"] == 1
    assert found["by_level"]["5"]["right"]["value"] == 0


HUMAN_EVAL = {
    "task_id": "HumanEval/0",
    "prompt": "def f(x):\n",
    "canonical_solution": "    return x + 1\n",
    "entry_point": "f",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n",
}
MBPP = {
    "task_id": 11,
    "text": "add one",
    "code": "def f(x):\n    return x + 1",
    "test_list": ["assert f(1) == 2", "assert g() == math.pi"],
    "test_setup_code": "import math",
}


def test_code_of_both_kinds(tmp_path: Path) -> None:
    rows = eval.tasks.code.read_code(
        lines(tmp_path / "a.jsonl", HUMAN_EVAL, HUMAN_EVAL, MBPP, MBPP)
    )
    g = "def g():\n    return math.pi\n"
    texts = [
        "    return x + 1\n\ndef other(",
        "    return x\n",
        f"def f(x):\n    return x + 1\n{g}[DONE]\n",
        "def f(x):\n    while True:\n        pass\n",
    ]
    base = eval.tasks.code.benchmark(
        rows, style="llada", sandbox=eval.tasks.code.Sandbox(seconds=1)
    )
    scored = score(base, said(*texts))
    assert scored.breakdown.rewards["pass@1"].tolist() == [1, 0, 1, 0]
    reasons = scored.breakdown.extras["code/reason"]
    assert reasons[0] == ""
    assert "AssertionError" in reasons[1]
    assert "more than 1 seconds" in reasons[3]
    chat = eval.tasks.code.benchmark(rows[:1])
    answer = "Here:\n```python\ndef f(x):\n    return x + 1\n```"
    assert values(chat, said(answer)) == {"pass@1": 1}


def test_errors_come_with_their_size() -> None:
    one = Countdown((1, 2), 3)
    benchmark = countdown.benchmark([one] * 4)
    found = summarize(benchmark, score(benchmark, said("\\boxed{1+2}", "", "", "")))
    measure = found["measures"]["right"]
    assert measure["count"] == 4
    assert measure["standard_error"] == pytest.approx(0.25)
    assert measure["interval_95"][0] > 0.04
    alone = countdown.benchmark([one])
    only = summarize(alone, score(alone, said("")))["measures"]["right"]
    assert only["standard_error"] is None


def test_a_model_that_says_too_little() -> None:
    benchmark = countdown.benchmark([Countdown((1, 2), 3)] * 2)
    with pytest.raises(ValueError, match="1 completions of 2 prompts"):
        score(benchmark, lambda prompts: ["x"])
    with pytest.raises(ValueError, match="no problems"):
        score(countdown.benchmark([]), said())


def test_problems_are_chosen_by_the_seed() -> None:
    problems = countdown.benchmark([Countdown((1, n), n + 1) for n in range(1, 40)]).problems
    first = Asked(limit=5, seed=1).of(problems)
    assert first == Asked(limit=5, seed=1).of(problems) != Asked(limit=5, seed=2).of(problems)
    assert len(first) == 5
    assert Asked(limit=100).of(problems) == problems
    with pytest.raises(ValueError, match="limit 0"):
        Asked(limit=0)


def test_examples_need_a_file_of_their_own(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *[{"question": f"q{n}", "answer": "1"} for n in range(9)])
    options: dict[str, Any] = {"data": path, "seed": 0, "read": read_gsm8k}
    assert some_examples(None, 0, **options) == []
    with pytest.raises(ValueError, match="give --examples"):
        some_examples(None, 2, **options)
    with pytest.raises(ValueError, match="the file that is asked"):
        some_examples(path, 2, **options)
    with pytest.raises(ValueError, match="below 0"):
        some_examples(path, -1, **options)
    other = lines(tmp_path / "b.jsonl", *[{"question": f"q{n}", "answer": "1"} for n in range(9)])
    assert len(some_examples(other, 2, **options)) == 2


# ---- with a model


def test_the_command_writes_scores_settings_and_the_checkpoint(
    speaker: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "puzzles.csv"
    data.write_text(
        f"Puzzle,Solution\n{TWICE},{solutions(TWICE)[0]}\n"
        + "".join(f"0{grid[1:]},{grid}\n" for grid in grids()[:4])
    )
    out = tmp_path / "sudoku.json"
    arguments = ["--model", str(speaker), "--data", str(data), "--out", str(out)]
    arguments += ["--asked.max_new_tokens", "8", "--asked.num_inference_steps", "2"]
    arguments += ["--asked.limit", "3", "--asked.batch_size", "2", "--asked.seed", "5"]
    arguments += ["--asked.block_length", "4", "--asked.device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["eval.run", "--task", "sudoku", *arguments])
    evaluate.main()
    report = json.loads(out.read_text())
    assert report["results"]["count"] == 3
    assert set(report["results"]["measures"]) == {"grid", "cells"}
    assert report["settings"]["seed"] == 5
    generation_config = report["settings"]["generation_config"]["answer"]
    assert (generation_config["num_inference_steps"], generation_config["block_length"]) == (2, 4)
    assert set(generation_config) >= {"temperature", "order", "schedule", "guidance_scale", "top_p"}
    assert report["settings"]["max_new_tokens"] == 8
    assert report["data"]["puzzles_with_several_solutions"] == 1
    assert report["data"]["sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()
    weights = hashlib.sha256((speaker / "model.safetensors").read_bytes()).hexdigest()
    assert report["model"]["sha256"] == {"model.safetensors": weights}
    items = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert len(items) == 3
    assert all(item["begun"] == "<reasoning>" and "grid" in item["scores"] for item in items)
    assert "whole grid right" in capsys.readouterr().out


def test_answers_are_kept_when_scoring_fails(
    speaker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any) -> Any:
        raise ValueError("reward 'grid' raised")

    monkeypatch.setattr("eval.tasks.task.rate", fails)
    out = tmp_path / "a.json"
    asked = Asked(max_new_tokens=4, num_inference_steps=1, device="cpu")
    with pytest.raises(ValueError, match="'grid'"):
        sudoku.SudokuTask(model=str(speaker), out=out, count=2, asked=asked)()
    assert len(out.with_suffix(".jsonl").read_text().splitlines()) == 2
    assert not out.exists()


def test_a_problem_that_is_too_long_is_named_before_any_is_asked(
    speaker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"question": "q", "answer": "#### 1"}
    data = lines(tmp_path / "a.jsonl", row, row, {**row, "question": "long " * 2000})
    monkeypatch.setattr(Asking, "__call__", lambda *_: pytest.fail("a problem was asked"))
    asked = Asked(max_new_tokens=4, num_inference_steps=1, batch_size=2, device="cpu")
    with pytest.raises(
        ValueError, match=r"a.jsonl, line 3: the prompt takes \d+ of the \d+ tokens"
    ):
        gsm8k.Gsm8k(model=str(speaker), data=data, out=tmp_path / "b.json", asked=asked)()


def test_what_is_missing_is_said_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(math_equivalence, "find_spec", lambda name: None)
    monkeypatch.setattr(math_equivalence, "_worker", lambda size: math_equivalence._Worker(size))
    data = lines(tmp_path / "a.jsonl", {"problem": "p", "answer": "1"})
    with pytest.raises(ValueError, match="math-verify"):
        math500.Math500(model="absent", data=data, out=tmp_path / "a.json")()


def test_the_same_seed_says_the_same(speaker: Path) -> None:
    model = load(speaker, device="cpu")
    asked = Asked(max_new_tokens=8, num_inference_steps=4, temperature=1.0)
    prompts = [one.prompt for one in sudoku.benchmark([Puzzle(TWICE, grids()[0])] * 2).problems]
    first, again, other = (
        Asking(model, asked, torch.Generator().manual_seed(seed))(prompts) for seed in (0, 0, 1)
    )
    assert first == again != other


def test_an_answer_goes_on_from_what_is_begun(
    speaker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The beginning is context: the same as a conversation whose header says it already."""
    model = load(speaker, device="cpu", dtype=torch.float64)
    asked = Asked(max_new_tokens=6, num_inference_steps=6)
    begun = Asking(model, asked, torch.Generator().manual_seed(0))([Prompt("hi", begun="<r>")])
    template = (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<r>"
    )
    with monkeypatch.context() as patch:
        patch.setattr(
            TextCodec, "encode", TextCodec.encode_with_specials
        )  # its names of special tokens are no letters
        whole = model.complete(template, max_new_tokens=6, num_inference_steps=6, block_length=6)
    asked = Asked(max_new_tokens=6, num_inference_steps=6, block_length=6)
    begun = Asking(model, asked, torch.Generator().manual_seed(0))([Prompt("hi", begun="<r>")])
    assert begun == [whole]


def test_prompts_of_several_kinds_keep_their_order(speaker: Path) -> None:
    model = load(speaker, device="cpu", dtype=torch.float64)
    asked = Asked(max_new_tokens=4, num_inference_steps=4)
    kinds = [Prompt("a"), Prompt("b", chat=False), Prompt("c", begun="<r>"), Prompt("d")]
    together = Asking(model, asked, torch.Generator().manual_seed(0))(kinds)
    alone = [Asking(model, asked, torch.Generator().manual_seed(0))([one])[0] for one in kinds]
    assert together == alone


@pytest.mark.parametrize(
    "options, message",
    [
        (["--out", "x.txt"], "does not end in .json"),
        (["--data", "absent.csv"], "cannot be read"),
        (["--blanks", "[1,14]"], "1 to 12"),
        (["--asked.batch_size", "0"], "batch_size 0 is too small"),
    ],
)
def test_mistakes_are_one_sentence_before_a_model_is_loaded(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["eval.run", "--task", "sudoku", "--model", "absent", *options]
    )
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error


@pytest.mark.parametrize("name", ["sudoku", "countdown", "gsm8k", "math500"])
def test_d1s_settings_are_a_config(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Path(__file__).parents[2] / "configs" / "eval" / f"d1_{name}.yaml"
    arguments = ["--config", str(config), "--model", "m", "--data", "d", "--print_config"]
    monkeypatch.setattr(sys, "argv", ["eval.run", *arguments])
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for line in (
        "max_new_tokens: 256",
        "num_inference_steps: 128",
        "block_length: 32",
        "style: d1",
        f"task: {name}",
    ):
        assert line in printed
