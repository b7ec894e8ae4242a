"""Loading: every family with its tokenizers, fewer bits, adapters; and folders that are broken."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, PreTrainedTokenizerFast

import mmdlm
from data_pipelines.text_tokenizer import train_text_tokenizer
from mmdlm import load
from mmdlm.core.kernels.linear import Linear
from mmdlm.models.checkpoints import stored_tensor
from mmdlm.models.checkpoints.checkpoint import INDEX, Checkpoint
from mmdlm.models.configuration import read_config
from mmdlm.models.families.auto import family_of
from mmdlm.models.modeling import MmdlmForMaskedDiffusion
from mmdlm.models.quantization import quantization_config, take_back_layers
from mmdlm.pipeline import hub, loading
from mmdlm.pipeline.loading import load_text_tokenizer
from mmdlm.templates.mmada import Mmada
from mmdlm.vision.tokenizers.magvit2 import Magvit2Tokenizer
from tests.models.tiny import tiny_config

MASK, END = "<|mdm_mask|>", "<|endoftext|>"
ROWS = 384  # of the embedding: more than the tokenizer has ids
OLMO = {
    "d_model": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "mlp_hidden_size": 128,
    "max_sequence_length": 128,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "vocab_size": ROWS,
    "embedding_size": ROWS,
}
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "vocab_size": ROWS,
}
CODES = {"codebook_size": 64, "new_vocab_size": ROWS}  # of a MAGVIT-v2 with six bits
FAMILIES: dict[str, dict[str, Any]] = {
    "llada": OLMO | {"model_type": "llada"},
    "mmada": OLMO | CODES | {"model_type": "mmada", "llm_vocab_size": ROWS - 64},
    "lumina": OLMO
    | {"model_type": "llada", "architectures": ["LLaDAForMultiModalGeneration"]}
    | {"codebook_size": 64},
    "dream": LLAMA | {"model_type": "Dream"},
}


@pytest.fixture(scope="module")
def text_tokenizer() -> PreTrainedTokenizerFast:
    """With a mask token, as those of published families have it."""
    tokenizer = train_text_tokenizer(["a red heart", "a dark skin tone"] * 4, size=280)
    tokenizer.add_special_tokens({"additional_special_tokens": [MASK]})
    assert len(tokenizer) < ROWS - 64
    return tokenizer


@pytest.fixture
def publish(
    text_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Callable[..., tuple[Path, MmdlmForMaskedDiffusion]]:
    """Writes a random checkpoint as a family publishes it -> its folder, and the model."""

    def write(
        family: str, *, dtype: torch.dtype = torch.float32, shards: int = 1, **changes: Any
    ) -> tuple[Path, MmdlmForMaskedDiffusion]:
        ids = {
            "mask_token_id": text_tokenizer.convert_tokens_to_ids(MASK),
            "eos_token_id": text_tokenizer.eos_token_id,
            "pad_token_id": text_tokenizer.eos_token_id,
        }
        config = FAMILIES[family] | ids | changes
        folder = tmp_path / family
        folder.mkdir()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = MmdlmForMaskedDiffusion(read_config(config)).to(dtype).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_(std=0.2)
        (folder / "config.json").write_text(json.dumps(config))
        back = family_of(config).weights.reversed
        write_shards(folder, {str(back(k)): v for k, v in model.state_dict().items()}, shards)
        text_tokenizer.save_pretrained(folder)
        return folder, model

    return write


def write_shards(folder: Path, tensors: dict[str, Tensor], count: int) -> None:
    if count == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    where = {}
    for number in range(count):
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = dict(list(tensors.items())[number::count])
        save_file(part, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def six_bits() -> Magvit2Tokenizer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Magvit2Tokenizer(
            ch=32, ch_mult=[1, 1], num_res_blocks=[1, 1], z_channels=6, resolution=16
        )


def some_ids(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> Tensor:
    """Of the same ids for every model, [2, 12, V]."""
    with torch.no_grad():
        return model(some_ids(2, 12)).logits.float()


def error_of(call: Callable[[], object], folder: Path, says: str) -> None:
    """One sentence that names the folder."""
    with pytest.raises(ValueError, match=says) as caught:
        call()
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


# --- published folders ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_published_folder_loads(publish: Any, family: str, shards: int) -> None:
    folder, original = publish(family, dtype=torch.bfloat16, shards=shards)
    six_bits().save_pretrained(folder / "image_tokenizer")
    model = load(folder, device="cpu")
    assert isinstance(model.denoiser, MmdlmForMaskedDiffusion)
    assert model.denoiser.dtype == torch.bfloat16, "as it is stored"
    assert (model.image_tokenizer is None) == (family in ("llada", "dream"))
    assert model.denoiser.config.published["family"] == family
    assert torch.equal(logits(model.denoiser), logits(original))
    full = load(folder, device="cpu", dtype=torch.float32).denoiser
    assert torch.equal(logits(full), logits(original.float()))
    assert torch.equal(logits(full), logits(AutoModel.from_pretrained(folder, dtype=torch.float32)))


def test_codes_begin_where_the_tokenizer_ends(
    publish: Any, text_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder, _ = publish("mmada")
    six_bits().save_pretrained(folder / "image_tokenizer")
    first = len(text_tokenizer)
    assert load(folder).denoiser.vocabulary.image == (first, first + 64)


def test_vocab_and_merges_are_a_tokenizer(
    publish: Any, text_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Dream ships no tokenizer.json but a class of its own, which is not run."""
    folder, _ = publish("dream")
    content = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(content["vocab"]))
    pairs = "\n".join(" ".join(pair) for pair in content["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{pairs}\n")
    mask = text_tokenizer.convert_tokens_to_ids(MASK)
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    settings = {
        "added_tokens_decoder": {
            "0": {"content": END, "special": True} | flags,
            str(mask): {"content": MASK, "special": True} | flags,
        },
        "additional_special_tokens": [MASK],
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "eos_token": END,
        "mask_token": MASK,
        "pad_token": END,
        "tokenizer_class": "DreamTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenization_dream.py").write_text("raise SystemExit('code of the folder was run')")
    read = load(folder).text_tokenizer
    assert len(read) == len(text_tokenizer)
    assert (read.mask_token_id, read.eos_token_id) == (mask, 0)
    text = f" a red{MASK} heart{END}"
    ids = read(text)["input_ids"]
    assert read.decode(ids) == text
    assert ids.count(mask) == 1
    shared = [one for one in ids if one not in (0, mask)]
    assert shared == text_tokenizer(" a red heart".strip())["input_ids"]


def test_an_encoder_of_ours_loads(text_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    from transformers import BertConfig

    from mmdlm.core.vocabulary import Vocabulary
    from mmdlm.models.encoder import MmdlmEncoder
    from mmdlm.models.encoder_config import MmdlmEncoderConfig

    size = len(text_tokenizer)
    mask = text_tokenizer.convert_tokens_to_ids(MASK)
    vocabulary = Vocabulary(
        size=size, text=(0, size), image=(size, size), mask_id=mask, eos_id=0, pad_id=0
    )
    bert = BertConfig(
        vocab_size=size,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
    )
    model = MmdlmEncoder(MmdlmEncoderConfig(vocabulary=vocabulary.to_dict(), encoder=bert)).eval()
    model.save_pretrained(tmp_path)
    text_tokenizer.save_pretrained(tmp_path)
    loaded = load(tmp_path, device="cpu").denoiser
    assert isinstance(loaded, MmdlmEncoder)
    torch.testing.assert_close(logits(loaded), logits(model))


def test_a_repository_is_fetched_without_its_code(
    publish: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = publish("llada")
    asked = []

    def download(name: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.append((name, set(allow_patterns)))
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    load("GSAI-ML/LLaDA-8B-Instruct")
    assert asked == [("GSAI-ML/LLaDA-8B-Instruct", {"*.json", "*.safetensors", "*.txt", "*.jinja"})]


# --- image tokenizers -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.safetensors"])
def test_an_image_tokenizer_is_given_as_a_folder(publish: Any, tmp_path: Path, name: str) -> None:
    folder, _ = publish("mmada")
    tokenizer = six_bits()
    tokenizer.save_pretrained(tmp_path / "magvit2")
    (tmp_path / "magvit2" / "model.safetensors").rename(tmp_path / "magvit2" / name)
    loaded = load(folder, image_tokenizer=tmp_path / "magvit2").image_tokenizer
    assert loaded is not None
    for key, tensor in tokenizer.state_dict().items():
        assert torch.equal(loaded.state_dict()[key].cpu(), tensor)


def test_an_image_tokenizer_that_is_given_comes_before_the_folders_own(
    publish: Any, tmp_path: Path
) -> None:
    folder, _ = publish("mmada")
    six_bits().save_pretrained(folder / "image_tokenizer")
    other = six_bits()
    torch.nn.init.ones_(next(other.parameters()))
    other.save_pretrained(tmp_path / "other")
    own, given = load(folder), load(folder, image_tokenizer=tmp_path / "other")
    assert own.image_tokenizer is not None
    assert given.image_tokenizer is not None
    assert not bool((next(own.image_tokenizer.parameters()) == 1).all())
    assert bool((next(given.image_tokenizer.parameters()) == 1).all())
    with pytest.raises(ValueError, match="image_tokenizer: no folder"):
        load(folder, image_tokenizer=tmp_path / "nowhere")


@pytest.mark.slow
def test_luminas_folder_holds_its_image_tokenizer(publish: Any) -> None:
    diffusers = pytest.importorskip("diffusers")
    folder, _ = publish("lumina")
    model = diffusers.VQModel(
        block_out_channels=[8, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=4,
        num_vq_embeddings=64,
        sample_size=16,
        up_block_types=["UpDecoderBlock2D"] * 2,
    )
    model.save_pretrained(folder / "vqvae")
    loaded = load(folder).image_tokenizer
    assert loaded is not None
    assert loaded.codebook_size == 64


@pytest.mark.parametrize(
    "family, repository, inside",
    [("mmada", "showlab/magvitv2", ""), ("lumina", "Alpha-VLLM/Lumina-DiMOO", "vqvae")],
)
def test_the_familys_image_tokenizer_is_fetched(
    publish: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    repository: str,
    inside: str,
) -> None:
    folder, _ = publish(family)
    six_bits().save_pretrained(tmp_path / "hub" / inside)
    asked = []

    def download(name: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.append((name, allow_patterns[0]))
        return str(tmp_path / "hub")

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert isinstance(load(folder).image_tokenizer, Magvit2Tokenizer)
    assert asked == [(repository, f"{inside}/*.json".lstrip("/"))]


def test_a_model_of_text_takes_no_image_tokenizer(publish: Any, tmp_path: Path) -> None:
    folder, _ = publish("llada")
    error_of(lambda: load(folder, image_tokenizer=tmp_path), folder, "no image codes in its vocab")


def test_an_image_tokenizer_that_is_not_there_is_said(publish: Any) -> None:
    folder, _ = publish("mmada")
    with pytest.raises(ValueError, match="image_tokenizer: no folder 'showlab/magvitv2'.*Hub"):
        load(folder)
    with pytest.raises(ValueError, match="image_tokenizer: no folder '/nowhere'"):
        load(folder, image_tokenizer="/nowhere")
    Magvit2Tokenizer(
        ch=32, ch_mult=[1, 1], num_res_blocks=[1, 1], z_channels=4, resolution=16
    ).save_pretrained(folder / "image_tokenizer")
    error_of(lambda: load(folder), folder, "image tokenizer has 16 codes, but .* has 64")


# --- dtypes and memory ----------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
def test_tensors_read_in_pieces_are_the_same(
    publish: Any, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, target: torch.dtype
) -> None:
    monkeypatch.setattr(stored_tensor, "PIECE", 1000)  # a row and a bit of most
    folder, original = publish("llada", dtype=stored)
    read: list[int] = []
    model = MmdlmForMaskedDiffusion.from_pretrained(folder, dtype=target, read=read.append)
    for name, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.to(target))
    assert sum(read) == sum(one.nbytes for one in Checkpoint.open(folder).tensors.values())
    assert (max(read) <= 1024) == (stored != target)


def test_a_slice_of_a_stored_tensor_is_that_part(publish: Any) -> None:
    folder, _ = publish("llada")
    stored = Checkpoint.open(folder).tensors["model.transformer.wte.weight"]
    whole = stored[...]
    assert stored.get_shape() == list(whole.shape)
    assert torch.equal(stored[3:7], whole[3:7])
    assert torch.equal(stored.to(torch.bfloat16)[3:7], whole[3:7].bfloat16())


def test_a_bar_is_shown_for_large_files_on_a_terminal_alone(
    publish: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    folder, _ = publish("llada")
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    load(folder)
    assert shown.getvalue() == ""
    monkeypatch.setattr(loading, "LARGE", 1000)
    load(folder)
    assert "loading llada: 100%" in shown.getvalue()
    assert "Loading weights" not in shown.getvalue()
    monkeypatch.setattr(sys, "stderr", pipe := io.StringIO())
    load(folder)
    assert pipe.getvalue() == ""


def test_memory_that_does_not_suffice_is_said(
    publish: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = publish("llada")

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(MmdlmForMaskedDiffusion, "from_pretrained", fail)
    error_of(lambda: load(folder), folder, "does not fit into the memory of")


# --- fewer bits -----------------------------------------------------------------------------------


def needs(package: str) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def is_near(model: Any, reference: Tensor, tolerance: float) -> None:
    """Logits differ by the rounding of weights, and differ."""
    error = float((logits(model) - reference).norm() / reference.norm())
    assert 0 < error < tolerance


# How far the logits of two random layers go astray with weights rounded to so many bits.
BITS = [
    ("int8", "torchao", 0.1),
    ("float8", "torchao", 0.3),
    ("8bit", "bitsandbytes", 0.15),
    ("4bit", "bitsandbytes", 0.7),
]


@pytest.mark.parametrize("kind, package, tolerance", BITS)
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_published_weights_in_fewer_bits(
    publish: Any, kind: str, package: str, tolerance: float, family: str
) -> None:
    needs(package)
    folder, original = publish(family)
    reference = logits(original)
    model = load(folder, device="cpu", quantization=kind).denoiser
    is_near(model, reference, tolerance)
    layer = model.model.layers[0]
    assert all(_is_quantized(one) for one in (layer.mlp.up_proj, layer.self_attn.q_proj))
    assert not _is_quantized(model.lm_head)
    assert model.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("kind, package, tolerance", BITS)
def test_our_weights_in_fewer_bits(
    publish: Any, tmp_path: Path, kind: str, package: str, tolerance: float
) -> None:
    needs(package)
    folder, original = publish("mmada")
    six_bits().save_pretrained(tmp_path / "ours" / "image_tokenizer")
    load_text_tokenizer(folder).save_pretrained(tmp_path / "ours")
    original.save_pretrained(tmp_path / "ours")
    model = load(tmp_path / "ours", device="cpu", quantization=kind)
    is_near(model.denoiser, logits(original), tolerance)


def test_a_model_draws_with_fewer_bits(tiny_checkpoint: Path) -> None:
    needs("torchao")
    model = load(tiny_checkpoint, device="cpu", quantization="int8")
    model.text_to_image("red heart", num_inference_steps=2)


def test_bitsandbytes_is_offered_layers_that_it_knows() -> None:
    """transformers replaces no subclass of torch's layers, and only warns that it replaced none."""
    plain = MmdlmForMaskedDiffusion(tiny_config())
    assert type(plain.model.layers[0].mlp.up_proj) is Linear
    config = tiny_config()
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    model = MmdlmForMaskedDiffusion(config)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    with pytest.raises(ValueError, match="no weight was quantized by bitsandbytes, though"):
        take_back_layers(model)
    assert type(model.model.layers[0].mlp.up_proj) is Linear


def test_a_config_object_of_transformers_is_taken(publish: Any) -> None:
    needs("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    folder, original = publish("llada")
    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = load(folder, device="cpu", quantization=config).denoiser
    assert config.modules_to_not_convert is None, "it is the caller's"
    is_near(model, logits(original), 0.1)
    assert not _is_quantized(model.lm_head)
    config = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["model.layers.0"])
    model = load(folder, device="cpu", quantization=config).denoiser
    assert _is_quantized(model.lm_head)
    assert not _is_quantized(model.model.layers[0].mlp.up_proj)
    hidden, positions = torch.randn(1, 5, 64), torch.tensor([[True, False, True, True, False]])
    torch.testing.assert_close(
        model.logits_at(hidden, positions, ids=(4, 20)),
        model.logits_at(hidden, positions)[:, 4:20],
    )


def test_what_was_saved_in_fewer_bits_loads_again(publish: Any, tmp_path: Path) -> None:
    needs("bitsandbytes")
    folder, _ = publish("llada")
    model = load(folder, device="cpu", quantization="4bit")
    model.denoiser.save_pretrained(tmp_path / "ours")
    model.text_tokenizer.save_pretrained(tmp_path / "ours")
    again = load(tmp_path / "ours", device="cpu").denoiser
    assert torch.equal(logits(again), logits(model.denoiser))
    with pytest.raises(ValueError, match="quantized already; leave out quantization='8bit'"):
        load(tmp_path / "ours", device="cpu", quantization="8bit")


@pytest.mark.parametrize(
    "kind, says",
    [
        ("3bit", "quantization '3bit' is not one of 4bit, 8bit, int8, int4, float8"),
        ("int4", "runs only on CUDA, not on cpu"),
    ],
)
def test_a_kind_that_does_not_work_is_said(kind: str, says: str) -> None:
    if kind == "int4":
        needs("torchao")
    with pytest.raises(ValueError, match=says):
        quantization_config(kind, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize(
    "kind, says",
    [
        ("4bit", "needs bitsandbytes and accelerate; install .* pip install bitsandbytes accel"),
        ("int8", "needs torchao; install with: pip install torchao"),
    ],
)
def test_a_missing_package_is_said(
    publish: Any, monkeypatch: pytest.MonkeyPatch, kind: str, says: str
) -> None:
    folder, _ = publish("llada")
    monkeypatch.setattr("mmdlm.models.quantization.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=says):
        load(folder, quantization=kind)


def _is_quantized(linear: torch.nn.Linear) -> bool:
    return type(linear) is not Linear or type(linear.weight) is not torch.nn.Parameter


# --- adapters -------------------------------------------------------------------------------------

LOW_RANK = {"q_proj": (64, 64), "v_proj": (32, 64), "attn_out": (64, 64)}
LOW_RANK |= {"ff_proj": (128, 64), "ff_out": (64, 128)}
OURS = {"q_proj": "self_attn.q_proj", "v_proj": "self_attn.v_proj", "attn_out": "self_attn.o_proj"}
OURS |= {"ff_proj": "mlp.gate_proj", "ff_out": "mlp.down_proj"}


def write_adapter(
    folder: Path, *, ours: bool, rank: int = 3, width: int | None = None, **changes: Any
) -> dict[str, Tensor]:
    """A random LoRA -> what it adds to each of our weights: B A alpha / r."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tensors, added = {}, {}
    for layer in range(2):
        for name, (rows, columns) in LOW_RANK.items():
            low = torch.randn(rank, width or columns, generator=generator) * 0.3
            high = torch.randn(rows, rank, generator=generator) * 0.3
            ours_is = f"model.layers.{layer}.{OURS[name]}"
            module = ours_is if ours else f"model.transformer.blocks.{layer}.{name}"
            tensors[f"base_model.model.{module}.lora_A.weight"] = low
            tensors[f"base_model.model.{module}.lora_B.weight"] = high
            alpha = 12 if name == "attn_out" else 6
            added[f"{ours_is}.weight"] = high @ low * alpha / rank
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    name = "o_proj" if ours else "attn_out"
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 6,
        "alpha_pattern": {name: 12},
        "target_modules": sorted(OURS[one].split(".")[1] if ours else one for one in LOW_RANK),
        "base_model_name_or_path": "GSAI-ML/LLaDA-8B-Instruct",
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return added


@pytest.mark.parametrize("ours", [False, True], ids=["published names", "our names"])
@pytest.mark.parametrize("merge", [False, True], ids=["beside", "merged"])
def test_an_adapter_adds_its_product(publish: Any, tmp_path: Path, ours: bool, merge: bool) -> None:
    pytest.importorskip("peft")
    folder, original = publish("llada")
    added = write_adapter(tmp_path / "lora", ours=ours)
    model = load(folder, device="cpu", adapter=tmp_path / "lora", merge_adapter=merge).denoiser
    without = logits(original)
    with torch.no_grad():
        for name, delta in added.items():
            original.get_parameter(name).add_(delta)
    torch.testing.assert_close(logits(model), logits(original), atol=1e-5, rtol=1e-5)
    assert (logits(original) - without).abs().max() > 0.1
    is_plain = type(model.model.layers[0].self_attn.q_proj) is Linear
    assert is_plain == merge


def test_an_adapter_of_published_names_fits_the_converted_model(
    publish: Any, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    folder, _ = publish("llada")
    write_adapter(tmp_path / "lora", ours=False)
    expected = logits(load(folder, device="cpu", adapter=tmp_path / "lora").denoiser)
    plain = load(folder, device="cpu")
    plain.denoiser.save_pretrained(tmp_path / "ours")
    plain.text_tokenizer.save_pretrained(tmp_path / "ours")
    again = load(tmp_path / "ours", device="cpu", adapter=tmp_path / "lora").denoiser
    assert torch.equal(logits(again), expected)


def test_what_peft_saves_comes_back(publish: Any, tmp_path: Path) -> None:
    """Ranks and scales by pattern, the head too, and a norm trained in full."""
    peft = pytest.importorskip("peft")
    folder, original = publish("llada")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "o_proj", "down_proj", "lm_head"],
        rank_pattern={"q_proj": 2},
        alpha_pattern={"layers.1.self_attn.o_proj": 3},
        modules_to_save=["norm"],
        use_rslora=True,
    )
    wrapped = peft.get_peft_model(original, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.2)
    wrapped.eval().save_pretrained(tmp_path / "lora")
    for merge in (False, True):
        options = {"adapter": tmp_path / "lora", "merge_adapter": merge}
        model = load(folder, device="cpu", **options).denoiser
        torch.testing.assert_close(logits(model), logits(wrapped), atol=1e-4, rtol=1e-4)
        hidden, positions = torch.randn(1, 3, 64), torch.tensor([[True, False, True]])
        expected = wrapped.base_model.model.lm_head(hidden[positions])
        torch.testing.assert_close(model.logits_at(hidden, positions), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(
            model.logits_at(hidden, positions, ids=(3, 9)), expected[:, 3:9], atol=1e-4, rtol=0
        )


def test_an_adapter_sits_on_weights_in_fewer_bits(publish: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    needs("bitsandbytes")
    folder, original = publish("llada")
    added = write_adapter(tmp_path / "lora", ours=False)
    model = load(folder, device="cpu", adapter=tmp_path / "lora", quantization="8bit").denoiser
    with torch.no_grad():
        for name, delta in added.items():
            original.get_parameter(name).add_(delta)
    is_near(model, logits(original), 0.15)


@pytest.mark.parametrize("ours", [False, True], ids=["published names", "our names"])
def test_a_model_with_an_adapter_saves_the_adapter(
    publish: Any, tmp_path: Path, ours: bool
) -> None:
    """Whatever PEFT the installed transformers asks for."""
    pytest.importorskip("peft")
    folder, _ = publish("llada")
    write_adapter(tmp_path / "lora", ours=ours)
    model = load(folder, device="cpu", adapter=tmp_path / "lora").denoiser
    model.save_pretrained(tmp_path / "again")
    assert sorted(one.name for one in (tmp_path / "again").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "digests.json",
    ]
    again = load(folder, device="cpu", adapter=tmp_path / "again").denoiser
    assert torch.equal(logits(again), logits(model))
    plain = load(folder, device="cpu").denoiser
    assert not torch.equal(logits(again), logits(plain))
    peft = pytest.importorskip("peft")  # and by PEFT itself, on our names
    wrapped = peft.PeftModel.from_pretrained(plain, tmp_path / "again")
    torch.testing.assert_close(logits(wrapped), logits(model))


@pytest.mark.parametrize(
    "options, says",
    [
        ({"width": 48}, r"misshapen: lora_A.weight of .* is \[3, 48\] where \[3, (64|128)\] is"),
        ({"rank": 4, "r": 3}, r"misshapen: lora_A.weight of .* is \[4, \d+\] where \[3, "),
        ({"peft_type": "LOHA"}, "of type 'LOHA', not 'LORA'"),
    ],
)
def test_an_adapter_that_does_not_fit_is_one_sentence(
    publish: Any, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    pytest.importorskip("peft")
    folder, _ = publish("llada")
    write_adapter(tmp_path / "lora", ours=False, **options)
    error_of(lambda: load(folder, adapter=tmp_path / "lora"), tmp_path / "lora", says)


def test_what_is_wrong_with_an_adapter_is_one_sentence(publish: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder, _ = publish("llada")
    lora = tmp_path / "lora"
    write_adapter(lora, ours=False)
    weights = lora / "adapter_model.safetensors"
    content = weights.read_bytes()

    tensors = load_file(weights)
    save_file({name.replace("blocks", "floors"): one for name, one in tensors.items()}, weights)
    error_of(lambda: load(folder, adapter=lora), lora, "10 of its 10 modules are not in the model")
    save_file({"a.weight": torch.zeros(1)}, weights)
    error_of(lambda: load(folder, adapter=lora), lora, "holds no tensor of a LoRA")
    weights.write_bytes(content[:100])
    error_of(lambda: load(folder, adapter=lora), lora, "adapter_model.safetensors is damaged")
    weights.unlink()
    error_of(lambda: load(folder, adapter=lora), lora, "adapter_model.safetensors is missing")
    (lora / "adapter_config.json").unlink()
    error_of(lambda: load(folder, adapter=lora), lora, "adapter_config.json is missing")
    with pytest.raises(ValueError, match="adapter: no folder '/nowhere'"):
        load(folder, adapter="/nowhere")
    with pytest.raises(ValueError, match="no adapter to merge"):
        load(folder, merge_adapter=True)


def test_an_adapter_without_peft_is_said(
    publish: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = publish("llada")
    write_adapter(tmp_path / "lora", ours=False)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="needs PEFT; install with: pip install peft"):
        load(folder, adapter=tmp_path / "lora")


# --- what is wrong with a folder ------------------------------------------------------------------


def remove(*names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def cut(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) * 2 // 3])

    return damage


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    """Change keys of a JSON file; None takes them out."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        content = {key: value for key, value in content.items() if value is not None}
        (folder / name).write_text(json.dumps(content))

    return damage


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")


def lost_tensor(folder: Path) -> None:
    """The index promises one that no shard has."""
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"]["model.transformer.blocks.2.q_proj.weight"] = next(
        iter(content["weight_map"].values())
    )
    (folder / INDEX).write_text(json.dumps(content))


def no_mask(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [one for one in content["added_tokens"] if one["content"] != MASK]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    edit("tokenizer_config.json", added_tokens_decoder=None, extra_special_tokens=None)(folder)
    edit("tokenizer_config.json", additional_special_tokens=None)(folder)


def many_words(folder: Path) -> None:
    tokenizer = load_text_tokenizer(folder)
    tokenizer.add_tokens([f"wordy{number}" for number in range(200)])
    tokenizer.save_pretrained(folder)


WTE = "model.transformer.wte.weight"


@pytest.mark.parametrize(
    "damage, says",
    [
        (remove("config.json"), "config.json is missing"),
        (cut("config.json"), "config.json cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json holds no object"),
        (edit("config.json", model_type="gpt_oss"), "a model of type 'gpt_oss'; known are"),
        (edit("config.json", model_type=None), "a model of type None; known are"),
        (
            edit("config.json", vocab_size=None, embedding_size=None),
            "has no 'vocab_size', which a llada has",
        ),
        (edit("config.json", d_model=None), "none of the families|has no 'd_model'"),
        (edit("config.json", n_heads=None), "has no 'n_heads', which a llada has"),
        (edit("config.json", n_heads=0), "num_attention_heads must be a whole number from 1, not"),
        (edit("config.json", d_model="64"), "hidden_size must be a whole number from 1, not '64'"),
        (edit("config.json", eos_token_id=[1, 2]), r"eos_token_id = \[1, 2\]; one whole number"),
        (edit("config.json", block_type="sequential"), "has block_type = 'sequential'"),
        (
            edit("config.json", d_model=96),
            r"mismatched: .* is \[\d+.* in the file and \[\d+.* in the model",
        ),
        (
            edit("config.json", embedding_size=400),
            rf"2 of 21 tensors are mismatched: .*{WTE} is \[384, 64\] in the file and \[400, 64\]",
        ),
        (edit("config.json", n_layers=3), "9 of 30 tensors are missing: .*blocks.2|layers.2"),
        (edit("config.json", n_layers=1), "9 of 21 tensors are not the model's: .*blocks.1"),
        (remove("model.safetensors"), "model.safetensors is missing"),
        (only_pickles, "model.safetensors is missing.*weights in .bin files are not read"),
        (cut("model.safetensors"), "model.safetensors is damaged"),
        (remove("tokenizer.json"), "tokenizer.json is missing, and there are no vocab.json"),
        (remove("tokenizer_config.json"), "tokenizer_config.json is missing"),
        (cut("tokenizer.json"), "tokenizer.json is damaged"),
        (no_mask, r"the text tokenizer has no mask token: none of its \d+ ids is .* mask, \d+"),
        (edit("tokenizer_config.json", mask_token=END), "mask token .* has id 0, but the model's"),
        (edit("tokenizer_config.json", eos_token=None), "no end of text"),
        (edit("tokenizer_config.json", eos_token="a"), "end of text 'a' with id .* model's"),
        (many_words, r"text tokenizer has 4\d\d ids, but the model knows text ids up to 384"),
    ],
)
def test_a_broken_published_folder_is_one_sentence(
    publish: Any, damage: Callable[[Path], None], says: str
) -> None:
    folder, _ = publish("llada")
    damage(folder)
    error_of(lambda: load(folder), folder, says)


@pytest.mark.parametrize(
    "damage, says",
    [
        (
            remove("model-00002-of-00003.safetensors"),
            r"1 of 3 shards are missing \(model-00002-of-00003.safetensors, 7 of 21 tensors\)",
        ),
        (cut("model-00003-of-00003.safetensors"), "model-00003-of-00003.safetensors is damaged"),
        (cut(INDEX), "index.json cannot be read"),
        (edit(INDEX, weight_map=None), "has no weight_map"),
        (lost_tensor, r"1 of the 22 tensors in .* are in no shard \(model.transformer.blocks.2.q"),
    ],
)
def test_broken_shards_are_one_sentence(
    publish: Any, damage: Callable[[Path], None], says: str
) -> None:
    folder, _ = publish("llada", shards=3)
    damage(folder)
    error_of(lambda: load(folder), folder, says)


def test_shapes_are_compared_before_weights_are_read(
    publish: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = publish("llada")
    edit("config.json", n_layers=3)(folder)
    monkeypatch.setattr(
        stored_tensor.StoredTensor, "__getitem__", lambda *_: pytest.fail("weights were read")
    )
    error_of(lambda: AutoModel.from_pretrained(folder), folder, "9 of 30 tensors are missing")


def test_a_network_loads_without_a_tokenizer(publish: Any) -> None:
    folder, original = publish("llada")
    remove("tokenizer.json", "tokenizer_config.json")(folder)
    assert torch.equal(logits(AutoModel.from_pretrained(folder)), logits(original))
    error_of(lambda: load(folder), folder, "AutoModel.from_pretrained loads a network without one")


def test_a_layout_may_be_another_than_the_familys_usual_one(publish: Any, tmp_path: Path) -> None:
    folder, _ = publish("mmada")
    six_bits().save_pretrained(folder / "image_tokenizer")
    assert load(folder).prompt_template == Mmada()
    padded = mmdlm.load(folder, prompt_template=Mmada(attend_pads=True))
    assert padded.prompt_template == Mmada(attend_pads=True)
    assert padded.defaults == load(folder).defaults


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_a_device_that_is_not_there_is_said(publish: Any, device: str) -> None:
    folder, _ = publish("llada")
    with pytest.raises(ValueError, match=rf"device '{device}' cannot be used here .*take 'cpu'"):
        load(folder, device=device)


def test_a_folder_inside_the_folder_is_read(publish: Any, tmp_path: Path) -> None:
    folder, original = publish("llada")
    other = tmp_path / "repository"
    shutil.copytree(folder, other / "inner")
    shutil.copytree(folder, other, dirs_exist_ok=True)
    edit("config.json", n_layers=1)(other)
    read = AutoModel.from_pretrained(other, subfolder="inner")
    assert torch.equal(logits(read), logits(original))
    with pytest.raises(ValueError, match="variant: files of other names are not read"):
        AutoModel.from_pretrained(other / "inner", variant="fp16")


def test_an_empty_folder_is_said(tmp_path: Path) -> None:
    error_of(lambda: mmdlm.load(tmp_path), tmp_path, "config.json is missing")
    shutil.rmtree(tmp_path)
    with pytest.raises(ValueError, match="no model"):
        mmdlm.load(tmp_path)
