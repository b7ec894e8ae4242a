"""Checkpoints with damaged JSON and headers: one sentence each, or they load as they were."""

from __future__ import annotations

import json
import math
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file

from data_pipelines.text_tokenizer import train_text_tokenizer
from mmdlm import load
from mmdlm.core.vocabulary import Vocabulary
from mmdlm.models.checkpoints.checkpoint import INDEX
from mmdlm.models.configuration import read_config
from mmdlm.models.encoder_config import MmdlmEncoderConfig
from mmdlm.models.modeling import MmdlmForMaskedDiffusion
from mmdlm.pipeline.convert import convert
from mmdlm.pipeline.task_defaults import Defaults
from mmdlm.vision.encoders.open_clip_tower import _open_clip_model
from mmdlm.vision.tokenizers.magvit2 import Magvit2Tokenizer
from tests.models.test_families import CONFIGS
from tests.models.tiny import tiny_config

CASES = 60
FILES = (
    *(
        "config.json",
        "config.json",
        INDEX,
        INDEX,
        "generation_config.json",
        "tokenizer_config.json",
    ),
    *("image_tokenizer/config.json", "adapter/adapter_config.json"),
    *("model-00001-of-00003.safetensors", "image_tokenizer/model.safetensors"),
    "adapter/adapter_model.safetensors",
)
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 3, 1.5, -0.0, 10**30, 1e308, math.nan, math.inf),
    *("", "x", "64", "../../outside.safetensors", "/etc/passwd", "a/b", "\0", "\ud800", "é" * 999),
    *([], {}, [1, 2], [[]], {"a": 1}, [None] * 999, {"": {"": []}}),
)
WHOLES = (b"", b"[]", b"null", b"7", b'"x"', b"{}", b"[" * 10**5, b'{"a":' * 10**5, b"\xff\xfe{}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of ours in three shards, with all that a folder may hold, and an adapter."""
    folder = tmp_path_factory.mktemp("whole")
    words = train_text_tokenizer(["a red heart", "a dark skin tone"] * 4, size=280)
    eos = words.eos_token_id
    vocabulary = Vocabulary.build(text_size=len(words), eos_id=eos, image_codes=64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tiny_config(vocabulary=vocabulary.to_dict(), text_slots=8)
        model = MmdlmForMaskedDiffusion(config)
        images = Magvit2Tokenizer(
            ch=32, ch_mult=[1, 1], num_res_blocks=[1, 1], z_channels=6, resolution=16
        )
    model.save_pretrained(folder, max_shard_size="60KB")
    words.save_pretrained(folder)
    images.save_pretrained(folder / "image_tokenizer")
    (folder / "generation_config.json").write_text(Defaults().to_json())
    adapter = folder / "adapter"
    adapter.mkdir()
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    low = {f"{layer}.lora_A.weight": torch.ones(2, 32), f"{layer}.lora_B.weight": torch.ones(32, 2)}
    save_file(low, adapter / "adapter_model.safetensors")
    lora = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(lora))
    return folder


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where values stand in a JSON content."""
    inner = content.items() if isinstance(content, dict) else ()
    if isinstance(content, list):
        inner = enumerate(content[:3])
    return [path, *(found for key, one in inner for found in places(one, (*path, key)))]


def damaged_json(text: bytes, chance: random.Random) -> bytes:
    kind = chance.choice(("value", "value", "value", "value", "key", "cut", "byte", "whole"))
    if kind == "whole":
        return chance.choice(WHOLES)
    if kind == "cut":
        return text[: chance.randrange(len(text))]
    if kind == "byte":
        n = chance.randrange(len(text))
        return text[:n] + bytes([chance.randrange(256)]) + text[n + 1 :]
    content = json.loads(text)
    *path, last = chance.choice([one for one in places(content) if one])
    holder = content
    for key in path:
        holder = holder[key]
    if kind == "key":
        del holder[last]
    else:
        holder[last] = chance.choice(ODD)
    return json.dumps(content).encode()


def damaged_header(data: bytes, chance: random.Random) -> bytes:
    """Of a safetensors file: its length, its bytes, or what it says of a tensor."""
    size = struct.unpack("<Q", data[:8])[0]
    header, rest = data[8 : 8 + size], data[8 + size :]
    kind = chance.choice(("length", "json", "json", "json", "cut", "name"))
    if kind == "length":
        wrong = chance.choice((0, 1, size - 1, size + 9, 2**40, 2**64 - 1))
        return struct.pack("<Q", wrong) + data[8:]
    if kind == "cut":
        return data[: chance.randrange(len(data))]
    if kind == "name":
        content = json.loads(header)
        name = chance.choice([one for one in content if one != "__metadata__"])
        content[chance.choice(("", "../x", "lm_head", "\0", "é" * 99))] = content.pop(name)
        header = json.dumps(content).encode()
    else:
        header = damaged_json(header, chance)
    return struct.pack("<Q", len(header)) + header + rest


def damage(folder: Path, chance: random.Random) -> str:
    """Change one file of a folder -> which."""
    name = chance.choice(FILES)
    path = folder / name
    change = damaged_json if name.endswith("json") else damaged_header
    path.write_bytes(change(path.read_bytes(), chance))
    return name


@pytest.mark.parametrize("seed", range(CASES))
def test_damage_is_one_sentence(seed: int, whole: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    name = damage(folder, random.Random(seed))
    said: ValueError | None = None
    try:
        load(folder, device="cpu", adapter=folder / "adapter")
    except ValueError as error:
        said = error
    if said is not None:
        assert type(said) is ValueError, f"{name}: {said!r}"
        assert str(folder) in str(said), f"{name}: {said}"
        assert "\n" not in str(said), f"{name}: {said}"
        assert len(str(said)) < 1000, f"{name}: {said}"


@pytest.mark.parametrize("family", [*CONFIGS, "mmdlm"])
def test_odd_values_in_a_config_are_one_sentence(family: str) -> None:
    """Thirty places and values for each family, and for a config of ours that sees."""
    chance = random.Random(family)
    ours = read_config(CONFIGS["llada_v"])
    ours.published = None
    usual = CONFIGS.get(family) or json.loads(ours.to_json_string(use_diff=False))
    for _ in range(30):
        content = json.loads(json.dumps(usual))
        *path, last = chance.choice([one for one in places(content) if one])
        holder = content
        for key in path:
            holder = holder[key]
        holder[last] = odd = json.loads(json.dumps(chance.choice(ODD)))
        said = ""
        try:
            read_config(content, tokenizer_size=40)
        except (ValueError, StrictDataclassError) as error:  # the second is said by `load`
            said = str(error)
        assert "\n" not in said.removesuffix("\n") or "Validation" in said, (path, last, odd, said)


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    """A copy of the whole folder."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def refused(folder: Path, says: str) -> None:
    """One sentence that names the folder."""
    with pytest.raises(ValueError, match=says) as caught:
        load(folder, device="cpu", adapter=folder / "adapter")
    assert type(caught.value) is ValueError
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "../../outside.safetensors",
        "../model.safetensors",
        "/etc/outside.safetensors",
        "adapter/adapter_model.safetensors",
        "..\\outside.safetensors",
        "C:outside.safetensors",
        "config.json",
        "..",
        "",
        "\0.safetensors",
        "a\nb.safetensors",
        7,
        1.5,
        None,
        True,
        ["model-00001-of-00003.safetensors"],
        {"file": "x"},
    ],
)
def test_an_index_names_files_of_the_folder_itself(model: Path, name: object) -> None:
    outside = model.parent / "outside.safetensors"
    shutil.copy(model / "model-00001-of-00003.safetensors", outside)
    content = json.loads((model / INDEX).read_text())
    first = next(iter(content["weight_map"]))
    content["weight_map"][first] = name
    (model / INDEX).write_text(json.dumps(content))
    refused(model, "for a file of weights; the name of a safetensors file in .* is needed")


@pytest.mark.parametrize(
    "name",
    [
        "model-00001-of-00003.safetensors",
        "image_tokenizer/model.safetensors",
        "adapter/adapter_model.safetensors",
    ],
)
def test_a_link_that_leads_out_of_the_folder_is_refused(model: Path, name: str) -> None:
    pytest.importorskip("peft")
    outside = model.parent / "outside.safetensors"
    shutil.move(model / name, outside)
    (model / name).symlink_to(outside)
    refused(
        model, f"{name.split('/')[-1]} is a link to .*outside.safetensors, which lies outside of"
    )


def test_links_of_the_hubs_cache_are_followed(whole: Path, tmp_path: Path) -> None:
    """snapshots/REVISION/FILE is a link to blobs/HASH there."""
    snapshot = Path(shutil.copytree(whole, tmp_path / "models--a--b" / "snapshots" / "0123"))
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.rglob("*.safetensors"))):
        shutil.move(path, blobs / str(number))
        path.symlink_to(blobs / str(number))
    load(snapshot, device="cpu")


def test_a_converted_folder_takes_nothing_from_elsewhere(model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (model / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ValueError, match=r"notes.txt is a link to .*secret.txt"):
        list(convert(model, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_tensor_stands_in_one_shard(model: Path) -> None:
    shutil.copy(
        model / "model-00001-of-00003.safetensors", model / "model-00002-of-00003.safetensors"
    )
    refused(model, "model-00002-of-00003.safetensors: tensor .* is in model-00001-of-00003")


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("config.json", {"attn_implementation": "evil/kernel"}, "code is never fetched"),
        ("config.json", {"_attn_implementation": {"": "evil/kernel"}}, "code is never fetched"),
        ("config.json", {"use_kernels": True}, "use_kernels = True, and code is never fetched"),
        ("config.json", {"quantization_config": {"quant_method": "fp8"}}, "by 'fp8', which is not"),
        ("config.json", {"quantization_config": {}}, "by None, which is not read here"),
        ("config.json", {"quantization_config": [1]}, r"by \[1\], which is not read here"),
        ("config.json", {"auto_map": {"AutoModel": "evil.Model"}}, None),
        ("config.json", {"num_hidden_layers": 10**9}, "1000000000 layers, but 21 tensors"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Words", None]}}, None),
        ("tokenizer_config.json", {"tokenizer_class": "Evil"}, None),
        (
            "adapter/adapter_config.json",
            {"megatron_config": {"a": 1}},
            "megatron_config = {'a': 1}",
        ),
        ("adapter/adapter_config.json", {"megatron_core": "evil"}, None),
        ("adapter/adapter_config.json", {"layer_replication": [[0, 1]]}, "layer_replication = "),
        ("adapter/adapter_config.json", {"auto_mapping": {"parent_library": "evil"}}, None),
        (
            "image_tokenizer/config.json",
            {"_class_name": "evil.Tokenizer"},
            "unknown image tokenizer",
        ),
    ],
)
def test_a_checkpoint_never_chooses_code(
    model: Path, file: str, change: dict[str, Any], says: str | None
) -> None:
    """Where what it says is of no use here it is left aside; nothing called `evil` is imported."""
    pytest.importorskip("peft")
    (model / "evil.py").write_text("raise SystemExit('it ran')")
    path = model / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    if says is not None:
        refused(model, says)
        return
    load(model, device="cpu", adapter=model / "adapter")


def test_an_encoder_chooses_no_code_either(tmp_path: Path) -> None:
    shape = {"model_type": "bert", "vocab_size": 40, "attn_implementation": "evil/kernel"}
    vocabulary = Vocabulary.build(text_size=23, eos_id=0, image_codes=13).to_dict()
    with pytest.raises(ValueError, match="attn_implementation = 'evil/kernel', and code is never"):
        MmdlmEncoderConfig(vocabulary=vocabulary, encoder=shape)
    with pytest.raises(ValueError, match="timm_model_name 'hf-hub:evil/vit' is no name"):
        _open_clip_model({"embed_dim": 8, "vision_cfg": {"timm_model_name": "hf-hub:evil/vit"}})


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("image_tokenizer", {"num_res_blocks": [10**9, 1]}, "num_res_blocks is .*, but there are"),
        ("image_tokenizer", {"ch": 3 * 2**60}, "config.json"),
        ("image_tokenizer", {"z_channels": [None] * 9999}, "config.json"),
        ("adapter", {"r": "2"}, "r' = '2'; a whole number above 0 is needed"),
        ("adapter", {"lora_alpha": {}}, "'lora_alpha' = {}; a number above 0"),
        ("adapter", {"rank_pattern": {"(": 2}}, "rank_pattern with '\\('"),
        ("adapter", {"alpha_pattern": [1]}, r"alpha_pattern = \[1\]; an object"),
        ("adapter", {"target_modules": 7, "bias": 7}, "does not describe a LoRA"),
    ],
)
def test_the_parts_of_a_folder_are_looked_at_too(
    model: Path, file: str, change: dict[str, Any], says: str
) -> None:
    pytest.importorskip("peft")
    path = model / file / ("config.json" if file == "image_tokenizer" else "adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(model, says)
