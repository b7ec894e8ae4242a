"""The PSNR of an image tokenizer over shards, against a plain computation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.shards.shards import write_shard
from data_pipelines.sources.source import png_bytes
from eval.reconstruction import main
from mmdlm.vision.pixels import to_pixels
from mmdlm.vision.tokenizers.patch_tokenizer import PatchTokenizer


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Five images in two groups, and one that is broken."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    samples = [
        {
            "__key__": f"{n}",
            "png": png_bytes(Image.fromarray(one)),
            "json": json.dumps({"style": "ab"[n % 2]}).encode(),
        }
        for n, one in enumerate(pixels)
    ]
    samples.append({"__key__": "broken", "png": b"no image", "json": b"{}"})
    write_shard(tmp_path / "000000.tar", samples)
    torch.manual_seed(0)
    PatchTokenizer(image_size=16, width=12, heads=2, levels=[3, 3]).save_pretrained(tmp_path / "t")
    return tmp_path / "000000.tar"


def test_it_measures_each_group(shards: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out.json"
    options = {"out": out, "by": "json.style", "batch_size": 2, "max_broken": 0.2}
    main(tmp_path / "t", str(shards), **options)
    report = json.loads(out.read_text())
    tokenizer = PatchTokenizer.from_pretrained(tmp_path / "t")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    real = torch.stack([to_pixels(Image.fromarray(one)) for one in pixels])
    with torch.no_grad():
        again = tokenizer.reconstruct(real)[0].clamp(-1, 1)
    squared = ((again - real) / 2).double().square().mean((1, 2, 3))
    quality = -10 * squared.log10()
    expected = {"all": quality, "a": quality[::2], "b": quality[1::2]}
    assert report["results"].keys() == expected.keys()
    for key, values in expected.items():
        assert report["results"][key]["value"] == pytest.approx(float(values.mean()), abs=1e-5)
        assert report["results"][key]["count"] == len(values)
    assert report["left_out"] == 1
    assert Image.open(out.with_suffix(".png")).width > 1000
    assert "of 5" in capsys.readouterr().out


def test_limit_and_bad_input(shards: Path, tmp_path: Path) -> None:
    main(tmp_path / "t", str(shards), out=tmp_path / "out.json", limit=1)
    assert json.loads((tmp_path / "out.json").read_text())["results"]["all"]["count"] == 1
    with pytest.raises(ValueError, match="--limit 0 is too small"):
        main(tmp_path / "t", str(shards), limit=0)
    with pytest.raises(ValueError, match="no image"):
        main(tmp_path / "t", str(shards), by="json.size", out=tmp_path / "o.json", max_broken=1)
