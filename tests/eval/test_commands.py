"""Each benchmark from its command line to its files."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from eval import run as evaluate
from mmdlm.rl.rewards.answers import math_equivalence

needs_math = pytest.mark.skipif(
    math_equivalence.find_spec("math_verify") is None, reason="the extra math is not installed"
)

GSM8K = [{"question": f"What is {n} + 1?", "answer": f"So.\n#### {n + 1}"} for n in range(6)]
MATH = [
    {"problem": f"Find ${n}x$.", "solution": f"It is $\\boxed{{{n}}}$.", "level": 1 + n % 2}
    for n in range(6)
]
HUMAN_EVAL = [
    {
        "task_id": f"HumanEval/{n}",
        "prompt": f"def f{n}(x):\n",
        "canonical_solution": f"    return x + {n}\n",
        "entry_point": f"f{n}",
        "test": f"def check(candidate):\n    assert candidate(1) == {n + 1}\n",
    }
    for n in range(6)
]
MBPP = [
    {
        "task_id": n,
        "text": f"Add {n}.",
        "code": f"def f(x):\n    return x + {n}",
        "test_list": [f"assert f(1) == {n + 1}"],
    }
    for n in range(6)
]
COUNTDOWN = [
    {"input": "30,100,93", "output": "23"},
    {"input": "1,2,3,4", "output": "24"},
    {"input": "1,1", "output": "99"},
]


@pytest.fixture
def command(speaker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a benchmark's command; its report and its answers, after what all of them have."""

    def run(
        task: str, rows: list[dict[str, Any]] | None, *more: str, count: int, kind: str
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        out = tmp_path / "out.json"
        arguments = [
            "--task",
            task,
            "--model",
            str(speaker),
            "--out",
            str(out),
            "--asked.device",
            "cpu",
        ]
        arguments += ["--asked.max_new_tokens", "8", "--asked.num_inference_steps", "2"]
        arguments += ["--asked.block_length", "4", "--asked.batch_size", "2", "--asked.seed", "5"]
        data = None if rows is None else written(tmp_path / "data.jsonl", rows)
        arguments += [] if data is None else ["--data", str(data)]
        monkeypatch.setattr(sys, "argv", ["benchmark", *arguments, *more])
        evaluate.main()

        report = json.loads(out.read_text())
        with out.with_suffix(".jsonl").open() as lines:  # which end in \n alone, whatever was said
            answers = [json.loads(line) for line in lines]
        assert report["results"]["count"] == len(answers) == count
        settings = report["settings"]
        assert (settings["seed"], settings["max_new_tokens"], settings["batch_size"]) == (5, 8, 2)
        assert list(settings["generation_config"]) == [kind]
        generation_config = settings["generation_config"][kind]
        assert (generation_config["num_inference_steps"], generation_config["block_length"]) == (
            2,
            4,
        )
        assert set(generation_config) >= {
            "temperature",
            "order",
            "schedule",
            "guidance_scale",
            "top_p",
        }
        weights = hashlib.sha256((speaker / "model.safetensors").read_bytes()).hexdigest()
        assert report["model"]["sha256"] == {"model.safetensors": weights}
        sha = None if data is None else hashlib.sha256(data.read_bytes()).hexdigest()
        assert report["data"]["sha256"] == sha
        for name, measure in report["results"]["measures"].items():
            scores = [one["scores"][name] for one in answers]
            assert measure["count"] == count
            assert measure["value"] == pytest.approx(sum(scores) / count)
        assert any(one["completion"] for one in answers)
        return report, answers

    return run


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def shown_in(report: dict[str, Any], path: Path, rows: list[dict[str, Any]]) -> list[Any]:
    """The rows of a file that the report says were examples."""
    where = {f"{path}, line {number}": row for number, row in enumerate(rows, 1)}
    return [where[one] for one in report["data"]["examples"]]


# ---- GSM8K and MATH


@pytest.mark.parametrize(
    "style, shots, kind, ends",
    [
        ("d1", 0, "answer", ""),
        ("d1", 2, "answer", "\nAnswer:\n"),
        ("llada", 2, "complete", "\nAnswer:"),
    ],
    ids=["d1", "d1_few", "llada_few"],
)
def test_gsm8k(style: str, shots: int, kind: str, ends: str, command: Any, tmp_path: Path) -> None:
    other = written(tmp_path / "train.jsonl", GSM8K[3:])
    more = ["--style", style, "--shots", str(shots), "--examples", str(other)]
    report, answers = command("gsm8k", GSM8K[:3], *more, count=3, kind=kind)
    assert set(report["results"]["measures"]) == {"right", "strict"}
    assert (report["data"]["style"], report["data"]["shots"]) == (style, shots)
    shown = shown_in(report, other, GSM8K[3:])
    assert len(shown) == shots
    for row, said in zip(GSM8K[:3], answers, strict=True):
        assert said["begun"] == ("<reasoning>" if style == "d1" else "")
        asked = [one["question"] for one in [*shown, row]]
        assert said["prompt"].endswith(asked[-1] + ends)
        places = [said["prompt"].index(one) for one in asked]
        assert places == sorted(places)
        assert said["columns"]["answer"] == row["answer"]


@needs_math
@pytest.mark.parametrize(
    "style, shots, kind, ends",
    [
        ("d1", 0, "answer", ""),
        ("d1", 2, "answer", "\nAnswer:\n"),
        ("llada", 2, "complete", "\n\nSolution:"),
    ],
    ids=["d1", "d1_few", "llada_few"],
)
def test_math500(
    style: str, shots: int, kind: str, ends: str, command: Any, tmp_path: Path
) -> None:
    other = written(tmp_path / "train.jsonl", MATH[3:])
    more = ["--style", style, "--shots", str(shots), "--examples", str(other)]
    report, answers = command("math500", MATH[:3], *more, count=3, kind=kind)
    assert set(report["results"]["measures"]) == {"right", "exact"}
    levels = report["results"]["by_level"]
    assert {level: one["right"]["count"] for level, one in levels.items()} == {"1": 2, "2": 1}
    assert (report["data"]["style"], report["data"]["shots"]) == (style, shots)
    shown = shown_in(report, other, MATH[3:])
    assert len(shown) == shots
    for row, said in zip(MATH[:3], answers, strict=True):
        assert said["begun"] == ("<reasoning>" if style == "d1" else "")
        asked = [one["problem"] for one in [*shown, row]]
        assert said["prompt"].endswith(asked[-1] + ends)
        places = [said["prompt"].index(one) for one in asked]
        assert places == sorted(places)
        assert said["prompt"].count("\\boxed{...}") == (style == "d1")


# ---- code


@pytest.mark.parametrize("rows", [HUMAN_EVAL, MBPP], ids=["human_eval", "mbpp"])
@pytest.mark.parametrize(
    "style, shots, kind",
    [("d1_train", 0, "answer"), ("llada", 0, "complete"), ("llada", 2, "complete")],
)
def test_code(
    rows: list[dict[str, Any]], style: str, shots: int, kind: str, command: Any, tmp_path: Path
) -> None:
    other = written(tmp_path / "train.jsonl", rows[3:])
    more = ["--style", style, "--shots", str(shots), "--examples", str(other)]
    more += ["--sandbox.seconds", "2"]
    human_eval = rows is HUMAN_EVAL
    report, answers = command(
        "humaneval" if human_eval else "mbpp", rows[:3], *more, count=3, kind=kind
    )
    assert report["results"]["measures"]["pass@1"]["value"] == 0
    data = report["data"]
    assert (data["human_eval"], data["mbpp"]) == ((3, 0) if human_eval else (0, 3))
    assert (data["style"], data["shots"], data["seconds"]) == (style, shots, 2)
    shown = shown_in(report, other, rows[3:])
    assert len(shown) == shots
    solved = [one["canonical_solution" if human_eval else "code"] for one in shown]
    for row, said in zip(rows[:3], answers, strict=True):
        asked = row["prompt"] if human_eval else row["test_list"][0] + "\n[BEGIN]\n"
        assert said["prompt"].endswith(asked)
        places = [said["prompt"].index(one) for one in [*solved, asked]]
        assert places == sorted(places)
        assert said["code/reason"]


# ---- countdown


def test_countdown_of_a_file(command: Any) -> None:
    report, answers = command("countdown", COUNTDOWN, count=3, kind="answer")
    assert set(report["results"]["measures"]) == {"right"}
    data = report["data"]
    assert data["numbers"] == {"2": 1, "3": 1, "4": 1}
    assert (data["solvable"], data["style"], data["problems"]) == (2, "d1", 3)
    assert [one["columns"]["target"] for one in answers] == [23, 24, 99]
    assert all(one["begun"] == "<reasoning>" for one in answers)


def test_countdown_of_four_numbers(command: Any) -> None:
    more = ["--numbers", "4", "--count", "3", "--style", "plain"]
    report, answers = command("countdown", None, *more, count=3, kind="complete")
    data = report["data"]
    assert (data["numbers"], data["solvable"], data["split"]) == ({"4": 3}, 3, "held_out")
    assert all(len(one["columns"]["numbers"]) == 4 for one in answers)
    for one in answers:
        numbers = ",".join(map(str, one["columns"]["numbers"]))
        assert one["prompt"] == f"{numbers}->{one['columns']['target']}\n"


# ---- which task


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--task", "gsm9k"], "there is no task 'gsm9k'; the nearest is gsm8k"),
        (["--task", "HumanEval"], "there is no task 'HumanEval'; the nearest is humaneval"),
        (["--task", "xyz"], "there is no task 'xyz'; take one of gsm8k, math500, sudoku"),
        ([], "no task is named; give --task, one of gsm8k"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--task", "gsm8k", "--model", "m"], "data"),
        (["--task", "sudoku", "--model", "m", "--max_new_tokens", "8"], "asked.max_new_tokens"),
        (["--task", "gsm8k", "--model", "m", "--data", "d", "--blanks", "[1, 2]"], "--blanks"),
    ],
)
def test_a_wrong_task_is_one_sentence(
    given: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.run", *given])
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip()
    assert says in said
    assert "\n" not in said


def test_help_lists_the_tasks_and_then_the_options_of_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.run", "--help"])
    evaluate.main()
    assert ", ".join(evaluate.TASKS) in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(sys, "argv", ["eval.run", "--task", "sudoku", "--help"])
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--blanks" in said
    assert "Bundled name, or the folder of a checkpoint or a run." in said  # of all tasks


def test_problems_of_the_other_code_task_are_named(tmp_path: Path) -> None:
    path = written(tmp_path / "data.jsonl", MBPP[:1])
    with pytest.raises(ValueError, match="line 1: a problem of another task; give --task mbpp"):
        evaluate.TASKS["humaneval"](model="absent", data=path, out=tmp_path / "a.json")()
