"""What is tried: images, shards, rows, recipes and checkpoints, damaged or made to hurt.

Each input is a function of its kind and its number, and goes through a command as a user types it.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import shutil
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import yaml
from PIL import Image

import mmdlm
from data_pipelines import text_tokenizer, tokenize_images, write_shards
from mmdlm.cli import main as command
from mmdlm.cli.recipe import run
from mmdlm.pipeline.hub import BUNDLED
from tests.data_pipelines.test_damage import PIXEL, row
from tests.fuzz.damage import damaged
from tests.models.test_damaged import ODD, damaged_header, damaged_json
from train import image_tokenizer, preference, pretrain, rl, sft

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
EMOJI = BUNDLED / "emoji"
GOOD = {
    "messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}],
    "prompt": "1",
    "completion": "2",
    "chosen": "3",
    "rejected": "4",
    "text": "5",
    "img": PIXEL,
    "text_list": ["6"],
    "image_info": [],
    "file_name": "0.png",
    "id": 0,
    "image_id": 0,
    "caption": "6",
}
BOMB = 3 << 30  # bytes that a few megabytes are unpacked to
Work = Callable[[], int]
RECIPES: dict[str, Any] = {
    "pretrain/smoke": pretrain.main,
    "sft/smoke": sft.main,
    "image_tokenizer/smoke": image_tokenizer.main,
    "rl/smoke_text": rl.main,
    "rl/smoke_vrpo": preference.main,
}
JOBS: dict[str, Any] = {
    name: getattr(write_shards, name)
    for name in (
        *("folder", "coco", "text", "dataset"),
        *("conversations", "preferences", "interleaved"),
    )
}


def work_for(kind: str, chance: Random, folder: Path) -> Work:
    """Return what tries an input of a kind; its files lie in the folder."""
    return KINDS[kind](chance, folder)


def job(target: Any, *arguments: str | Path) -> Work:
    """A recipe or a data job, as a shell runs it."""

    def done() -> int:
        sys.argv = ["job", *map(str, arguments)]
        run(target)
        return 0

    return done


def cli(*arguments: str | Path) -> Work:
    """A command of `mmdlm`."""
    return lambda: command.main([str(one) for one in arguments])


@cache
def bundled() -> mmdlm.Model:
    """The bundled model, which is loaded once and asked by all processes."""
    return mmdlm.load("emoji", device="cpu")


# ---- images --------------------------------------------------------------------------------------


def images(chance: Random, folder: Path) -> Work:
    """An image file that is described, or packed and scaled."""
    name, data = chance.choice((_plain_image, _plain_image, _plain_image, _hard_image))(chance)
    path = folder / "in" / name
    path.parent.mkdir()
    path.write_bytes(data)
    if chance.random() < 0.5:
        return lambda: _captioned(path)
    size = ("--size", chance.choice(["16", "64", "256"])) if chance.random() < 0.8 else ()
    return job(JOBS, "folder", "--images", path.parent, "--out", folder / "out", *size)


def _captioned(path: Path) -> int:
    commands: Any = sys.modules["mmdlm.cli.commands"]
    commands._load = lambda options, task: bundled()
    return command.main(["caption", str(path), "--steps", "2"])


def _plain_image(chance: Random) -> tuple[str, bytes]:
    """A small image in any format, damaged."""
    kind = chance.choice(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
    mode = chance.choice({"JPEG": ["L", "RGB", "CMYK"], "BMP": ["1", "L", "P", "RGB"]}.get(
        kind, ["1", "L", "P", "RGB", "RGBA", "LA"]
    ))  # fmt: skip
    side = chance.randrange(1, 200), chance.randrange(1, 200)
    image = Image.fromarray(
        np.frombuffer(chance.randbytes(side[0] * side[1] * 3), np.uint8).reshape(*side, 3)
    )
    if kind in ("TIFF",) and chance.random() < 0.3:
        image = Image.fromarray(np.asarray(image)[..., 0].astype(chance.choice(["<i4", "<f4"])))
    elif kind == "WEBP" and mode not in ("RGB", "RGBA"):
        image = image.convert("RGB")
    else:
        image = image.convert(mode)
    file = io.BytesIO()
    image.save(file, kind)
    data = file.getvalue() if chance.random() < 0.1 else damaged(file.getvalue(), chance)
    return f"a.{chance.choice([kind.lower(), 'png', 'jpg'])}", data


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(width: int, height: int, *extra: bytes, bits: int = 8, kind: int = 0) -> bytes:
    """A black PNG whose pixels are made as they are packed."""
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    packer, line = zlib.compressobj(9), bytes(1 + width * max(1, bits * (1 + 2 * (kind == 2)) // 8))
    parts = [packer.compress(line) for _ in range(min(height, 20_000))]
    pixels = b"".join(parts) + packer.flush()
    start = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header)
    return start + b"".join(extra) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _hard_image(chance: Random) -> tuple[str, bytes]:
    """An image that claims or takes more than it should."""
    text = zlib.compress(bytes(200 << 20), 9)
    made: list[Callable[[], tuple[str, bytes]]] = [
        lambda: ("a.png", _png(13_000, 13_000)),
        lambda: ("a.png", _png(8_000, 8_000, kind=2)),
        lambda: ("a.png", _png(9_000, 9_000, bits=16)),
        lambda: ("a.png", _png(100_000, 10)),
        lambda: ("a.png", _png(2**31 - 1, 2**31 - 1)[:200]),
        lambda: ("a.png", _png(64, 64, _chunk(b"zTXt", b"a\0\0" + text))),
        lambda: ("a.png", _png(64, 64, _chunk(b"iCCP", b"a\0\0" + text))),
        lambda: ("a.png", _png(64, 64, *[_chunk(b"tEXt", b"a\0b")] * 50_000)),
        lambda: ("a.jpg", b"\xff\xd8\xff\xe0" + b"\xff\xc0\0\x11\x08\xff\xff\xff\xff\x03" * 9),
        lambda: ("a.gif", b"GIF89a\xff\xff\xff\xff\xf0\0\0" + b"\0" * 9),
        lambda: ("a.bmp", b"BM" + struct.pack("<IHHIIiiHH", 9, 0, 0, 54, 40, 2**30, 2**30, 1, 24)),
        lambda: ("a.webp", b"RIFF\xff\xff\xff\x7fWEBPVP8X\n\0\0\0\x10\0\0\0" + b"\xff" * 30),
        lambda: ("a.tif", b"II*\0\x08\0\0\0\xff\xff" + b"\0\1\4\0\1\0\0\0\xff\xff\xff\xff" * 99),
        lambda: ("a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\nshowpage\n"),
        lambda: ("a.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        lambda: ("a.png", b""),
        _long_gif,
    ]  # fmt: skip
    return chance.choice(made)()


def _long_gif() -> tuple[str, bytes]:
    frames = [Image.new("P", (400, 400), number % 9) for number in range(400)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return "a.gif", file.getvalue()


# ---- shards --------------------------------------------------------------------------------------


def shards(chance: Random, folder: Path) -> Work:
    """A shard that a job reads, or that a model is trained on."""
    base = chance.choice(["emoji_images", "emoji_codes", "conversations", "preferences"])
    whole = (DATA / f"{base}.tar").read_bytes()
    data = damaged(whole, chance) if chance.random() < 0.8 else _hard_shard(chance)
    zipped = chance.random() < 0.3 and len(data) < 1 << 22
    path = folder / ("a.tar.gz" if zipped or data[:2] == b"\x1f\x8b" else "a.tar")
    path.write_bytes(gzip.compress(data, 1) if zipped else data)
    lenient = ("--max_broken", chance.choice(["0", "0.5", "1"]))
    match chance.randrange(3):
        case 0:
            tokenizer = ("--tokenizer", EMOJI / "image_tokenizer")
            return job(
                tokenize_images.main,
                "--shards",
                path,
                *tokenizer,
                "--out",
                folder / "out",
                *lenient,
            )
        case 1:
            options = ("--shards", path, "--out", folder / "out", "--size", "300")
            return job(text_tokenizer.main, *options, *lenient)
    return _trained_on(path, base, folder)


def _trained_on(path: Path, base: str, folder: Path) -> Work:
    """One step of training on a shard."""
    name, key = {
        "emoji_images": ("image_tokenizer/smoke", "images"),
        "emoji_codes": ("pretrain/smoke", ""),
        "conversations": ("sft/smoke", "data"),
        "preferences": ("rl/smoke_vrpo", "data"),
    }[base]
    recipe = _small(name, folder)
    if key:
        recipe[key]["urls"] = str(path)
    else:
        for source in recipe["data"]["sources"]:
            source["urls"] = str(path)
    file = folder / "recipe.json"
    file.write_text(json.dumps(recipe))
    return job(RECIPES[name], "--config", file)


def _hard_shard(chance: Random) -> bytes:
    """A shard with odd members, or with more in it than memory holds."""
    file = io.BytesIO()
    kind = chance.randrange(6)
    if kind == 0:  # a text of 3 GB in a few megabytes
        with gzip.open(file, "wb", 1) as zipped:
            zipped.write(_member("a.txt", BOMB))
            for _ in range(BOMB >> 24):
                zipped.write(bytes(1 << 24))
        return file.getvalue()
    if kind == 1:  # a header that promises what does not follow
        return _member("a.png", 2**40) + bytes(512)
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number in range(9):
            info = tarfile.TarInfo(
                chance.choice(["a", "../a", "/etc/a", "a" * 200, "", "é"]) + ".txt"
            )
            info.size = 0
            if kind == 2:
                info.type = chance.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
                info.linkname = "/etc/passwd"
                tar.addfile(info)
                continue
            content = (b"x" * (20 << 20)) if kind == 3 and number < 3 else chance.randbytes(99)
            info.name = f"{number:03d}.{chance.choice(['txt', 'json', 'png', 'codes.npy', 'cls'])}"
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def _member(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


# ---- rows ----------------------------------------------------------------------------------------


def rows(chance: Random, folder: Path) -> Work:
    """Files of rows that are packed."""
    name = chance.choice(
        ["text", "conversations", "preferences", "coco", "folder", "dataset", "interleaved", "mds"]
    )
    if name == "mds":
        return _mds(chance, folder)
    content = chance.choice((_some_rows, _some_rows, _some_rows, _hard_rows))(chance)
    ending = chance.choice(["jsonl", "json", "csv"])
    if name not in ("coco", "folder") and chance.random() < 0.3:
        packing, compress = chance.choice([("gz", gzip.compress), ("xz", lzma.compress)])
        content, ending = compress(content), f"{ending}.{packing}"
        content = damaged(content, chance) if chance.random() < 0.5 else content
    path, out = folder / f"a.{ending}", folder / "out"
    path.write_bytes(content)
    lenient = ("--max_broken", chance.choice(["0.01", "1", "1"]), "--out", out)
    if name == "text":
        return job(JOBS, "text", "--source", path, *lenient)
    if name in ("coco", "folder"):
        (folder / "images").mkdir()
        Image.new("RGB", (8, 8)).save(folder / "images" / "0.png")
        if name == "coco":
            return job(JOBS, "coco", "--captions", path, "--images", folder / "images", *lenient)
        path.rename(folder / "images" / chance.choice(["metadata.jsonl", "metadata.csv"]))
        return job(JOBS, "folder", "--images", folder / "images", *lenient)
    return job(JOBS, name, "--source", path, *lenient)


def _mds(chance: Random, folder: Path) -> Work:
    """Shards of MosaicML's streaming, of which a file is damaged."""
    name = chance.choice(["plain", "zstd", "gz", "text"])
    shutil.copytree(DATA / "forms/mds" / name, folder / "mds")
    path = chance.choice(sorted((folder / "mds").iterdir()))
    path.write_bytes(damaged(path.read_bytes(), chance))
    given = ["--source", folder / "mds", "--out", folder / "out", "--max_broken", "1"]
    return job(JOBS, "text" if name == "text" else "dataset", *given)


def _some_rows(chance: Random) -> bytes:
    """Rows as JSON lines, as one JSON or as CSV; of half of them a few are damaged."""
    made = [row(chance) if chance.random() < 0.5 else GOOD for _ in range(30)]
    match chance.randrange(4):
        case 0:
            text = json.dumps(made)
        case 1:
            file = io.StringIO()
            table = csv.DictWriter(file, list(GOOD), extrasaction="ignore")
            table.writeheader()
            table.writerows(one for one in made if isinstance(one, dict))
            text = file.getvalue()
        case _:
            text = "\n".join(map(json.dumps, made))
    data = text.encode(chance.choice(["utf-8", "utf-8", "utf-16", "utf-8-sig"]), "replace")
    return damaged(data, chance) if chance.random() < 0.5 else data


def _hard_rows(chance: Random) -> bytes:
    """Deep, long, wide, binary."""
    deep, long = 10 ** chance.randrange(3, 6), 10 ** chance.randrange(5, 8)
    made: list[Callable[[], bytes]] = [
        lambda: b"[" * deep,
        lambda: b'{"messages":' * deep,
        lambda: b'{"text": "' + b"x" * long + b'"}\n',
        lambda: b'{"text": "' + b"x y " * (long // 4) + b'"}\n',
        lambda: json.dumps({f"k{n}": n for n in range(deep)}).encode(),
        lambda: b'{"text": ' + b"9" * long + b"}\n",
        lambda: b'{"text": "a"}\n' * (long // 20),
        lambda: b"file_name,text\n" + b'"' + b"x" * long,
        lambda: b"file_name,text\n" + b"0.png," * deep,
        lambda: b'{"messages": [{"role": "user", "content": "\\ud800"}]}\n',
        lambda: chance.randbytes(10_000),
        lambda: bytes(long),
        lambda: b"\xff\xfe" + b"\0" * 999,
        lambda: b"",
    ]
    return chance.choice(made)()


# ---- recipes -------------------------------------------------------------------------------------


def _small(name: str, folder: Path) -> dict[str, Any]:
    """A recipe of smoke runs, for one step."""
    recipe: dict[str, Any] = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    recipe |= {"out": str(folder / "out"), "threads": 1}
    training = recipe["training"] | {"max_steps": 1, "gradient_accumulation_steps": 1}
    return {**recipe, "training": {**training, "sample_steps": 0}}


def recipes(chance: Random, folder: Path) -> Work:
    """A recipe whose values, keys or text are damaged."""
    name = chance.choice(list(RECIPES))
    recipe = _small(name, folder)
    text = yaml.safe_dump(recipe).encode()
    match chance.randrange(6):
        case 0:
            text = damaged(text, chance)
        case 1:
            text = chance.choice(_hard_yaml(text))
        case _:
            for _ in range(chance.randrange(1, 4)):
                _odd_value(recipe, chance)
            recipe["out"] = str(folder / "out") if chance.random() < 0.9 else recipe.get("out")
            text = yaml.safe_dump(recipe).encode("utf-8", "surrogateescape")
    file = folder / "recipe.yaml"
    file.write_bytes(text)
    return job(RECIPES[name], "--config", file, "--out", folder / "out")


def _odd_value(recipe: Any, chance: Random) -> None:
    """Another value, another key, or none, somewhere."""
    places = list(_places(recipe))
    holder, key = chance.choice(places)
    match chance.randrange(5):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[chance.choice([str(key).upper(), f"{key}s", "", "x.y", "class_path"])] = 1
        case _:
            odd = [one for one in ODD if not isinstance(one, str) or one.isprintable()]
            holder[key] = chance.choice([*odd, 10**6, 10**9, -1, "nowhere.Class", "os.system"])


def _places(content: Any) -> Any:
    inner = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in list(inner):
        yield content, key
        if isinstance(value, dict | list) and value:
            yield from _places(value)


def _hard_yaml(text: bytes) -> list[bytes]:
    laughs = b"a0: &a0 [x, x]\n" + b"".join(
        b"a%d: &a%d [%s]\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 12)
    )
    return [
        laughs + text,
        laughs + b"out: *a11\n",
        b"out: !!python/object/apply:os.system [true]\n" + text,
        b"[" * 10_000,
        b"a: " * 3_000,
        b"&a [*a]",
        b"\t" + text,
        text + text,
        b"- " * 5_000,
        b"",
        b"7",
        b"out: 1" + b"0" * 10_000,
        b"x" * 1_000_000,
        bytes(1000),
    ]


# ---- checkpoints ---------------------------------------------------------------------------------


def checkpoints(chance: Random, folder: Path) -> Work:
    """A model folder of which some files are damaged, asked for a text or an image."""
    model = folder / "model"
    shutil.copytree(EMOJI, model)
    files = sorted(path for path in model.rglob("*") if path.suffix in (".json", ".safetensors"))
    for _ in range(chance.randrange(1, 3)):
        _damage_file(chance.choice(files), chance)
    if chance.random() < 0.5:  # what other libraries write has no digests
        for path in model.rglob("digests.json"):
            path.unlink(missing_ok=True) if path.is_file() else None
    asked = chance.choice(
        [
            ("infill", "woman [MASK] skin tone", "--steps", "2"),
            ("draw", "heart", "-o", folder / "out.png", "--steps", "2"),
            ("caption", DATA.parents[1] / "eval" / "demo_images" / "rocket.png", "--steps", "2"),
            ("convert",),
        ]
    )
    if asked == ("convert",):
        return cli("convert", model, folder / "converted")
    return cli(*asked, "--model", model)


def _damage_file(path: Path, chance: Random) -> None:
    if not path.is_file():
        return
    data = path.read_bytes()
    is_json = path.suffix == ".json"
    match chance.randrange(5):
        case 0:
            path.write_bytes(damaged(data, chance))
        case 1:
            path.unlink()
            if chance.random() < 0.5:
                path.mkdir()
        case 2 if not is_json:  # numbers that are none, or far too large
            start = 8 + struct.unpack("<Q", data[:8])[0]
            bad = chance.choice([b"\xff", b"\x7f", b"\x7b"]) * 4000
            path.write_bytes(data[:start] + bad + data[start + 4000 :])
        case _:
            change = damaged_json if is_json else damaged_header
            try:
                path.write_bytes(change(data, chance))
            except (ValueError, IndexError, KeyError, TypeError, struct.error):
                path.write_bytes(b"")  # it was damaged before


KINDS: dict[str, Callable[[Random, Path], Work]] = {
    "images": images,
    "shards": shards,
    "rows": rows,
    "recipes": recipes,
    "checkpoints": checkpoints,
}
