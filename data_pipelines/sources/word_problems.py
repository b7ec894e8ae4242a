"""GSM8K and MATH-500: mathematics in words, and how it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from data_pipelines.sources.problems import (
    D1_BEGUN,
    D1_FORM,
    Problem,
    Prompt,
    d1_message,
)
from data_pipelines.sources.row_files import Row, read_rows
from mmdlm.tasks.answers import boxed, reference_of

Style = Literal["d1", "d1_train", "llada"]

D1_EXPERT = (
    "You are a math expert. You will be given a question to solve. Solve it step by step. Wrap "
    "the final answer in a \\boxed{}. "
)
D1_FORM_BOXED = (
    "\nRespond in the following format:\n<reasoning>\nYour reasoning here\n</reasoning>\n<answer>\n"
    "\\boxed{...}\n</answer>"
)
D1_GSM8K = D1_EXPERT + D1_FORM_BOXED
D1_MATH500 = D1_EXPERT.rstrip(" ") + D1_FORM_BOXED + '" \n'


def read_gsm8k(path: Path) -> list[Row]:
    """Rows of a jsonl with `question` and `answer`, which ends in `#### 72`."""
    rows = read_rows(path)
    for row in rows:
        if not reference_of(str(row["answer"])) or not str(row["question"]).strip():
            raise ValueError(f"{row.where} has an empty question or answer")
    return rows


def gsm8k_problem(row: Row, *, style: Style = "d1", examples: Sequence[Row] = ()) -> Problem:
    """How a question is asked, after `examples` with their solutions.

    "d1" as d1 evaluates, "d1_train" as it trains (without examples), "llada" the base model's: a
    text to go on with, in the words of lm-evaluation-harness.
    """
    question = str(row["question"])
    shown = [(str(one["question"]), str(one["answer"])) for one in examples]
    if style == "llada":
        text = "".join(f"Question: {asked}\nAnswer: {answer}\n\n" for asked, answer in shown)
        prompt = Prompt(f"{text}Question: {question}\nAnswer:", chat=False, stop=("Question:",))
    elif style == "d1_train":
        _no_examples(shown, style)
        prompt = Prompt(f"{D1_FORM}\n\n{question}")
    else:
        prompt = Prompt(d1_message(D1_GSM8K, question, shown), begun=D1_BEGUN)
    return Problem(row.where, prompt, {"answer": str(row["answer"])})


def read_math500(path: Path) -> list[Row]:
    r"""Read rows of a jsonl: `problem`, and `answer` or a `solution` with a `\boxed` one."""
    rows = read_rows(path)
    for row in rows:
        if not str(row["problem"]).strip() or not math_reference(row):
            raise ValueError(f"{row.where} has an empty problem, or no answer to it")
    return rows


def math_reference(row: Row) -> str:
    """Return the right answer: of the column `answer`, or else boxed in the solution."""
    given = row.get("answer")
    return str(given) if given is not None else boxed(str(row["solution"])) or ""


def math500_problem(row: Row, *, style: Style = "d1", examples: Sequence[Row] = ()) -> Problem:
    """As `gsm8k_problem`; "llada" is Minerva's: `Problem:` and `Solution:`."""
    question = str(row["problem"])
    shown = [(str(one["problem"]), str(one["solution"])) for one in examples]
    if style == "llada":
        text = "".join(f"Problem:\n{asked}\n\nSolution:\n{answer}\n\n" for asked, answer in shown)
        prompt = Prompt(f"{text}Problem:\n{question}\n\nSolution:", chat=False, stop=("Problem:",))
    elif style == "d1_train":
        _no_examples(shown, style)
        prompt = Prompt(f"{D1_FORM}\n\n{D1_EXPERT}\n\n{question}")
    else:
        prompt = Prompt(d1_message(D1_MATH500, question, shown), begun=D1_BEGUN)
    name = str(row.get("unique_id", default=row.where))
    columns = {
        "answer": math_reference(row),
        "level": str(row.get("level", default="")),
        "subject": str(row.get("subject", "type", default="")),
    }
    return Problem(name, prompt, columns)


def _no_examples(shown: Sequence[object], style: str) -> None:
    if shown:
        raise ValueError(f"the style {style!r} shows no examples; ask for 0 shots")
