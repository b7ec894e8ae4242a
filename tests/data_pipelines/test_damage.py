"""Damaged shards, rows and arrays, by chance: each ends in samples or in one sentence.

What may be raised is ValueError and OSError, which the command line says in one line.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines import text_tokenizer, tokenize_images, write_shards
from data_pipelines.shards.loader import build_loader
from data_pipelines.shards.shards import BrokenShard, Sample, expand_urls, read_shard, write_shard
from data_pipelines.sources.conversations import Conversation
from data_pipelines.sources.end_of_text import NoTail
from data_pipelines.sources.image_text import ImageText
from data_pipelines.sources.preferences import Preference
from data_pipelines.sources.source import BROKEN_CONTENT, Source, encode_array, read_array
from data_pipelines.write_shards import png_bytes
from mmdlm.templates.auto import LAYOUTS
from tests.templates.tiny import words_of

REFUSALS = (ValueError, OSError)
pytestmark = pytest.mark.timeout(120)  # nothing hangs

PIXEL = (  # a PNG file of one pixel
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNgYGAAAAAEAAH2FzhV"
    "AAAAAElFTkSuQmCC"
)
TALK = [{"role": "user", "content": "1 2"}, {"role": "assistant", "content": "3", "weight": 1}]


def sample(number: int) -> Sample:
    return {
        "__key__": f"{number:03d}",
        "png": png_bytes(Image.new("RGB", (8, 8), (number, 9, 9))),
        "txt": f"{number} 7".encode(),
        "json": json.dumps({"messages": TALK, "name": str(number)}).encode(),
        "codes.npy": encode_array(np.full(4, number, np.uint16)),
    }


def damaged(data: bytes, draw: Random) -> bytes:
    """Cut, flipped here and there, with a part doubled or lost, or nothing at all."""
    place = draw.randrange(len(data))
    length = draw.randrange(1, 2000)
    match draw.randrange(5):
        case 0:
            return data[:place]
        case 1:
            return data[:place] + data[place + length :]
        case 2:
            return data[:place] + data[place : place + length] + data[place:]
        case 3:
            return data[:place] + draw.randbytes(length) + data[place + length :]
    changed = bytearray(data)
    for _ in range(draw.randrange(1, 30)):
        changed[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(changed)


class FakeTokenizer(torch.nn.Module):
    codebook_size = 256
    image_size = 8

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return ((pixels[:, 0, 0, :4] + 1) * 127.5).round().long()


def test_shards(
    tmp_path: Path, tokenizer: Any, vocabulary: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read before a cut is as it was written; training and jobs refuse the rest."""
    monkeypatch.setattr(tokenize_images, "load_image_tokenizer", lambda folder: FakeTokenizer())
    (tmp_path / "config.json").write_text("{}")
    samples = [sample(number) for number in range(6)]
    write_shard(tmp_path / "whole.tar", samples)
    whole = (tmp_path / "whole.tar").read_bytes()
    draw = Random(0)
    for case in range(40):
        data = whole[: draw.randrange(len(whole))] if case < 10 else damaged(whole, draw)
        path = tmp_path / f"{case}/a.tar"
        path.parent.mkdir()
        path.write_bytes(gzip.compress(data, 1)[:-3] if case % 7 == 0 else data)
        url, read = str(path), []
        with suppress(BrokenShard):
            read.extend(read_shard(url))
        if case < 10:
            assert read == [{**one, "__url__": url} for one in samples[: len(read)]]
        source = Source(url, ImageText(text_slots=8))
        with suppress(*REFUSALS):
            loader = build_loader(
                [source],
                vocabulary,
                tokenizer=tokenizer,
                batch_size=2,
                length=20,
                repeat=False,
                max_broken=1.0,
            )
            assert all(batch.ids.shape[1] == 20 for batch in loader)
        out = path.parent / "out"
        with suppress(*REFUSALS):
            tokenize_images.main(url, tmp_path, out, max_broken=1.0)
        for written in expand_urls(out) if list(out.glob("*.tar")) else []:
            report = json.loads((out / "a_stats.json").read_text())["report"]
            assert (
                len(list(read_shard(written)))
                == report["written"]
                == report["read"] - sum(cases["count"] for cases in report["left_out"])
            )
        with suppress(*REFUSALS):
            text_tokenizer.main(url, path.parent / "words", size=257, max_broken=1.0)


def value(draw: Random, depth: int = 0) -> Any:
    """Any JSON, often of the kind that a conversation has."""
    role = draw.choice(["user", "assistant", "system", "gpt", "human", "tool", "", None, 3])
    leaves: list[Callable[[], Any]] = [
        lambda: draw.choice([None, True, 0, -1.5, 10**400, float("nan"), "", "<image>", "1", "\0"]),
        lambda: "x" * draw.randrange(50),
        lambda: "\ud83d",
        lambda: {"role": role, "content": value(draw, depth + 1)},
        lambda: {"from": role, "value": "1 <image>", "weight": draw.choice([0, 1, 2, "0", None])},
        lambda: {"type": draw.choice(["text", "image", "audio"]), "text": draw.choice(["1", 2])},
        lambda: {"path": "../x", "bytes": draw.choice([None, "1", 2])},
    ]
    if depth < 4 and draw.random() < 0.5:
        size = draw.randrange(4)
        if draw.random() < 0.6:
            return [value(draw, depth + 1) for _ in range(size)]
        names = ["messages", "images", "image", "prompt", "chosen", "text", "system", "id", "role"]
        return {draw.choice(names): value(draw, depth + 1) for _ in range(size)}
    return draw.choice(leaves)()


def row(draw: Random) -> Any:
    names = ["messages", "conversations", "prompt", "completion", "chosen", "rejected", "system"]
    names += ["image", "images", "text", "texts", "tools", "text_list", "image_info"]
    if draw.random() < 0.3:
        return {"messages": TALK, "prompt": "1", "chosen": "2", "rejected": "3", "text": "4"}
    return {name: value(draw) for name in draw.sample(names, draw.randrange(1, 6))}


@pytest.mark.parametrize("job", ["conversations", "preferences", "text", "dataset", "interleaved"])
def test_rows(job: str, tmp_path: Path) -> None:
    """Every row is written, or left out with a reason."""
    draw = Random(job)
    for case in range(14):
        rows = [{"messages": TALK, "chosen": "1", "rejected": "2", "prompt": "3", "text": "4"}]
        if job in ("dataset", "interleaved"):
            rows[0] |= {"image": PIXEL, "images": []}
        rows += [row(draw) for _ in range(30)]
        if case % 3 == 1 and job != "text":
            path, text = tmp_path / f"{case}.json", json.dumps(rows)
        else:
            path, text = tmp_path / f"{case}.jsonl", "\n".join(map(json.dumps, rows))
        data = text.encode("utf-16" if case % 5 == 4 else "utf-8")
        path.write_bytes(damaged(data, draw) if case % 2 else data)
        out, options = tmp_path / f"out{case}", {"max_broken": 1.0}
        try:
            getattr(write_shards, job)(str(path), out, **options)
        except REFUSALS:
            assert not (out / "index.json").exists()
            continue
        report = json.loads((out / "index.json").read_text())["report"]
        left_out = sum(cases["count"] for cases in report["left_out"])
        (url,) = expand_urls(out)
        assert report["read"] == report["written"] + left_out
        assert len(list(read_shard(url))) == report["written"]
        if not case % 2:
            assert report["read"] == 31


def test_captions(tmp_path: Path) -> None:
    """Metadata of folders and captions of COCO."""
    draw = Random(2)
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8)).save(images / f"{number}.png")
    for case in range(12):
        names = ["0.png", "1.png", "../x.png", "", ".", "0.png\0", "a" * 5000, 3, None]
        rows = [
            {"file_name": draw.choice(names), "id": value(draw), "text": value(draw), "image_id": n}
            for n in range(12)
        ]
        rows = [{"file_name": "0.png", "id": 0, "text": "1", "caption": "1", "image_id": 0}, *rows]
        lines = "\n".join(map(json.dumps, rows)).encode()
        (images / "metadata.jsonl").write_bytes(damaged(lines, draw) if case % 2 else lines)
        with suppress(*REFUSALS):
            write_shards.folder(images, tmp_path / f"folder{case}", max_broken=1.0)
        coco = json.dumps({"images": rows, "annotations": [*rows, value(draw)][: 13 + case % 2]})
        path = tmp_path / f"{case}.json"
        path.write_bytes(damaged(coco.encode(), draw) if case % 3 == 2 else coco.encode())
        with suppress(*REFUSALS):
            write_shards.coco(path, images, tmp_path / f"coco{case}", max_broken=1.0)


def test_arrays() -> None:
    """An array is what it was, or is refused; no array is larger than its field."""
    draw = Random(3)
    whole = encode_array(np.arange(64, dtype=np.uint16).reshape(8, 8))
    headers = ["{'descr': '<u2', 'fortran_order': False, 'shape': %s, }", "%s", "{%s: 1}"]
    shapes = ["(8, 8)", "(-8, -8)", "(2**70,)", "(8.0, 8)", "8", "(9" * 3000, "[" * 9000, "'", ""]
    texts = [header.replace("%s", shape) for header in headers for shape in shapes]
    texts += [headers[0].replace("<u2", kind) % "(8, 8)" for kind in ("O", "V0", "S0", "?x", "2O")]
    made = [
        b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text.encode() + whole[-128:]
        for text in texts
    ]
    for data in [*(damaged(whole, draw) for _ in range(60)), *made]:
        with suppress(ValueError):
            assert read_array(data).nbytes <= len(data)


@pytest.mark.parametrize("kind", [Conversation, Preference])
@pytest.mark.parametrize("family", ["llada", "mmada"])
def test_conversations_in_shards_of_others(kind: type[Conversation], family: str) -> None:
    """Whatever their JSON is, training reads it or counts it as broken."""
    draw, words = Random(f"{kind} {family}"), words_of(family)
    taught = kind(tail=NoTail()).templated(LAYOUTS[family], words, length=99)
    read = 0
    for _ in range(300):
        content = json.dumps(row(draw)).encode()
        given: Sample = {"json": content if draw.random() < 0.8 else damaged(content, draw)}
        if draw.random() < 0.2:
            given["codes.npy"] = damaged(encode_array(np.zeros(4, np.uint16)), draw)
        with suppress(*BROKEN_CONTENT):
            taught.sequence(
                given,
                [],
                words.vocabulary,
                tokenizer=words.tokenizer,
                generator=torch.Generator().manual_seed(0),
            )
            read += 1
    assert read > 20
