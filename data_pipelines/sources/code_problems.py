"""HumanEval and MBPP: functions to be written, with tests, and how they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from data_pipelines.sources.problems import D1_FORM, Problem, Prompt
from data_pipelines.sources.row_files import Row, read_rows
from mmdlm.tasks.code_problems import separate_tests

Style = Literal["d1_train", "llada"]

# what comes after a function
AFTER_FUNCTION = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")


def read_code(path: Path) -> list[Row]:
    """Read rows of a jsonl, of HumanEval or of MBPP.

    HumanEval has `prompt`, `test` and `entry_point`; MBPP `text` or `prompt`, and `test_list`.
    """
    rows = read_rows(path)
    for row in rows:
        tests, entry_point = (
            (str(row["test"]), str(row["entry_point"]))
            if is_human_eval(row)
            else ([str(one) for one in row["test_list"]], None)
        )
        try:
            separate_tests(tests, entry_point)
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from error
    return rows


def is_human_eval(row: Row) -> bool:
    """Return whether the row is of HumanEval, not of MBPP; ValueError for one of neither."""
    if row.get("test") and row.get("entry_point") and row.get("prompt"):
        return True
    if row.get("test_list") and row.get("text", "prompt"):
        return False
    raise ValueError(
        f"{row.where} is neither HumanEval (prompt, test, entry_point) nor MBPP (text, test_list)"
    )


def code_problem(row: Row, *, style: Style = "d1_train", examples: Sequence[Row] = ()) -> Problem:
    """How a function is asked for, after `examples`.

    "d1_train" is d1's message for code, which it trains with; "llada" the base model's, a text to
    go on with, in the words of lm-evaluation-harness: HumanEval's own head, and MBPP's [BEGIN] and
    [DONE].
    """
    human_eval = is_human_eval(row)
    name = str(row.get("task_id", default=row.where))
    columns = {
        "tests": str(row["test"]) if human_eval else [str(one) for one in row["test_list"]],
        "entry_point": str(row["entry_point"]) if human_eval else None,
        "setup": _head(row) if human_eval else _setup(row),
    }
    if style == "llada":
        shown = [_question(one) + _solution(one) for one in examples]
        if human_eval:
            head = str(row["prompt"])
            text = "".join(f"{one}\n\n" for one in shown) + head
            prompt = Prompt(text, chat=False, lead=head, stop=AFTER_FUNCTION)
        else:
            text = "".join(f"{one}\n[DONE]\n\n" for one in shown) + _question(row)
            prompt = Prompt(text, chat=False, stop=("[DONE]", "\n```"))
    else:
        if examples:
            raise ValueError(f"the style {style!r} shows no examples; ask for 0 shots")
        prompt = Prompt(
            f"{D1_FORM}\n\nYou are a coding expert. You will be given a coding problem to solve. "
            f"Solve it step by step. \n\n{_question(row)}"
        )
    return Problem(name, prompt, columns)


def _question(row: Row) -> str:
    if is_human_eval(row):
        return str(row["prompt"])
    tests = "\n".join(str(one) for one in row["test_list"][:3])
    return (
        f"You are an expert Python programmer, and here is your task: {row.get('text', 'prompt')} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def _solution(row: Row) -> str:
    return str(row["canonical_solution"] if is_human_eval(row) else row["code"])


def _head(row: Row) -> str:
    """Return what precedes the function in HumanEval's prompt: imports, helpers of the tests."""
    head, function, _ = str(row["prompt"]).rpartition(f"def {row['entry_point']}(")
    return head if function else ""


def _setup(row: Row) -> str:
    """Return what runs before the code: a text in MBPP, lines in its sanitized version."""
    lines = [str(row.get("test_setup_code", default=""))]
    lines += [str(one) for one in row.get("test_imports", default=[])]
    return "\n".join(line for line in lines if line)
