"""Questions and functions from files, asked as they were published."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines.sources.code_problems import code_problem, read_code
from data_pipelines.sources.problems import Prompt, columns_of, drawn
from data_pipelines.sources.row_files import read_rows
from data_pipelines.sources.word_problems import (
    gsm8k_problem,
    math500_problem,
    read_gsm8k,
    read_math500,
)
from train.rollouts.prompts import Lines


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


GSM8K = [
    {"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(5)
]
MATH = {"problem": "Find $x$.", "solution": r"So $\boxed{\frac{1}{2}}$.", "level": 3}
HUMAN_EVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def f(x):\n    """One more."""\n',
    "canonical_solution": "    return x + 1\n",
    "entry_point": "f",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n",
}
MBPP = {
    "task_id": 11,
    "text": "Write a function to add one.",
    "code": "def f(x):\n    return x + 1",
    "test_list": ["assert f(1) == 2", "assert f(2) == 3"],
    "test_setup_code": "import math",
}


def test_completions_are_cut_and_put_behind_what_was_there() -> None:
    prompt = Prompt("q", begun="<a>", stop=("\n\n", "Question:"))
    assert prompt.whole("1\n\nQuestion: 2") == "<a>1"
    assert prompt.whole("1 Question: 2\n\n") == "<a>1 "
    assert Prompt("q", lead="def f():\n").whole("    return") == "def f():\n    return"
    assert prompt.messages == [{"role": "user", "content": "q"}]


def test_gsm8k_as_d1_asks(tmp_path: Path) -> None:
    rows = read_gsm8k(lines(tmp_path / "a.jsonl", *GSM8K))
    problem = gsm8k_problem(rows[0])
    text = problem.prompt.text
    assert text.startswith("You are a math expert. ")
    assert text.endswith(
        "Wrap the final answer in a \\boxed{}. \nRespond in the following format:\n"
        "<reasoning>\nYour reasoning here\n</reasoning>\n<answer>\n\\boxed{...}\n"
        "</answer>\n\nWhat is 0 + 1?"
    )
    assert problem.prompt.begun == "<reasoning>"
    assert problem.columns == {"answer": "It is 1.\n#### 1"}
    few = gsm8k_problem(rows[0], examples=rows[1:3]).prompt.text
    assert few.endswith(
        "</answer>\n\nQuestion: What is 1 + 1?\nAnswer:\nIt is 2.\n#### 2\n\n"
        "Question: What is 2 + 1?\nAnswer:\nIt is 3.\n#### 3\n\nQuestion: What is 0 + 1?\nAnswer:\n"
    )
    trained = gsm8k_problem(rows[0], style="d1_train").prompt
    assert trained.text == (
        "\nRespond in the following format:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n"
        "</answer>\n\n\nWhat is 0 + 1?"
    )
    with pytest.raises(ValueError, match="0 shots"):
        gsm8k_problem(rows[0], style="d1_train", examples=rows[1:])


def test_gsm8k_as_a_base_model_is_asked(tmp_path: Path) -> None:
    rows = read_gsm8k(lines(tmp_path / "a.jsonl", *GSM8K))
    prompt = gsm8k_problem(rows[0], style="llada", examples=rows[1:2]).prompt
    assert prompt.text == (
        "Question: What is 1 + 1?\nAnswer: It is 2.\n#### 2\n\nQuestion: What is 0 + 1?\nAnswer:"
    )
    assert not prompt.chat
    assert prompt.whole(" 1\n#### 1\n\nQuestion: next").strip() == "1\n#### 1"


def test_math500(tmp_path: Path) -> None:
    answered = {**MATH, "answer": "0.5", "unique_id": "test/1"}
    bare, full = read_math500(lines(tmp_path / "a.jsonl", MATH, answered))
    assert math500_problem(bare).columns["answer"] == r"\frac{1}{2}"
    assert math500_problem(full).columns == {"answer": "0.5", "level": "3", "subject": ""}
    assert math500_problem(full).name == "test/1"
    assert math500_problem(full).prompt.text.endswith('</answer>" \n\n\nFind $x$.')
    base = math500_problem(full, style="llada", examples=[bare]).prompt
    assert base.text == (
        "Problem:\nFind $x$.\n\nSolution:\nSo $\\boxed{\\frac{1}{2}}$.\n\n"
        "Problem:\nFind $x$.\n\nSolution:"
    )
    assert not base.chat


def test_math500_in_few_shots_of_d1(tmp_path: Path) -> None:
    other = {"problem": "Find $y$.", "solution": r"It is $\boxed{2}$."}
    rows = read_math500(lines(tmp_path / "a.jsonl", {**MATH, "answer": "0.5"}, MATH, other))
    prompt = math500_problem(rows[0], examples=rows[1:]).prompt
    assert prompt.text.startswith("You are a math expert. ")
    assert prompt.text.endswith(
        '</answer>" \n\n\nQuestion: Find $x$.\nAnswer:\nSo $\\boxed{\\frac{1}{2}}$.\n\n'
        "Question: Find $y$.\nAnswer:\nIt is $\\boxed{2}$.\n\n"
        "Question: Find $x$.\nAnswer:\n"
    )
    assert (prompt.chat, prompt.begun) == (True, "<reasoning>")
    with pytest.raises(ValueError, match="0 shots"):
        math500_problem(rows[0], style="d1_train", examples=rows[1:])


def test_human_eval_goes_on_from_its_head(tmp_path: Path) -> None:
    (row,) = read_code(lines(tmp_path / "a.jsonl", HUMAN_EVAL))
    problem = code_problem(row, style="llada")
    assert problem.prompt.text == HUMAN_EVAL["prompt"]
    assert problem.prompt.whole("    return x + 1\n\ndef g():") == (
        'def f(x):\n    """One more."""\n    return x + 1\n'
    )
    assert problem.columns["entry_point"] == "f"
    assert code_problem(row).prompt.text.endswith("step by step. \n\n" + HUMAN_EVAL["prompt"])


def test_mbpp_between_its_marks(tmp_path: Path) -> None:
    (row,) = read_code(lines(tmp_path / "a.jsonl", MBPP))
    problem = code_problem(row, style="llada", examples=[row])
    one = (
        "You are an expert Python programmer, and here is your task: Write a function to add one. "
        "Your code should pass these tests:\n\nassert f(1) == 2\nassert f(2) == 3\n[BEGIN]\n"
    )
    assert problem.prompt.text == one + MBPP["code"] + "\n[DONE]\n\n" + one
    assert problem.prompt.whole("def f(x):\n    return x\n[DONE] more") == (
        "def f(x):\n    return x\n"
    )
    assert problem.columns == {
        "tests": MBPP["test_list"],
        "entry_point": None,
        "setup": "import math",
    }


@pytest.mark.parametrize(
    "read, row, message",
    [
        (read_gsm8k, {"question": "q"}, "has no 'answer'.*it has question"),
        (read_gsm8k, {"question": " ", "answer": "1"}, "empty question"),
        (read_math500, {"problem": "p"}, "has no 'solution'"),
        (read_math500, {"problem": "p", "solution": "no box"}, "no answer to it"),
        (read_code, {"prompt": "p"}, "neither HumanEval"),
        (read_code, {**MBPP, "test_list": [" "]}, "there are no tests"),
    ],
)
def test_rows_that_lack_something(
    read: Any, row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"a.jsonl, line 1.*{message}"):
        read(lines(tmp_path / "a.jsonl", row))


def test_examples_are_drawn_by_the_generator(tmp_path: Path) -> None:
    rows = read_rows(lines(tmp_path / "a.jsonl", *GSM8K))
    first, again = (drawn(rows, 3, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    assert first == again
    assert len({one.where for one in first}) == 3
    with pytest.raises(ValueError, match="has 5"):
        drawn(rows, 6, generator=torch.Generator())


def test_columns_of_many(tmp_path: Path) -> None:
    rows = read_rows(lines(tmp_path / "a.jsonl", *GSM8K[:2]))
    assert columns_of([gsm8k_problem(row) for row in rows])["answer"] == [
        "It is 1.\n#### 1",
        "It is 2.\n#### 2",
    ]
    assert columns_of([]) == {}


def test_prompts_of_the_hub_are_those_of_a_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = [{"question": "1 + 1", "answer": "2"}, {"question": "2 + 2", "answer": "4"}]
    asked: list[Any] = []
    theirs = inspect.signature(datasets.load_dataset)  # by its own names of what it is given

    def load_dataset(*names: Any, **options: Any) -> Any:
        asked.append(theirs.bind(*names, **options).arguments)
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    first, second = Lines("owner/sums", prompt="question", split="test").problems()
    options = {"name": None, "split": "test", "streaming": True}
    assert asked == [{"path": "owner/sums", **options}]
    assert (first.prompt, first.columns) == (Prompt("1 + 1"), {"answer": "2"})
    assert (second.prompt, second.columns) == (Prompt("2 + 2"), {"answer": "4"})
