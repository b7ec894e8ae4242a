"""Published families: told from their configs and tensors, read strictly, written back exactly."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModel, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mmdlm.core.sequence import Sequence, collate, image_segment, pack, text_segment
from mmdlm.core.vocabulary import Vocabulary
from mmdlm.models.configuration import MmdlmConfig, read_config
from mmdlm.models.families.auto import FAMILIES, family_named, family_of
from mmdlm.models.layers import RotaryEmbedding
from mmdlm.models.modeling import MmdlmForMaskedDiffusion
from mmdlm.pipeline.convert import convert

OLMO = {
    "model_type": "llada",
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "mlp_hidden_size": 48,
    "max_sequence_length": 64,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "weight_tying": False,
    "vocab_size": 60,
    "embedding_size": 64,
    "mask_token_id": 61,
    "eos_token_id": 60,
    "pad_token_id": 60,
}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "vocab_size": 64,
    "hidden_act": "silu",
}
SEEING = {
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 42,
        "patch_size": 14,
    },
    "mm_hidden_size": 16,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_patch_merge_type": "spatial_unpad",
    "image_aspect_ratio": "anyres_max_4",
    "image_grid_pinpoints": "(1x1),...,(3x3)",
}
QWEN = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "in_chans": 3,
    "patch_size": 7,
    "window_size": 28,
    "out_hidden_size": 12,
    "fullatt_block_indexes": [1],
}
PINPOINTS = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[42, 84], [84, 42], [84, 84]]}
# One config a family, as it is published but for the sizes; heads share keys and values in all.
CONFIGS: dict[str, dict[str, Any]] = {
    "llada": OLMO | {"architectures": ["LLaDAModelLM"]},
    "mmada": OLMO
    | {"model_type": "mmada", "codebook_size": 16, "llm_vocab_size": 48}
    | {"mask_token_id": 40, "eos_token_id": 39, "pad_token_id": 39},
    "lumina": OLMO
    | {"architectures": ["LLaDAForMultiModalGeneration"], "codebook_size": 16}
    | {"mask_token_id": 40, "eos_token_id": 39, "pad_token_id": 39},
    "dream": LLAMA | {"model_type": "Dream", "mask_token_id": 62, "pad_token_id": 61},
    "sdar": LLAMA
    | {"model_type": "sdar", "head_dim": 8, "block_size": 4}
    | {"mask_token_id": 62, "eos_token_id": 61, "pad_token_id": 61},
    "fast_dllm": LLAMA
    | {"model_type": "Fast_dLLM_Qwen", "bd_size": 4}
    | {"mask_token_id": 62, "eos_token_id": 61, "pad_token_id": 61},
    "llada_v": LLAMA | SEEING | {"model_type": "llava_llada"},
    "lavida_llada": OLMO | SEEING | PINPOINTS | {"model_type": "llava_llada"},
    "lavida_dream": LLAMA | SEEING | PINPOINTS | {"model_type": "llava_dream", "mask_token_id": 62},
    "dimple": LLAMA
    | {"model_type": "dimple", "mrope_section": [1, 2, 1], "mask_token_id": 62}
    | {"vision_config": QWEN},
}
SEES = ("llada_v", "lavida_llada", "lavida_dream", "dimple")


@pytest.fixture(params=CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def write(folder: Path, config: dict[str, Any], *, dtype: torch.dtype = torch.float32) -> Path:
    """A random checkpoint with the names and the config of its family."""
    torch.manual_seed(0)
    model = MmdlmForMaskedDiffusion(read_config(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    back = family_of(config).weights.reversed
    tensors = {back(name): tensor.to(dtype) for name, tensor in model.state_dict().items()}
    assert None not in tensors
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_every_family_is_tested() -> None:
    assert set(CONFIGS) == {family.name for family in FAMILIES}


def test_the_config_tells_the_family(family: str) -> None:
    assert family_of(CONFIGS[family]).name == family


def test_auto_classes_read_it(family: str, tmp_path: Path) -> None:
    folder = write(tmp_path, CONFIGS[family])
    model = AutoModel.from_pretrained(folder)
    assert type(model) is MmdlmForMaskedDiffusion
    assert type(AutoConfig.from_pretrained(folder)) is MmdlmConfig
    assert model.config.published == {"family": family, "config": CONFIGS[family]}
    stored = load_file(folder / "model.safetensors")
    mine = family_named(family).weights.rename(stored)
    state = model.state_dict()
    assert all(torch.equal(state[ours], stored[theirs]) for theirs, ours in mine.items())


def test_rows_are_as_they_are_alone(family: str) -> None:
    torch.manual_seed(1)
    model = MmdlmForMaskedDiffusion(read_config(CONFIGS[family])).eval()
    vocabulary = model.vocabulary
    documents = [
        Sequence((text_segment(torch.randint(0, 30, (n,)), target=True),)) for n in (9, 4, 7)
    ]
    with torch.no_grad():
        alone = [
            model.hidden(batch.ids, batch)[0]
            for batch in (collate([one], vocabulary) for one in documents)
        ]
        padded = collate(documents, vocabulary, length=12)
        hidden = model.hidden(padded.ids, padded)
        for row, one in zip(hidden, alone, strict=True):
            torch.testing.assert_close(row[: len(one)], one, atol=1e-5, rtol=0)
        packed = pack(documents, vocabulary, length=22)  # in the order of their lengths
        hidden = model.hidden(packed.ids, packed)[0]
        by_length = torch.cat(sorted(alone, key=len, reverse=True))
        torch.testing.assert_close(hidden[: len(by_length)], by_length, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_the_same_to_the_bit(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = write(tmp_path / "theirs", CONFIGS[family], dtype=dtype)
    (folder / "README.md").write_text("what else lies there")
    list(convert(folder, tmp_path / "ours"))
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "mmdlm"
    list(convert(tmp_path / "ours", tmp_path / "back", to=family))
    for path in sorted(folder.iterdir()):
        back = tmp_path / "back" / path.name
        if path.name == "config.json":
            assert json.loads(back.read_text()) == json.loads(path.read_text())
        else:
            assert back.read_bytes() == path.read_bytes(), path.name


def test_what_was_saved_in_our_format_reads_alike(family: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", CONFIGS[family])
    model = AutoModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "ours")
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    again = AutoModel.from_pretrained(tmp_path / "ours")
    ids = torch.arange(12)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_model_born_here_is_written_for_a_family(family: str, tmp_path: Path) -> None:
    config = read_config(CONFIGS[family])
    config.published = None
    torch.manual_seed(0)
    model = MmdlmForMaskedDiffusion(config).eval()
    model.save_pretrained(tmp_path / "ours")
    list(convert(tmp_path / "ours", tmp_path / "theirs", to=family))
    again = AutoModel.from_pretrained(tmp_path / "theirs")
    assert again.config.published["family"] == family
    assert again.vocabulary == model.vocabulary
    ids = torch.arange(12)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_shards_are_converted_one_by_one(tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(write(tmp_path / "whole", CONFIGS["llada"]))
    model.save_pretrained(tmp_path / "ours", max_shard_size="10KB")
    steps = list(convert(tmp_path / "ours", tmp_path / "theirs", to="llada"))
    shards = sorted((tmp_path / "theirs").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert steps == [(n + 1, len(shards)) for n in range(len(shards))]
    again = AutoModel.from_pretrained(tmp_path / "theirs")
    ids = torch.arange(12)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", SEES)
def test_images_beside_others_are_seen_as_alone(name: str) -> None:
    torch.manual_seed(1)
    model = MmdlmForMaskedDiffusion(read_config(CONFIGS[name])).eval()
    assert model.vision is not None
    vocabulary = model.vocabulary
    noise = torch.randint(0, 256, (60, 90, 3), dtype=torch.uint8, generator=torch.manual_seed(2))
    whole = Image.fromarray(noise.numpy())
    images = model.vision.config.tiling.views([whole]) + model.vision.config.tiling.views(
        [whole.rotate(90, expand=True)]
    )
    documents = [
        Sequence(
            (text_segment([1, 2]), image_segment(one, vocabulary), text_segment([3], target=True))
        )
        for one in images
    ]
    assert len(documents[0]) != 3
    with torch.no_grad():
        alone = []
        for one in documents:
            batch = model.see(collate([one], vocabulary))
            alone.append(model.hidden(batch.ids, batch)[0])
        batch = model.see(collate(documents, vocabulary, length=max(map(len, documents)) + 3))
        hidden = model.hidden(batch.ids, batch)
        for row, one in zip(hidden, alone, strict=True):
            torch.testing.assert_close(row[: len(one)], one, atol=1e-5, rtol=0)


def test_images_are_asked_for_where_they_count() -> None:
    blind = MmdlmForMaskedDiffusion(read_config(CONFIGS["llada"]))
    seeing = MmdlmForMaskedDiffusion(read_config(CONFIGS["llada_v"]))
    assert seeing.vision is not None
    views = seeing.vision.config.tiling.views([Image.new("RGB", (50, 50))])
    document = Sequence((image_segment(views[0], seeing.vocabulary),))
    batch = collate([document], seeing.vocabulary)
    with pytest.raises(ValueError, match="1 images to look at, but the model has no vision"):
        blind.see(batch)
    with pytest.raises(ValueError, match=r"call see\(batch\) first"):
        seeing.hidden(batch.ids, batch)


def test_the_language_model_of_llada_v_has_llada_s_model_type() -> None:
    assert family_of(LLAMA | {"model_type": "llada"}).name == "llada_v"
    assert read_config(LLAMA | {"model_type": "llada"}).vision is None


def test_image_ids_begin_where_the_tokenizer_ends() -> None:
    published = CONFIGS["mmada"] | {
        "vocab_size": 134656,
        "embedding_size": 134656,
        "llm_vocab_size": 126464,
        "codebook_size": 8192,
        "mask_token_id": 126336,
        "eos_token_id": 126081,
        "pad_token_id": 126081,
    }
    vocabulary = family_named("mmada").vocabulary(published)
    assert vocabulary.image == (126349, 134541)
    assert vocabulary.image_markers == (126084, 126085)
    assert family_named("mmada").vocabulary(published, tokenizer_size=126400).image[0] == 126400
    with pytest.raises(ValueError, match="126465 text ids and 8192 image codes do not fit"):
        family_named("mmada").vocabulary(published, tokenizer_size=126465)


def test_auto_classes_find_the_first_image_id_by_the_tokenizer(tmp_path: Path) -> None:
    folder = write(tmp_path, CONFIGS["mmada"])
    assert AutoModel.from_pretrained(folder).vocabulary.image == (48, 64)
    Tokenizer(WordLevel({f"w{n}": n for n in range(45)}, unk_token="w0")).save(
        str(folder / "tokenizer.json")
    )
    assert AutoModel.from_pretrained(folder).vocabulary.image == (45, 61)
    assert MmdlmForMaskedDiffusion.from_pretrained(folder).vocabulary.image == (45, 61)


def test_our_config_reads_a_published_one_without_a_warning(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path, CONFIGS[family])
    config = MmdlmConfig.from_pretrained(folder)  # as PEFT does with the class of a model's config
    assert config.vocabulary == AutoConfig.from_pretrained(folder).vocabulary
    assert "instantiate a model of type" not in caplog.text


def test_a_shifted_state_predicts_the_token_at_its_place() -> None:
    model = MmdlmForMaskedDiffusion(read_config(CONFIGS["dream"])).eval()
    vocabulary = model.vocabulary
    documents = [Sequence((text_segment(ids),)) for ids in ([1, 2, 3], [4, 5])]
    batch = pack(documents, vocabulary, length=6)
    hidden = model.hidden(batch.ids, batch)
    raw = model.model(model.model.embed_tokens(batch.ids), batch.position, batch.document)
    expected = raw[0][[0, 0, 1, 3, 3]]  # the first of each document keeps its own
    torch.testing.assert_close(hidden[0, :5], expected, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "gpt2"}, "type 'gpt2'; known are"),
        ({"alibi": True}, "alibi = True; the Transformer does only alibi = False"),
        ({"layer_norm_type": "low_precision"}, "layer_norm_type = 'low_precision'"),
        ({"d_model": None}, "no 'd_model'"),
        ({"n_layers": None}, "no 'n_layers'"),
    ],
)
def test_what_the_transformer_does_not_do_is_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        read_config(CONFIGS["llada"] | change)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"mm_projector_type": "resampler"}, "unknown projector 'resampler'"),
        ({"image_grid_pinpoints": None}, "no 'image_grid_pinpoints', which a llava_llada has"),
        ({"image_grid_pinpoints": "all"}, "image_grid_pinpoints 'all' are no multiples"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps = 'small'; a number is needed"),
        ({"rope_theta": "x"}, "rope_theta = 'x'; a number is needed"),
    ],
)
def test_eyes_that_are_not_known_are_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        read_config(CONFIGS["llada_v"] | change)


def test_a_head_that_is_called_the_embedding_is_the_embedding(tmp_path: Path) -> None:
    folder = write(tmp_path, CONFIGS["llada_v"])
    (folder / "config.json").write_text(json.dumps(CONFIGS["llada_v"] | {"tie_word_embeddings": 1}))
    with pytest.raises(ValueError, match=r"lm_head.weight and model.embed_tokens.weight differ"):
        AutoModel.from_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tied = AutoModel.from_pretrained(folder)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ids = torch.arange(12)[None]
    assert torch.equal(AutoModel.from_pretrained(folder)(ids).logits, tied(ids).logits)


def test_eyes_are_written_with_the_defaults_of_what_they_leave_out(tmp_path: Path) -> None:
    """Those of transformers, which are not those that a published config leaves out."""
    config = read_config(CONFIGS["llada_v"])
    assert config.vision is not None
    config.published = None
    config.vision["tower"] = {
        name: value
        for name, value in config.vision["tower"].items()
        if name not in ("intermediate_size", "num_attention_heads", "layer_norm_eps")
    } | {"hidden_size": 24}
    model = MmdlmForMaskedDiffusion(config)
    model.save_pretrained(tmp_path / "ours")
    list(convert(tmp_path / "ours", tmp_path / "theirs", to="llada_v"))
    again = AutoModel.from_pretrained(tmp_path / "theirs")
    assert again.config.vision["tower"]["intermediate_size"] == 3072
    assert again.config.vision["tower"]["num_attention_heads"] == 12
    config.vision["tiling"]["tile_several"] = True
    model.save_pretrained(tmp_path / "several")
    with pytest.raises(ValueError, match=r"llada_v cannot say vision.tiling.tile_several = True"):
        list(convert(tmp_path / "several", tmp_path / "no", to="llada_v"))


def test_tensors_of_another_family_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path, CONFIGS["llada"])
    (folder / "config.json").write_text(json.dumps(CONFIGS["dream"]))
    with pytest.raises(ValueError, match=r"config.json is dream's, but 21 of 21 tensors"):
        AutoModel.from_pretrained(folder)


def test_a_family_that_cannot_express_a_model_says_why(tmp_path: Path) -> None:
    config = read_config(CONFIGS["dream"])
    config.qk_norm = True
    MmdlmForMaskedDiffusion(config).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"llada has no place for 4 of .* tensors"):
        list(convert(tmp_path / "ours", tmp_path / "theirs", to="llada"))
    with pytest.raises(ValueError, match="unknown family 'lada'; known are"):
        list(convert(tmp_path / "ours", tmp_path / "theirs", to="lada"))
    assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rope_theta": 1234.0}, None),
        ({"rms_norm_eps": 1e-3}, None),
        ({"max_position_embeddings": 99}, None),
        ({"shift": True}, "shift = True"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling = {"),
    ],
)
def test_what_changed_since_it_was_published_is_written(
    change: dict[str, Any], says: str | None, tmp_path: Path
) -> None:
    """Not the config.json that it once came with."""
    list(convert(write(tmp_path / "theirs", CONFIGS["llada"]), tmp_path / "ours"))
    path = tmp_path / "ours" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    if says is not None:
        with pytest.raises(ValueError, match=says):
            list(convert(tmp_path / "ours", tmp_path / "back", to="llada"))
        return
    list(convert(tmp_path / "ours", tmp_path / "back", to="llada"))
    again = AutoConfig.from_pretrained(tmp_path / "back")
    assert {name: getattr(again, name) for name in change} == change


@pytest.mark.parametrize(
    ("family", "change", "says"),
    [
        ("llada", {"head_dim": 16}, "llada cannot say head_dim = 16, and would be read with 8"),
        ("llada", {"codes": True}, r"llada cannot say image codes = \[48, 64\]"),
        ("dream", {"codes": True}, "dream cannot say image codes"),
        ("lumina", {"codes": True, "mask_id": 50}, "lumina cannot say mask_id = 50"),
        ("mmada", {}, "MMaDA draws, but this model has no image codes"),
        ("lumina", {}, "Lumina-DiMOO draws, but this model has no image codes"),
    ],
)
def test_what_a_family_would_read_as_another_model_is_not_written(
    family: str, change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    config = read_config(CONFIGS["dream" if family == "dream" else "llada"])
    config.published = None
    change = dict(change)
    words = {"mask_id": change.pop("mask_id", 40), "eos_id": 39, "pad_id": 39, "size": 64}
    if change.pop("codes", False):
        words |= {"text": (0, 48), "image": (48, 64), "begin_image_id": 46, "end_image_id": 47}
    else:
        words |= {"text": (0, 64), "image": (64, 64)}
    config.vocabulary = Vocabulary(**words).to_dict()
    for name, value in change.items():
        setattr(config, name, value)
    MmdlmForMaskedDiffusion(config).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=says):
        list(convert(tmp_path / "ours", tmp_path / "theirs", to=family))
    assert not (tmp_path / "theirs").exists()


STRETCHED: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 8.0},
    "linear, older": {"type": "linear", "factor": 8},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn, all": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
}


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("scaling", STRETCHED.values(), ids=STRETCHED)
def test_positions_are_stretched_as_transformers_does(
    family: str, scaling: dict[str, Any], place: str
) -> None:
    """Angles of every family are those of transformers' own rotary embedding."""
    config = read_config(CONFIGS[family] | {place: dict(scaling)})
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=32,
            num_attention_heads=4,
            max_position_embeddings=64,
            rope_parameters={**scaling, "rope_theta": 500000.0},
        )
    )
    position = torch.arange(64)[None]
    cos, sin = RotaryEmbedding(config)(position)
    their_cos, their_sin = theirs(torch.zeros(1), position)
    torch.testing.assert_close(cos[0], their_cos, atol=1e-6, rtol=0)
    torch.testing.assert_close(sin[0].abs(), their_sin.abs(), atol=1e-6, rtol=0)
    plain, _ = RotaryEmbedding(read_config(CONFIGS[family]))(position)
    assert not torch.allclose(cos, plain)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "'dynamic' is not one of"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "'longrope' is not one of"),
        ({"rope_scaling": {"type": "mine", "factor": 2.0}}, "'mine' is not one of linear, llama3"),
        ({"rope_scaling": {"factor": 8.0}}, "'default' is not one of"),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear"}}}, "'default' is not one"),
        ({"rope_scaling": {"rope_type": "linear"}}, "has no 'factor'"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": "8"}},
            "factor = '8'; a number above 0",
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": -1.0}},
            "factor = -1.0; a number above",
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": math.nan}}, "factor = nan"),
        ({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2}}, "type = 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "grow": 1}}, "'grow'.* not known"),
        ({"rope_scaling": {**STRETCHED["llama3"], "low_freq_factor": 4.0}}, "must be below"),
        ({"rope_scaling": {**STRETCHED["yarn"], "truncate": "no"}}, "truncate = 'no'; true or"),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear'; an object"),
        ({"rope_scaling": [8.0]}, "an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
            "two values of rope_the",
        ),
        (
            {
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 4.0},
            },
            "two values of rope_scaling",
        ),
    ],
)
def test_positions_that_would_turn_in_another_way_are_refused(
    family: str, change: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        read_config(CONFIGS[family] | change)


def test_the_length_before_stretching_may_stand_beside_it() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0}
    config = read_config(
        CONFIGS["llada"] | {"rope_scaling": scaling, "original_max_position_embeddings": 16}
    )
    assert config.rope_scaling == {**scaling, "original_max_position_embeddings": 16}


@pytest.mark.parametrize("name", ["llada", "mmada", "lumina", "lavida_llada"])
def test_a_stretched_model_comes_back_from_our_format(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", CONFIGS[name] | {"rope_scaling": STRETCHED["yarn"]})
    list(convert(folder, tmp_path / "ours"))
    list(convert(tmp_path / "ours", tmp_path / "back", to=name))
    theirs, back = (
        json.loads((one / "config.json").read_text()) for one in (folder, tmp_path / "back")
    )
    assert back == theirs
    ids = torch.arange(12)[None]
    logits = [AutoModel.from_pretrained(one)(ids).logits for one in (folder, tmp_path / "ours")]
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", ["dream", "llada_v", "dimple"])
def test_stretched_positions_are_read_and_written(name: str, tmp_path: Path) -> None:
    """Wherever a config says it: transformers 5 moves the angle and the factor."""
    scaling = {"rope_type": "linear", "factor": 2.0}
    older = read_config(CONFIGS[name] | {"rope_scaling": scaling})
    without = {key: value for key, value in CONFIGS[name].items() if key != "rope_theta"}
    newer = read_config(without | {"rope_parameters": {**scaling, "rope_theta": 500000.0}})
    assert older.rope_scaling == newer.rope_scaling == scaling
    assert older.rope_theta == newer.rope_theta == 500000.0
    plain = without | {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}
    assert read_config(plain).rope_scaling is None
    older.published = None
    model = MmdlmForMaskedDiffusion(older).eval()
    model.save_pretrained(tmp_path / "ours")
    list(convert(tmp_path / "ours", tmp_path / "theirs", to=name))
    again = AutoModel.from_pretrained(tmp_path / "theirs")
    ids = torch.arange(12)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_folder_is_not_written_into_itself(tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", CONFIGS["llada"])
    with pytest.raises(ValueError, match="lies in .*theirs, which is copied"):
        list(convert(folder, folder / "ours"))


def test_markers_of_an_image_are_asked_for_where_there_are_none() -> None:
    assert family_named("llada").vocabulary(CONFIGS["llada"]).begin_image_id is None
    with pytest.raises(ValueError, match="no begin and end of an image"):
        _ = Vocabulary(
            size=4, text=(0, 4), image=(4, 4), mask_id=3, pad_id=2, eos_id=2
        ).image_markers
