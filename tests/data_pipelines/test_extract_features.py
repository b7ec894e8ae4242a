"""The job that lets a tower look ahead of time: what it writes, that it goes on, how it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from data_pipelines import extract_features
from data_pipelines.shards.shards import Sample, expand_urls, read_shard, write_shard
from data_pipelines.sources.source import read_array
from data_pipelines.sources.vision_samples import Eye, fingerprint
from mmdlm.cli import recipe as command_line
from mmdlm.models.modeling import MmdlmForMaskedDiffusion
from mmdlm.vision.encoders.adapter import VisionAdapter, VisionConfig
from mmdlm.vision.encoders.transformers_towers import SiglipTower
from tests.data_pipelines.tiny_vision import TILES, TOWER, plain
from tests.models.tiny import tiny_config

VISION = VisionConfig(tower=TOWER, tiling=TILES)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MmdlmForMaskedDiffusion(tiny_config(vision=VISION.to_dict())).save_pretrained(
            tmp_path / "model"
        )
    return tmp_path / "model"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of four samples: one wide image, or two images and a conversation."""

    def sample(number: int) -> Sample:
        images = {"0.png": plain(number), "1.png": plain(100 + number, (20, 11))}
        if number % 2:
            images = {"jpg": plain(number, (20, 11))}
        return {"__key__": f"{number:03d}", "txt": str(number).encode(), **images}

    for shard in range(3):
        path = tmp_path / "images" / f"{shard}.tar"
        write_shard(path, map(sample, range(4 * shard, 4 * shard + 4)))
    return tmp_path / "images"


def run(shards: Path, out: Path, model: Path | None, **options: Any) -> None:
    extract_features.main(str(shards), out, model=model, **{"batch_size": 3, **options})


def samples(folder: Path) -> dict[str, Sample]:
    return {s["__key__"]: s for url in expand_urls(folder) for s in read_shard(url)}


def test_features_are_as_if_the_tower_looked_in_training(
    shards: Path, model: Path, tmp_path: Path
) -> None:
    run(shards, tmp_path / "out", model, dtype="float32")
    vision = MmdlmForMaskedDiffusion.from_pretrained(model).vision
    assert vision is not None
    before, after = samples(shards), samples(tmp_path / "out")
    assert before.keys() == after.keys()
    for key, stored in after.items():
        names = {"features.npy"} if "jpg" in before[key] else {"0.features.npy", "1.features.npy"}
        assert stored.keys() - {"__key__", "__url__"} == {"txt", "features.json", *names}
        pixels = Eye(TILES).views(before[key])
        seen = Eye(TILES, fingerprint(vision)).views(stored)
        assert [v.layout for v in seen] == [v.layout for v in pixels]
        with torch.no_grad():
            torch.testing.assert_close(vision(seen), vision(pixels), atol=1e-6, rtol=0)


def test_half_precision_and_images_that_stay(shards: Path, model: Path, tmp_path: Path) -> None:
    run(shards, tmp_path / "out", model, keep_images=True, compute_dtype="bfloat16")
    stored = samples(tmp_path / "out")["001"]
    assert "jpg" in stored
    array = read_array(stored["features.npy"])
    assert array.dtype == np.float16
    assert array.shape == (5, 4, 8)  # the whole image and four tiles, 2 x 2 patches each


def test_processes_share_the_shards(
    shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        run(shards, tmp_path / "out", model)
        assert len(list(tmp_path.glob("out/*.tar"))) == (2, 3)[rank]
    assert len(samples(tmp_path / "out")) == 12


def test_it_goes_on_after_a_kill(
    shards: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(shards, tmp_path / "whole", model)
    out, real, calls = tmp_path / "out", SiglipTower.forward, []

    def dies(self: SiglipTower, crops: list[torch.Tensor]) -> list[torch.Tensor]:
        calls.append(len(crops))
        if sum(calls) > 20:  # in the middle of the second shard
            raise SystemExit(137)
        return real(self, crops)

    monkeypatch.setattr(SiglipTower, "forward", dies)
    with pytest.raises(SystemExit):
        run(shards, out, model)
    assert max(calls) == 3
    monkeypatch.setattr(SiglipTower, "forward", real)
    done = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert [path.name for path in done] == ["0.tar"]
    (out / "1.tar.part").write_bytes(b"half")  # what kill -9 leaves
    run(shards, out, model)
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())
    assert not list(out.glob("*.part"))
    for path in out.glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
    run(shards, out, model)
    assert "already written" in capsys.readouterr().out


def test_broken_images_are_counted_and_skipped(
    shards: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = list(read_shard(str(shards / "1.tar")))
    good[1]["jpg"] = good[1]["jpg"][:30]
    good[3]["jpg"] = plain(1, (1, 1))
    write_shard(shards / "1.tar", good)
    run(shards, tmp_path / "out", model, max_broken=0.02)
    assert len(samples(tmp_path / "out")) == 10
    said = capsys.readouterr().out
    assert "10 samples in 3 shards" in said
    assert "12 read, 10 written, 0 changed, 2 left out" in said
    assert "sample 005)" in said
    assert "an image of 1x1 pixels is too small" in said
    assert "sample 007)" in said
    with pytest.raises(ValueError, match="sample 005"):
        run(shards, tmp_path / "strict", model, max_broken=0.0)


def test_conversations_without_images_stay_as_they_are(model: Path, tmp_path: Path) -> None:
    said = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    text = {"__key__": "0", "json": json.dumps({"messages": said}).encode()}
    seen = {"__key__": "1", "jpg": plain(1), "txt": b"red"}
    lost = {"__key__": "2", "txt": b"blue"}
    write_shard(tmp_path / "in/0.tar", [text, seen, lost])
    run(tmp_path / "in", tmp_path / "out", model)
    stored = samples(tmp_path / "out")
    assert stored.keys() == {"0", "1"}
    assert {name: stored["0"][name] for name in text} == text
    assert "features.json" not in stored["0"]
    assert "features.json" in stored["1"]
    report = json.loads((tmp_path / "out/features.json").read_text())["report"]
    assert [cases["first"] for cases in report["left_out"]] == [[f"{tmp_path}/in/0.tar, sample 2"]]


def test_a_tower_alone(shards: Path, model: Path, tmp_path: Path) -> None:
    """The same features as of the model that has this tower."""
    vision = MmdlmForMaskedDiffusion.from_pretrained(model).vision
    assert vision is not None
    (tmp_path / "tower").mkdir()
    save_file(vision.tower.state_dict(), tmp_path / "tower" / "model.safetensors")
    run(shards, tmp_path / "a", model)
    run(shards, tmp_path / "b", None, vision=VISION, tower_weights=tmp_path / "tower")
    for path in (tmp_path / "a").glob("*"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_features_of_two_towers_are_not_mixed(shards: Path, model: Path, tmp_path: Path) -> None:
    run(shards, tmp_path / "out", model)
    vision: VisionAdapter = extract_features.adapter_of(model)
    with torch.no_grad():
        next(vision.tower.parameters()).add_(1.0)
    (tmp_path / "tower").mkdir()
    save_file(vision.tower.state_dict(), tmp_path / "tower" / "model.safetensors")
    with pytest.raises(ValueError, match="made with another fingerprint"):
        run(shards, tmp_path / "out", None, vision=VISION, tower_weights=tmp_path / "tower")


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "name a model, or vision and tower_weights"),
        (["--model", "nowhere"], "nowhere"),
        (["--model", "MODEL", "--tower_weights", "x"], "name a model, or vision"),
        (["--model", "MODEL", "--batch_size", "0"], "batch_size is 0"),
        (["--model", "MODEL", "--dtype", "bfloat16"], "bfloat16"),
        (["--model", "MODEL", "--shards", "none"], "none"),
        (["--model", "BLIND"], "has no vision adapter"),
        (["--model", "TORN"], "2 of 42 tensors are missing: newline, projector.2.weight"),
    ],
)
def test_options_that_are_wrong(
    options: list[str],
    message: str,
    shards: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "BLIND" in options:
        MmdlmForMaskedDiffusion(tiny_config()).save_pretrained(tmp_path / "BLIND")
    if "TORN" in options:
        (tmp_path / "TORN").mkdir()
        (tmp_path / "TORN" / "config.json").write_text((model / "config.json").read_text())
        weights = MmdlmForMaskedDiffusion.from_pretrained(model).state_dict()
        lost = {"vision.newline", "vision.projector.2.weight"}
        kept = {name: value for name, value in weights.items() if name not in lost}
        save_file(kept, tmp_path / "TORN" / "model.safetensors", metadata={"format": "pt"})
    names = {"MODEL": model, "BLIND": tmp_path / "BLIND", "TORN": tmp_path / "TORN"}
    given = ["--shards", shards, "--out", tmp_path / "out", *(names.get(o, o) for o in options)]
    monkeypatch.setattr(sys, "argv", ["job", *map(str, given)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as status:
        command_line.run(extract_features.main)
    said = capsys.readouterr().err
    assert status.value.code == 2
    assert message in said
    assert said.count("\n") == 1, said
    assert not (tmp_path / "out").exists()


def test_the_adapter_can_be_named_on_the_command_line(
    shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = extract_features.adapter_of(model).tower
    (tmp_path / "tower").mkdir()
    save_file(tower.state_dict(), tmp_path / "tower" / "model.safetensors")
    content = {
        "shards": str(shards),
        "vision": {
            "tower": TOWER,
            "tiling": {
                "class_path": "mmdlm.vision.encoders.anyres.Anyres",
                "init_args": {"size": 8, "grid": 2, "shapes": [[2, 1], [1, 2], [2, 2]]},
            },
        },
        "tower_weights": str(tmp_path / "tower"),
    }
    (tmp_path / "job.yaml").write_text(json.dumps(content))
    argv = ["job", "--config", str(tmp_path / "job.yaml"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", argv)
    command_line.run(extract_features.main)
    run(shards, tmp_path / "same", model)
    for path in (tmp_path / "same").glob("*"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
