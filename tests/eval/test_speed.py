"""Plain code gives what fast code gives, and what is measured is written down."""

from __future__ import annotations

import json
import mmap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from eval.speed import reference_impl as plain
from eval.speed.benchmark import main
from eval.speed.measuring import Growth, measure, peak, reset_peak
from eval.speed.report import table
from eval.speed.works import PLAIN, Bench, Variant, Work
from mmdlm.core.kernels.linear import Linear
from mmdlm.models.costs import Machine
from tests.models.tiny import random_ids, tiny_model

CPU = torch.device("cpu")
MACHINE = Machine(1e11, 1e10, 1e11)
GSM8K = [
    {"question": "How many are two and three? " * n, "answer": "Five. " * (2 * n) + "#### 5"}
    for n in range(1, 20)
]


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in GSM8K))
    return path


@pytest.fixture
def bench() -> Bench:
    return Bench("tiny", CPU, torch.float32, 2, ids=300, many_ids=400, codes=64)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["text", "large_vocabulary", "image", "training", "packing"])
def test_exact_variants_give_what_plain_code_gives(bench: Bench, part, gsm8k: Path) -> None:
    works = list(bench.works(part, gsm8k))
    assert len(works) == (2 if part == "training" else 1)
    for work in works:
        results, _ = measure(bench, work)  # raises where an exact variant differs
        assert [one.variant for one in results] == list(work.variants)
        assert results[0].variant == PLAIN
        assert results[0].times_plain == 1
        for one in results:
            assert one.spread[0] <= one.times_plain <= one.spread[1]
            assert len(one.seconds) == 2
            assert (one.same_as_plain is True) == work.variants[one.variant].exact
            assert one.share_of_floor is None or one.share_of_floor > 0
        assert all(one.work in table(results, title=work.name) for one in results)


def test_a_variant_that_differs_is_found(bench: Bench) -> None:
    (work,) = bench.works("text", None)
    wrong = Variant(lambda: work.variants[PLAIN].run() + 1, exact=True)
    broken = replace(work, variants={**work.variants, "exact": wrong})
    with pytest.raises(ValueError, match="exact gives another result than plain"):
        measure(bench, broken)


@pytest.mark.slow
def test_speed_counts_what_each_variant_does(bench: Bench) -> None:
    work = Work(
        "work",
        {PLAIN: Variant(lambda: torch.zeros(1)), "more": Variant(lambda: torch.zeros(1))},
        unit="things",
        amount={PLAIN: 1.0, "more": 1e6},
    )
    (plain, more), _ = measure(bench, work)
    assert more.per_second == pytest.approx(1e6 / sorted(more.seconds)[0], rel=0.99)
    assert more.times_plain > 1000 * plain.times_plain


def test_floors_fall_with_what_is_left_out(bench: Bench) -> None:
    """By arithmetic: a dual cache computes less than a prefix cache, and that less than all."""
    (text,) = bench.works("text", None)
    floors = {
        name: MACHINE.seconds(one.floor)
        for name, one in text.variants.items()
        if one.floor is not None
    }
    assert floors["dual cache"] < floors["prefix cache"] < floors["exact"]
    (image,) = bench.works("image", None)
    cached, exact = (image.variants[name].floor for name in ("feature cache", "exact"))
    assert MACHINE.seconds(cached) < MACHINE.seconds(exact)
    assert MACHINE.seconds([(1e11, 0), (0, 2e10), (1e11, 2e10)]) == pytest.approx(1 + 2 + 2)


@pytest.mark.slow
def test_the_floor_is_that_of_the_machine_as_it_is_in_each_round(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is slower for a while makes everything slower."""
    measured = iter([Machine(2e9, 1e9, 3e9), Machine(1e9, 1e9, 1e9), Machine(4e9, 1e9, 5e9)])
    monkeypatch.setattr(Machine, "measure", lambda *_: next(measured))
    clock = iter([0, 1, 1, 2, 2, 3, 3, 5, 5, 6, 6, 6.5])  # ours takes 1 s, 2 s and 0.5 s
    monkeypatch.setattr(
        "eval.speed.measuring.time", SimpleNamespace(perf_counter=lambda: next(clock))
    )
    run = Variant(lambda: torch.zeros(1), [(1e9, 0)])
    work = Work("work", {PLAIN: replace(run, floor=None), "ours": run}, "things", 1)
    (_, ours), machine = measure(replace(bench, repeats=3), work)
    assert ours.share_of_floor == pytest.approx(0.5)
    assert machine == Machine(2e9, 1e9, 3e9)


def test_peaks_of_memory_are_those_since_the_last_reset() -> None:
    before = reset_peak(CPU)
    # Of the system itself: what the process has freed before could be given out again.
    with mmap.mmap(-1, 1 << 28) as large:
        large.write(bytes(1 << 28))
    assert peak(CPU) - before > 200e6
    now = reset_peak(CPU)
    assert peak(CPU) - now < 50e6


def test_exponents() -> None:
    grown = Growth("length", "exact", [10, 20, 40], [0.1, 0.4, 1.6])
    assert grown.exponent == pytest.approx(2)
    assert "exponent 2.00" in grown.line()


@pytest.mark.slow
def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "speed.json"
    main(out=out, parts=["text"], shape="tiny", repeats=1)
    report = json.loads(out.read_text())
    variants = [one["variant"] for one in report["results"]]
    assert variants == ["plain", "exact", "prefix cache", "dual cache"]
    (machine,) = report["machine"].values()
    assert machine["flops"] > 1e8
    assert report["shape"] == {"name": "tiny", "dtype": "float32", "repeats": 1}
    assert Image.open(out.with_suffix(".png")).size[0] > 500
    printed = capsys.readouterr().out
    assert "aim 1.8 x" in printed
    assert str(out) in printed


@pytest.mark.parametrize(
    "options, message",
    [
        ({"shape": "Q"}, "--shape 'Q' is not one of tiny, S"),
        ({"repeats": 0}, "--repeats 0 is too few"),
        ({"parts": ["packing"]}, "needs --gsm8k FILE"),
    ],
)
def test_bad_input(options, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        main(out=tmp_path / "speed.json", **options)


def test_plain_code_runs_in_torchs_own_layers() -> None:
    """On the same parameters, with the same loss."""
    model = tiny_model()
    twin = plain.in_torchs_layers(model)
    assert not any(type(layer) is Linear for layer in twin.modules())
    assert any(type(layer) is Linear for layer in model.modules())
    for name, parameter in model.named_parameters():
        assert twin.get_parameter(name) is parameter
    ids = random_ids(2, 7)
    torch.testing.assert_close(twin(ids).logits, model(ids).logits)
