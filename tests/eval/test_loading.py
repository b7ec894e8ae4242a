"""The loading benchmark: what it writes is LLaDA's layout, what it measures is a fresh process."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from eval import loading
from eval.loading import STATUS, Shape, main, measure_in_fresh_process, write_checkpoint
from mmdlm.models.checkpoints.checkpoint import Checkpoint
from mmdlm.models.families.auto import family_of
from mmdlm.models.modeling import MmdlmForMaskedDiffusion

SMALL = Shape(width=64, layers=2, heads=4, inner=128, vocabulary=500)
needs_proc = pytest.mark.skipif(not STATUS.is_file(), reason=f"no {STATUS} here")


def write(folder: Path, **options: Any) -> dict[str, int]:
    return write_checkpoint(
        folder, SMALL, **{"stored": "bfloat16", "shard_gb": 1e-4, "seed": 0, **options}
    )


def test_the_published_size_is_eight_billion() -> None:
    shapes = Shape().tensors()
    assert len(shapes) == 9 * 32 + 3
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 8_015_581_184
    assert shapes["model.transformer.ff_out.weight"] == (126464, 4096)
    assert shapes["model.transformer.blocks.31.ff_out.weight"] == (4096, 12288)


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_what_is_written_is_a_checkpoint_in_shards(tmp_path: Path, stored: str) -> None:
    files = write(tmp_path / "model", stored=stored)
    checkpoint = Checkpoint.open(tmp_path / "model")
    assert family_of(checkpoint.config, checkpoint.shapes).name == "llada"
    assert [path.name for path in checkpoint.shards] == list(files)
    assert len(files) > 2
    for path in checkpoint.shards:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        assert path.stat().st_size < 1.1e5 or len(names) == 1
    assert checkpoint.dtype == getattr(torch, stored)
    model = MmdlmForMaskedDiffusion.from_pretrained(tmp_path / "model")
    assert 0.015 < model.lm_head.weight.float().std() < 0.025
    assert torch.equal(model.model.norm.weight.float(), torch.ones(64))


def test_the_same_seed_writes_the_same_weights(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write(tmp_path / name, seed=seed)
    a, b, c = (
        b"".join(path.read_bytes() for path in sorted((tmp_path / name).glob("*.safetensors")))
        for name in "abc"
    )
    assert a == b
    assert a != c


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("keep", [False, True])
def test_a_run_leaves_its_numbers(
    tmp_path: Path, keep: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    out, folder = tmp_path / "runs" / "loading.json", tmp_path / "model"
    main(out, folder=folder, shape=SMALL, dtype="float32", shard_gb=1e-4, bound=1e9, keep=keep)
    assert folder.exists() == keep
    report = json.loads(out.read_text())
    result = report["results"]
    assert result["weights_bytes"] == 4 * result["parameters"]
    assert result["within_bound"]
    assert result["peak_resident_bytes"] >= result["before_resident_bytes"] > 0
    assert 0 < result["peak_anonymous_bytes"] < result["peak_resident_bytes"]
    assert report["settings"]["shape"]["layers"] == 2
    assert "within 1000000000.0 x" in capsys.readouterr().out


@pytest.mark.slow
@needs_proc
def test_memory_beyond_the_weights_does_not_grow_with_them(tmp_path: Path) -> None:
    """In another dtype than that of the files, where a loader would hold both."""
    shape = Shape(width=512, layers=2, heads=4, inner=1024, vocabulary=60_000)
    write_checkpoint(tmp_path / "model", shape, stored="float32", shard_gb=5, seed=0)
    weights = sum(torch.Size(one).numel() for one in shape.tensors().values()) * 2
    measured = measure_in_fresh_process(tmp_path / "model", "bfloat16")
    growth = measured["peak_resident_bytes"] - measured["before_resident_bytes"]
    slack = 100e6  # threads, buffers, and code that is first run now
    assert weights > slack
    assert weights < growth < 1.25 * weights + slack, "both dtypes were held at once"


def test_options_that_make_no_sense_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"exists; name another"):
        main(tmp_path / "x.json", folder=tmp_path)
    with pytest.raises(ValueError, match=r"--shard_gb 0 and --bound 1.25 must be above zero"):
        main(tmp_path / "x.json", folder=tmp_path / "new", shard_gb=0)
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    with pytest.raises(ValueError, match=r"takes 16.03 GB, but 1.00 GB are free"):
        main(tmp_path / "x.json", folder=tmp_path / "new")
    assert not (tmp_path / "new").exists(), "nothing is left behind"


@pytest.mark.slow
@needs_proc
def test_a_process_that_is_killed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "model")
    monkeypatch.setattr(loading, "_measure", _die)
    with pytest.raises(ValueError, match=r"ended with status -9 .*memory ran out"):
        measure_in_fresh_process(tmp_path / "model", "float32")


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
