"""Options that nobody can mean are one sentence, before a job begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data_pipelines import sudoku, text_tokenizer, tokenize_images, write_shards
from data_pipelines.sudoku import Split

Shell = Callable[..., tuple[int, str]]
BEGUN: list[dict[str, Any]] = []


@dataclass(frozen=True)
class Part:
    """Options in a group."""

    steps: int = 1
    names: tuple[str, ...] = ()


class Rate:
    """What a class path names."""

    def __init__(self, learning_rate: float = 0.1) -> None:
        self.learning_rate = learning_rate


def job(
    out: Path,
    *,
    part: Part = Part(),
    parts: list[Part] = [],  # noqa: B006 - read alone
    rate: Rate | None = None,
    model: str = "emoji",
    system: str = "",
    image: Path | None = None,
    threads: int = 1,
    split: Split = "train",
) -> None:
    """A job with options of every kind."""
    BEGUN.append(locals())


MODULE = "tests.data_pipelines.test_command_line"


@pytest.mark.parametrize(
    "given, said",
    [
        ("--Out=x", "there is no option --Out; did you mean --out?"),
        ("--part.Steps=1", "there is no option --part.Steps; did you mean --part.steps?"),
        ("--part.stpes 1", "there is no option --part.stpes; did you mean --part.steps?"),
        ("--STEPS=1", "there is no option --STEPS"),
        ("--zzz=1", "there is no option --zzz; there are --config, --out, --part"),
        ("--part={Steps: 1}", "there is no option part.Steps; did you mean part.steps?"),
        ("--part={steps: 1, qq: 1}", "there is no option part.qq; there are part.steps, part.n"),
        ("--parts=[{Steps: 1}]", "there is no option Steps; did you mean steps?"),
        (f"--rate={MODULE}.rate", f"did you mean {MODULE}.Rate?"),
        (
            f"--rate={{class_path: {MODULE}.Rate, init_args: {{Learning_Rate: 1}}}}",
            "there is no option Learning_Rate; did you mean learning_rate?",
        ),
        (f"--rate={MODULE}.Rate --rate.lr=1", "there is no option"),
        ("--split=Train", "'train', 'held_out'"),
        ("--out=", "a path is empty; name a file or a folder"),
        ("--image=", "a path is empty; name a file or a folder"),
        ("--model=", "model is ''; give it a value, or leave it out"),
        ("--model=\t", "model is '\\t'; give it a value"),
        ("--part.names=['']", "part.names.0 is ''; give it a value"),
        ("--threads=0", "threads is 0; it must be 1 ... 1024"),
        ("--threads=-1", "threads is -1; it must be 1 ... 1024"),
        ("--threads=1000000", "threads is 1000000; it must be 1 ... 1024"),
        ("--part.steps=1e30", "1e+30"),
        ("--part.steps=10000000000", "part.steps is 10000000000; it must be at most 1,000,000,000"),
        ("--part.steps=.nan", "part.steps"),
    ],
)
def test_one_sentence_names_it(given: str, said: str, shell: Shell, tmp_path: Path) -> None:
    BEGUN.clear()
    status, errors = shell(job, "--out", tmp_path / "out", *given.split(" --", 1)[:1], *more(given))
    assert status == 2
    assert said in errors
    assert errors.count("\n") == 1
    assert BEGUN == []


def more(given: str) -> list[str]:
    """What stands behind the first of two options."""
    return [f"--{one}" for one in given.split(" --")[1:]]


@pytest.mark.parametrize(
    "value, said", [("7", "7"), ("null", "None"), ("[1]", "[1]"), ("true", "True")]
)
def test_one_value_in_the_place_of_a_group(
    value: str, said: str, shell: Shell, tmp_path: Path
) -> None:
    BEGUN.clear()
    file = tmp_path / "a.yaml"
    file.write_text(f"part: {value}\n")
    status, errors = shell(job, "--config", file, "--out", tmp_path / "out")
    assert (status, errors.count("\n")) == (2, 1)
    assert f"part is {said}, but it is a group of options: part.steps, part.names" in errors
    assert BEGUN == []


def test_others_begin(shell: Shell, tmp_path: Path) -> None:
    """A default may be empty, and so may nothing."""
    BEGUN.clear()
    options = ["--system=", "--image=.", "--model=a", "--threads=2", "--parts=[{steps: 2}]"]
    assert shell(job, "--out", tmp_path, *options)[0] == 0
    (begun,) = BEGUN
    assert (begun["system"], begun["image"], begun["threads"]) == ("", Path(), 2)


@pytest.mark.parametrize("threads", ["0", "-1", "1000000", "1.5", ".nan"])
def test_threads_of_a_job(threads: str, shell: Shell, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--shards", "nowhere", "--tokenizer", tmp_path, "--out", out]
    status, said = shell(tokenize_images.main, *options, "--threads", threads)
    assert (status, said.count("\n")) == (2, 1)
    assert "threads" in said
    assert not out.exists()


@pytest.mark.parametrize(
    "given, said",
    [
        (["--images", ""], "a path is empty"),
        (["--images", "x", "--size", "1000000"], "size is 1000000"),
        (["--images", "x", "--text", ""], "text is ''"),
        (["--Images", "x"], "did you mean --images?"),
        (["--images", "x", "--max_broken", "-1"], "max_broken is -1.0; a share lies in [0, 1]"),
        (["--images", "x", "--max_broken", "2"], "max_broken is 2.0; a share lies in [0, 1]"),
        (["--images", "x", "--samples_per_shard", "0"], "samples_per_shard is 0; it must be 1 or"),
    ],
)
def test_a_folder_of_images(given: list[str], said: str, shell: Shell, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, errors = shell({"folder": write_shards.folder}, "folder", "--out", out, *given)
    assert (status, errors.count("\n")) == (2, 1)
    assert said in errors
    assert not out.exists()


def test_a_vocabulary_that_no_tokenizer_has(shell: Shell, tmp_path: Path) -> None:
    """The library would end the process."""
    (tmp_path / "x.jsonl").write_text('{"text": "a b"}\n')
    write_shards.text(str(tmp_path / "x.jsonl"), tmp_path / "shards")
    options = ["--shards", tmp_path / "shards", "--out", tmp_path / "out"]
    status, said = shell(text_tokenizer.main, *options, "--size", "1000000000")
    assert status == 2
    assert "Traceback" not in said
    assert "size 1000000000: a tokenizer has at most 10,000,000 ids" in said


def test_more_puzzles_than_there_are(shell: Shell, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    status, said = shell(sudoku.main, "--out", out, "--count", "1000000000")
    assert (status, said.count("\n")) == (2, 1)
    assert "1000000000" in said
