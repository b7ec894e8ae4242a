"""Files of a model folder that are damaged, swapped or gone: named, or the model is what it was."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdlm import load
from mmdlm.pipeline.model import Model
from mmdlm.vision.digests import FILE as DIGESTS
from mmdlm.vision.digests import write_digests
from tests.models.test_damaged import places, whole  # noqa: F401

SEEDS = 40
WEIGHTS = (
    "model-00001-of-00003.safetensors",
    "model-00003-of-00003.safetensors",
    "image_tokenizer/model.safetensors",
    "adapter/adapter_model.safetensors",
)
JSONS = (
    "config.json",
    "model.safetensors.index.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "image_tokenizer/config.json",
    "adapter/adapter_config.json",
    DIGESTS,
    f"image_tokenizer/{DIGESTS}",
    f"adapter/{DIGESTS}",
)
Damage = Callable[[Path, random.Random], None]


@pytest.fixture(scope="module")
def folder(whole: Path) -> Path:  # noqa: F811
    """The small model of ours, whose adapter has digests as well."""
    pytest.importorskip("peft")
    write_digests(whole / "adapter")
    return whole


@pytest.fixture(scope="module")
def usual(folder: Path) -> Model:
    return load(folder, device="cpu", adapter=folder / "adapter")


def bit_of_the_body(path: Path, chance: random.Random) -> None:
    """One bit of one number."""
    data = bytearray(path.read_bytes())
    start = 8 + struct.unpack("<Q", data[:8])[0]
    data[chance.randrange(start, len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def bit_of_the_header(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(8 + struct.unpack("<Q", data[:8])[0])] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def cut(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def emptied(path: Path, chance: random.Random) -> None:
    path.write_bytes(b"")


def missing(path: Path, chance: random.Random) -> None:
    path.unlink()


def a_folder(path: Path, chance: random.Random) -> None:
    path.unlink()
    path.mkdir()


def swapped(path: Path, chance: random.Random) -> None:
    """With another file of weights of the same folder tree."""
    root = (
        path.parent if path.parent.name not in ("image_tokenizer", "adapter") else path.parents[1]
    )
    other = root / chance.choice([name for name in WEIGHTS if root / name != path])
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


def whole_numbers(path: Path, chance: random.Random) -> None:
    """Where weights are fractions; by somebody who left no digests."""
    kind = chance.choice([torch.int32, torch.uint8, torch.bool])
    tensors = {name: tensor.to(kind) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    (path.parent / DIGESTS).unlink()


def another_type(path: Path, chance: random.Random) -> None:
    """A value of a JSON file is of another type."""
    content = json.loads(path.read_text())
    *outer, last = chance.choice([one for one in places(content) if one])
    holder = content
    for key in outer:
        holder = holder[key]
    kinds: list[Any] = [[], {}, "x", 7, [[1]], {"a": 1}]
    holder[last] = chance.choice([one for one in kinds if type(one) is not type(holder[last])])
    path.write_text(json.dumps(content))


OF_WEIGHTS: tuple[Damage, ...] = (
    *(bit_of_the_body, bit_of_the_body, bit_of_the_header, cut, emptied, missing, a_folder),
    *(swapped, whole_numbers),
)
OF_JSON: tuple[Damage, ...] = (cut, emptied, missing, a_folder, another_type, another_type)


def alike(one: Model, other: Model) -> bool:
    """Whether two models are the same in all that they are asked with."""
    ours, theirs = one.denoiser.state_dict(), other.denoiser.state_dict()
    images = [model.image_tokenizer for model in (one, other)]
    pixels = [image.state_dict() if image is not None else {} for image in images]
    return (
        ours.keys() == theirs.keys()
        and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
        and all(torch.equal(tensor, pixels[1][name]) for name, tensor in pixels[0].items())
        and one.defaults == other.defaults
        and one.text_tokenizer.get_vocab() == other.text_tokenizer.get_vocab()
        and one.text_tokenizer.eos_token_id == other.text_tokenizer.eos_token_id
        and one.text_slots == other.text_slots
    )


@pytest.mark.parametrize("seed", range(SEEDS))
def test_it_is_named_or_the_model_is_what_it_was(
    seed: int, folder: Path, usual: Model, tmp_path: Path
) -> None:
    copy, chance = tmp_path / "model", random.Random(seed)
    shutil.copytree(folder, copy)
    name, damages = (WEIGHTS, OF_WEIGHTS) if seed % 2 else (JSONS, OF_JSON)
    file, damage = chance.choice(name), chance.choice(damages)
    damage(copy / file, chance)
    what = f"{damage.__name__} of {file}"
    found, said = None, None
    try:
        found = load(copy, device="cpu", adapter=copy / "adapter")
    except ValueError as error:
        said = error
    if found is not None:
        assert damage not in (bit_of_the_body, whole_numbers, swapped), what
        assert alike(found, usual), what
        return
    assert type(said) is ValueError, f"{what}: {said!r}"
    assert str(copy) in str(said), f"{what}: {said}"
    assert "\n" not in str(said), f"{what}: {said}"
    assert len(str(said)) < 1000, f"{what}: {said}"


def test_each_damage_is_tried() -> None:
    """The seeds reach every kind, and every folder."""
    tried = set()
    for seed in range(SEEDS):
        chance = random.Random(seed)
        name, damages = (WEIGHTS, OF_WEIGHTS) if seed % 2 else (JSONS, OF_JSON)
        file = chance.choice(name)
        tried |= {chance.choice(damages), file.split("/")[0] if "/" in file else ""}
    assert tried == {*OF_WEIGHTS, *OF_JSON, "", "image_tokenizer", "adapter"}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_fractions(name: str, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    whole_numbers(copy / name, random.Random(0))
    with pytest.raises(ValueError, match="fractions") as error:
        load(copy, device="cpu", adapter=copy / "adapter")
    assert str((copy / name).parent) in str(error.value)


@pytest.mark.parametrize("place", ["", "image_tokenizer", "adapter"])
def test_digests_are_of_the_bytes_that_were_written(
    place: str, folder: Path, tmp_path: Path
) -> None:
    """What somebody changes on purpose is named with the way out."""
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    file = next(iter(sorted((copy / place).glob("*.safetensors"))))
    bit_of_the_body(file, random.Random(0))
    with pytest.raises(
        ValueError, match=r"is not as it was written \(its content is another\)"
    ) as e:
        load(copy, device="cpu", adapter=copy / "adapter")
    assert f"remove {file.with_name(DIGESTS)} if you changed it yourself" in str(e.value)
    assert str(file) in str(e.value)
    file.with_name(DIGESTS).unlink()
    load(copy, device="cpu", adapter=copy / "adapter")


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"7", b'{"model.safetensors": 7}', b'{"x.safetensors": {"bytes": 1}}', b"\xff"],
)
def test_damaged_digests(content: bytes, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    (copy / DIGESTS).write_bytes(content)
    with pytest.raises(ValueError, match=DIGESTS):
        load(copy, device="cpu")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "config.json"])
def test_digests_name_files_of_their_folder(name: str, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    (copy / DIGESTS).write_text(json.dumps({name: {"bytes": 1, "sha256": ""}}))
    with pytest.raises(ValueError, match="which is no file of weights beside it"):
        load(copy, device="cpu")
