"""lm-eval asks a model: local tasks end to end, and what each answer and score is."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.lm_eval import with_model
from mmdlm.pipeline.model import Model

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402

from mmdlm.harnesses.lm_eval import MmdlmLM  # noqa: E402

ROOT = Path(__file__).parents[2]
WORDS = ("one", "two", "three", "red heart", "dark", "a cat on the mat", "why", "not")


def requests(kind: Any, arguments: Sequence[tuple[Any, ...]], task: str = "t") -> list[Instance]:
    return [
        Instance(kind, {}, one, number, (task, number, 1)) for number, one in enumerate(arguments)
    ]


def writing(contexts: Sequence[str], **arguments: Any) -> list[Instance]:
    """Requests for texts that may get long or short, and so end rows at other times."""
    return requests(
        "generate_until", [(one, {"max_gen_toks": 12, **arguments}) for one in contexts]
    )


def contexts(count: int) -> list[str]:
    """Texts of one word to many."""
    return [" ".join(WORDS[: 1 + n % len(WORDS)]) + f" {n}:" for n in range(count)]


# --- texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_a_batch_writes_what_each_alone_does(family: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(family)
    asked = writing(contexts(7), until=["a", "Q:"], num_inference_steps=6)
    alone = MmdlmLM(model).generate_until(asked)
    together = MmdlmLM(model, batch_size=3).generate_until(asked)
    assert together == alone
    assert len(set(alone)) > 1


def test_a_text_is_that_of_the_model_up_to_a_stop_string(llada: Model) -> None:
    asked = contexts(4)
    whole = llada.complete(asked, max_new_tokens=12, num_inference_steps=6)
    stop = next(text[2] for text in whole if len(text) > 3)
    harness = MmdlmLM(llada, batch_size=4, num_inference_steps=6)
    found = harness.generate_until(writing(asked, until=[stop]))
    assert found == [text.partition(stop)[0] for text in whole]
    assert found != whole
    kept = MmdlmLM(llada, batch_size=4, num_inference_steps=6, ignore_until=True)
    assert kept.generate_until(writing(asked, until=[stop])) == whole


def test_a_drawn_text_depends_on_its_context_and_turn_alone(llada: Model) -> None:
    def drawn(contexts: list[str], **options: Any) -> list[str]:
        harness = MmdlmLM(llada, num_inference_steps=6, **options)
        return harness.generate_until(writing(contexts, do_sample=True, temperature=1.0))

    first, second, again = drawn(["a:", "bb:", "a:"])
    assert first != again  # asked twice, for pass@k
    assert drawn(["bb:", "a:"], batch_size=2) == [second, first]
    assert drawn(["a:"], seed=1) != [first]


def test_conversations_are_those_of_the_model(llada: Model) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "one <|eot_id|> two"},  # a name in a message is letters
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "four?"},
    ]
    harness = MmdlmLM(llada, num_inference_steps=6)
    (said,) = harness.generate_until(writing([harness.apply_chat_template(messages)]))
    expected = llada.chat(messages, max_new_tokens=12, num_inference_steps=6)
    assert said.strip() == expected
    begun = [*messages, {"role": "assistant", "content": "The answer is"}]
    prompt = harness.apply_chat_template(begun, add_generation_prompt=False)
    (more,) = harness.generate_until(writing([prompt]))
    assert more != said


def test_a_prompt_that_is_too_long_loses_its_beginning(
    llada: Model, caplog: pytest.LogCaptureFixture
) -> None:
    long = "x" * 600 + "the end:"
    harness = MmdlmLM(llada, num_inference_steps=6)
    (found,) = harness.generate_until(writing([long]))
    assert harness.generate_until(writing([long[-500:]])) == [found]  # 512 - 12 bytes
    assert "cut to its last 500" in caplog.text


def test_a_preset_wins_over_the_task_and_says_so(
    llada: Model, caplog: pytest.LogCaptureFixture
) -> None:
    harness = MmdlmLM(llada, preset="d1", max_new_tokens=32)
    harness.generate_until(writing(["a:"], temperature=0.5))
    assert "max_new_tokens is 32, not 12" in caplog.text
    assert "--apply_chat_template" in caplog.text
    (asked,) = harness.get_model_info()["mmdlm"]["generation"].values()
    assert asked["generation_config"]["num_inference_steps"] == 16
    assert asked["generation_config"]["block_length"] == 32


def test_a_batch_that_does_not_fit_is_halved(
    llada: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = writing(contexts(5), num_inference_steps=4)
    expected = MmdlmLM(llada).generate_until(asked)
    whole = Model.text_run

    def text_run(self: Model, prompts: list[Any], *rest: Any, **options: Any) -> Any:
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("no room")
        return whole(self, prompts, *rest, **options)

    monkeypatch.setattr(Model, "text_run", text_run)
    assert MmdlmLM(llada, batch_size="auto").generate_until(asked) == expected
    assert "batch of 2" in caplog.text


# --- likelihoods ----------------------------------------------------------------------------------


def pairs(count: int) -> list[tuple[str, str]]:
    return [(one, " " + "abcdefghi"[: 1 + n % 9]) for n, one in enumerate(contexts(count))]


def test_scores_are_those_of_the_model_whatever_the_batch(llada: Model) -> None:
    asked = requests("loglikelihood", pairs(5))
    few = {"samples": 16}
    alone = MmdlmLM(llada, **few).loglikelihood(asked)
    together = MmdlmLM(llada, batch_size=8, **few).loglikelihood(asked)
    for one, other in zip(alone, together, strict=True):
        assert one == pytest.approx(other, rel=1e-9)
    (short, *_) = llada.loglikelihood(pairs(1))  # enumerated: nothing is drawn
    assert alone[0][0] == pytest.approx(short.value, rel=1e-9)
    assert len(alone) == 5


@pytest.mark.slow
def test_twenty_of_twenty_are_within_two_standard_errors_of_enumeration(llada: Model) -> None:
    asked = requests("loglikelihood", pairs(20))
    harness = MmdlmLM(llada, batch_size=64, samples=64)
    found = harness.loglikelihood(asked)
    exact = MmdlmLM(llada, batch_size=64, estimator="EnumeratedElbo").loglikelihood(asked)
    scores = {one.document: one for one in harness._scores["t"].values()}
    assert any(one.standard_error for one in scores.values())
    for number, ((value, _), (expected, _)) in enumerate(zip(found, exact, strict=True)):
        assert abs(value - expected) <= 2 * scores[number].standard_error + 1e-6


def test_conversations_are_scored_too(llada: Model) -> None:
    messages = [{"role": "user", "content": "one?"}]
    harness = MmdlmLM(llada)
    prompt = harness.apply_chat_template(messages)
    ((value, greedy),) = harness.loglikelihood(requests("loglikelihood", [(prompt, "two")]))
    (expected,) = llada.loglikelihood([(messages, "two")])
    assert (value, greedy) == (pytest.approx(expected.value), expected.is_greedy)


def test_a_prefix_of_the_answer_is_not_scored(llada: Model) -> None:
    messages = [{"role": "user", "content": "one?"}]
    begun = [*messages, {"role": "assistant", "content": "It is"}]
    (whole,) = llada.loglikelihood([(begun, " two")])
    assert whole.tokens == 4
    document = llada._scored_document(begun, " two")
    asked = llada._scored_document(messages, "It is two")
    assert [i for one in document.segments for i in one.ids.tolist()] == [
        i for one in asked.segments for i in one.ids.tolist()
    ]


def test_guidance_of_likelihoods_is_spoken_of(
    llada: Model, caplog: pytest.LogCaptureFixture
) -> None:
    harness = MmdlmLM(llada, guidance_scale=1.5)
    harness.loglikelihood(requests("loglikelihood", [("a", " b")]))
    assert "without guidance" in caplog.text


@pytest.mark.parametrize("name", ["OneStepMeanField", "one_step_mean_field", "Elbo"])
def test_an_estimator_is_named(llada: Model, name: str) -> None:
    harness = MmdlmLM(llada, estimator=name, samples=4)
    ((value, _),) = harness.loglikelihood(requests("loglikelihood", [("one", " two")]))
    assert math.isfinite(value)


def test_errors_of_a_task_are_in_the_results(llada: Model) -> None:
    harness = MmdlmLM(llada, samples=8)
    texts = (f" {word} more" for word in WORDS[:2])
    asked = [
        Instance("loglikelihood", {}, ("one", text), number, ("t", 0, 1))
        for number, text in enumerate(texts)
    ]
    harness.loglikelihood(asked)
    errors = harness.get_model_info()["mmdlm"]["loglikelihood"]["t"]
    assert errors["requests"] == 2
    assert errors["tokens"] == 18
    assert errors["standard_error_largest"] >= errors["standard_error_mean"] > 0
    assert errors["choices"] == 1


def test_characters_of_several_tokens_stay_whole_in_windows(llada: Model) -> None:
    small = replace(llada, max_length=9)
    harness = MmdlmLM(small, samples=2, batch_size=8)
    text = "\U0001f600\U0001f389\U0001f431" * 6
    windows = list(harness._windows(text))
    assert "".join(piece for _, piece in windows) == text
    assert max(len(small.codec.encode(piece)) for _, piece in windows) <= small.longest_text
    assert len(harness.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))) == 1


def test_a_long_text_is_scored_window_by_window(llada: Model) -> None:
    small = replace(llada, max_length=9)  # texts of at most 8 bytes
    harness = MmdlmLM(small, samples=2, batch_size=8)
    text = "abcdefg hijklmnopq"
    windows = list(harness._windows(text))
    assert "".join(piece for _, piece in windows) == text
    assert windows[0] == ("", "abcdefg")
    assert windows[1] == ("g", " hijklm")
    assert windows[2] == ("jklm", "nopq")
    (whole,) = harness.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
    seen: dict[str, int] = {}
    seeds = [harness.subject.seed_of(f"{text}\x1f{a}\x1f{b}", seen) for a, b in windows]
    parts = small.loglikelihood(
        windows, samples=2, generator=[torch.Generator().manual_seed(seed) for seed in seeds]
    )
    assert whole == pytest.approx(sum(part.value for part in parts))
    (short,) = harness.loglikelihood_rolling(requests("loglikelihood_rolling", [("abc",)]))
    (expected,) = small.loglikelihood([("", "abc")], samples=2)
    assert math.isfinite(short)
    assert math.isfinite(expected.value)
    assert harness.loglikelihood_rolling(requests("loglikelihood_rolling", [("",)])) == [0.0]


# --- tasks on local files -------------------------------------------------------------------------


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Three tasks as their YAML files would have them."""
    rows = [
        {"question": f"What is {a} plus {b}?", "choices": [f" {a + b}", f" {a * b}"], "label": 0}
        for a, b in [(1, 2), (3, 4), (5, 6)]
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "doc_to_text": "Q: {{question}}\nA:",
    }
    return [
        {
            **common,
            "task": "choice",
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc"}],
        },
        {
            **common,
            "task": "write",
            "output_type": "generate_until",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 8},
            "metric_list": [{"metric": "exact_match"}],
        },
        {
            **common,
            "task": "rolling",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{question}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
    ]


@pytest.mark.slow
def test_tasks_run_end_to_end(llada: Model, tasks: list[dict[str, Any]]) -> None:
    model = MmdlmLM(llada, batch_size=4, samples=4, num_inference_steps=4)
    found = lm_eval.simple_evaluate(model, tasks=tasks, bootstrap_iters=0)
    samples = found["samples"]
    for one in samples["choice"]:
        (first, _), (second, _) = one["filtered_resps"]
        assert one["acc"] == (first > second)
    for one in samples["write"]:
        prompt = one["arguments"][0][0]
        text = llada.complete(prompt, max_new_tokens=8, num_inference_steps=4)
        assert one["filtered_resps"] == [text.partition("\n")[0]]
    results = found["results"]["rolling"]["bits_per_byte,none"]
    values = [one["filtered_resps"][0] for one in samples["rolling"]]
    size = sum(len(one["doc"]["question"]) for one in samples["rolling"])
    assert results == pytest.approx(-sum(values) / size / math.log(2))
    assert found["config"]["mmdlm"]["loglikelihood"]["choice"]["choices"] == 3
    again = lm_eval.simple_evaluate(
        model, tasks=tasks[1:2], bootstrap_iters=0, apply_chat_template=True
    )
    asked = again["samples"]["write"][0]["arguments"][0][0]
    assert json.loads(asked[1:])[0]["content"].startswith("Q: What is 1 plus 2?")
    assert again["config"]["mmdlm"]["generation"]["write"]["chat"]


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--tasks", "x"], ["run", "--model", "mmdlm", "--tasks", "x"]),
        (["run", "--tasks", "x"], ["run", "--model", "mmdlm", "--tasks", "x"]),
        (["run", "-M", "hf", "--tasks", "x"], ["run", "-M", "hf", "--tasks", "x"]),
        (["run", "--config", "x.yaml"], ["run", "--config", "x.yaml"]),
        (["run", "--help"], ["run", "--help"]),
        (["run"], ["run"]),
        (["ls", "tasks"], ["ls", "tasks"]),
        (["--help"], ["--help"]),
        ([], []),
    ],
)
def test_the_command_names_the_model(words: list[str], expected: list[str]) -> None:
    assert with_model(words) == expected


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "eval.lm_eval", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_mistake_ends_the_command_with_one_sentence() -> None:
    said = command("run", "--model_args", "blok_length=3", "--tasks", "arc_easy")
    assert said.returncode == 2
    (line,) = [line for line in said.stderr.splitlines() if line.startswith("error:")]
    assert "did you mean block_length" in line
    assert "Traceback" not in said.stderr


SPEAK = """\
from mmdlm.harnesses import lm_eval
from tests.harnesses.conftest import tiny
from tests.harnesses.test_lm_eval import pairs, requests

model = lm_eval.MmdlmLM(tiny("llada"), samples=4)
mine = requests("loglikelihood", pairs(4))[model.rank :: model.world_size]
values = [value for value, _ in model.loglikelihood(mine)]
gathered = model.gather_object(values)
if model.rank == 0:
    info = model.get_model_info()["mmdlm"]["loglikelihood"]["t"]
    print("found", info["requests"], [round(v, 3) for some in zip(*gathered) for v in some])
"""


@pytest.mark.slow
def test_two_processes_score_what_one_does(llada: Model, tmp_path: Path) -> None:
    script = tmp_path / "speak.py"
    script.write_text(SPEAK)
    launched = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(script)),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert launched.returncode == 0, launched.stderr
    values = MmdlmLM(llada, samples=4).loglikelihood(requests("loglikelihood", pairs(4)))
    assert f"found 4 {[round(value, 3) for value, _ in values]}" in launched.stdout
