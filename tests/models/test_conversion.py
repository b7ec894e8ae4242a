"""A model that is converted says what it said before, and has room for what is new."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, PreTrainedTokenizerFast

from mmdlm.core.sequence import Sequence, collate, pack, text_segment
from mmdlm.models.checkpoints.autoregressive import shape_of_autoregressive
from mmdlm.models.checkpoints.to_diffusion import convert_to_diffusion
from mmdlm.models.configuration import MmdlmConfig
from mmdlm.models.encoder import MmdlmEncoder
from mmdlm.models.modeling import MmdlmForMaskedDiffusion
from mmdlm.pipeline import convert as formats
from tests.models.foreign import LLAMA3, autoregressive, encoder

MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 500_000.0}, "head_dim": 16}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 128, "num_key_value_heads": 1}),
    ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    ("qwen2", {"tie_word_embeddings": True}),
    (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 1e6,
            }
        },
    ),
    ("qwen3", {"head_dim": 16}),
    ("qwen3", {"tie_word_embeddings": True, "head_dim": 8}),
]


def convert(source: Path, out: Path, **options: Any) -> Any:
    """Convert, and read with `AutoModel`."""
    steps = list(convert_to_diffusion(source, out, **options))
    assert steps[-1][0] == steps[-1][1] == len(steps)
    return AutoModel.from_pretrained(out)


def texts(*lengths: int, stop: int) -> list[Sequence]:
    generator = torch.Generator().manual_seed(1)
    return [
        Sequence((text_segment(torch.randint(stop, (n,), generator=generator), target=True),))
        for n in lengths
    ]


@pytest.mark.parametrize("kind, options", MODELS)
@torch.no_grad()
def test_looking_left_alone_it_is_the_autoregressive_model(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    original = autoregressive(kind, tmp_path / "theirs", **options)
    ours = convert(tmp_path / "theirs", tmp_path / "ours")
    assert isinstance(ours, MmdlmForMaskedDiffusion)
    documents = texts(60, 21, 9, stop=270)
    batch = pack(documents, ours.vocabulary, length=60)
    causal = torch.zeros(len(batch), dtype=torch.int64)
    hidden = ours.model(ours.model.embed_tokens(batch.ids), batch.position, batch.document, causal)
    logits = ours.lm_head(hidden)
    for row in range(len(batch)):
        for number in range(int(batch.document[row].max()) + 1):
            here = batch.document[row] == number
            expected = original(batch.ids[row, here][None], output_hidden_states=True)
            torch.testing.assert_close(
                hidden[row, here], expected.hidden_states[-1][0], atol=1e-5, rtol=1e-5
            )
            torch.testing.assert_close(logits[row, here], expected.logits[0], atol=2e-5, rtol=1e-5)

    shifted = ours.hidden(batch.ids, replace(batch, lookahead=causal))
    first = batch.position == 0
    torch.testing.assert_close(shifted[first], hidden[first])
    inside = ~first & ~batch.is_padding
    torch.testing.assert_close(shifted[inside], hidden.roll(1, dims=1)[inside])


@torch.no_grad()
def test_in_blocks_of_one_token_it_is_the_autoregressive_model(tmp_path: Path) -> None:
    """A model of block diffusion that SDAR's format can say."""
    original = autoregressive("qwen3", tmp_path / "theirs", tie_word_embeddings=False)
    ours = convert(tmp_path / "theirs", tmp_path / "ours", shift=False, block_length=1)
    ids = torch.arange(4, 24)[None]
    torch.testing.assert_close(ours(ids).logits, original(ids).logits, atol=2e-5, rtol=1e-5)
    list(formats.convert(tmp_path / "ours", tmp_path / "sdar", to="sdar"))
    config = json.loads((tmp_path / "sdar" / "config.json").read_text())
    assert (config["model_type"], config["block_size"]) == ("sdar", 1)
    again = AutoModel.from_pretrained(tmp_path / "sdar")
    assert torch.equal(again(ids).logits, ours(ids).logits)


def test_an_encoder_has_no_blocks(tmp_path: Path) -> None:
    encoder("bert", tmp_path / "theirs")
    with pytest.raises(
        ValueError, match="block_length=4 is for autoregressive models, not .*'bert'"
    ):
        convert(tmp_path / "theirs", tmp_path / "ours", block_length=4)


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
@torch.no_grad()
def test_an_encoder_keeps_its_logits(kind: str, tmp_path: Path) -> None:
    original = encoder(kind, tmp_path / "theirs")
    ours = convert(tmp_path / "theirs", tmp_path / "ours")
    assert isinstance(ours, MmdlmEncoder)
    (text,) = texts(30, stop=60)
    batch = collate([text], ours.vocabulary)
    logits = ours.logits_at(ours.hidden(batch.ids, batch), batch.target)
    torch.testing.assert_close(logits, original(batch.ids).logits[0], atol=1e-5, rtol=0)
    words = PreTrainedTokenizerFast.from_pretrained(tmp_path / "ours")
    assert words.mask_token_id == ours.vocabulary.mask_id == 4
    assert words.eos_token_id == ours.vocabulary.eos_id == 3  # [SEP]


@pytest.mark.parametrize("only_words", [False, True])
def test_special_tokens_that_only_the_tokenizers_class_knows(
    only_words: bool, tmp_path: Path
) -> None:
    """As google-bert/bert-base-uncased was published: no word of a mask in its files."""
    encoder("bert", tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    if only_words:
        pipeline = json.loads((tmp_path / "theirs" / "tokenizer.json").read_text())
        words = sorted(pipeline["model"]["vocab"].items(), key=lambda item: item[1])
        (tmp_path / "theirs" / "vocab.txt").write_text("\n".join(word for word, _ in words))
        (tmp_path / "theirs" / "tokenizer.json").unlink()
    ours = convert(tmp_path / "theirs", tmp_path / "ours")
    words = PreTrainedTokenizerFast.from_pretrained(tmp_path / "ours")
    assert (words.mask_token, words.eos_token, words.pad_token) == ("[MASK]", "[SEP]", "[PAD]")
    assert words.mask_token_id == ours.vocabulary.mask_id == 4
    assert words.encode("red [MASK] heart", add_special_tokens=False)[1] == 4


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    found = {}
    for shard in folder.glob("*.safetensors"):
        found.update(load_file(shard))
    return found


@pytest.mark.parametrize("spare", [5, 0])
@pytest.mark.parametrize("tied", [False, True])
def test_a_mask_takes_a_free_row_or_the_mean_of_all(spare: int, tied: bool, tmp_path: Path) -> None:
    autoregressive(
        "qwen2",
        tmp_path / "theirs",
        spare=spare,
        tie_word_embeddings=tied,
        dtype=torch.bfloat16,
    )
    ours = convert(tmp_path / "theirs", tmp_path / "ours")
    before, after = stored(tmp_path / "theirs"), stored(tmp_path / "ours")
    assert before.keys() == after.keys()
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    known = len(PreTrainedTokenizerFast.from_pretrained(tmp_path / "theirs"))
    words = PreTrainedTokenizerFast.from_pretrained(tmp_path / "ours")
    assert ours.vocabulary.mask_id == words.mask_token_id == known
    assert len(words) == known + 1 == ours.vocabulary.text[1]
    assert words.encode("red heart<|mask|>")[-1] == known
    for name, tensor in before.items():
        assert torch.equal(after[name][: len(tensor)], tensor), name
        if len(after[name]) != len(tensor):
            assert spare == 0
            assert len(after[name]) == known + 1
            torch.testing.assert_close(
                after[name][-1].float(), tensor.float().mean(0), atol=1e-2, rtol=1e-2
            )


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_image_codes_are_appended(kind: str, tmp_path: Path) -> None:
    if kind == "bert":
        encoder("bert", tmp_path / "theirs")
    else:
        autoregressive("llama", tmp_path / "theirs", spare=0)
    ours = convert(tmp_path / "theirs", tmp_path / "ours", image_codes=10)
    words = ours.vocabulary
    assert words.image_codes == 10
    assert words.size == words.image[1]
    embeddings = ("embed_tokens.weight", "word_embeddings.weight")
    (rows,) = (t for name, t in stored(tmp_path / "ours").items() if name.endswith(embeddings))
    assert len(rows) == words.size
    new, old = rows[words.image[0] :], rows[: words.text[1]]
    assert 0 < (new - old.mean(0)).std() < 0.5 * old.std()
    again = convert(tmp_path / "theirs", tmp_path / "again", image_codes=10)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_berts_first_names_and_other_heads_are_read(tmp_path: Path) -> None:
    encoder("bert", tmp_path / "theirs")
    tensors = stored(tmp_path / "theirs")
    for file in (tmp_path / "theirs").glob("*.safetensors*"):
        file.unlink()
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta"): t
        for name, t in tensors.items()
    }
    old["cls.seq_relationship.weight"] = torch.zeros(2, 32)
    old["bert.pooler.dense.weight"] = torch.zeros(32, 32)
    old["bert.embeddings.position_ids"] = torch.arange(128)[None]
    save_file(old, tmp_path / "theirs" / "model.safetensors")
    ours = convert(tmp_path / "theirs", tmp_path / "ours")
    for name, tensor in tensors.items():
        assert torch.equal(ours.encoder.state_dict()[name], tensor), name


QWEN = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}


def test_published_configs_read_as_they_are_written() -> None:
    """As transformers 4 wrote them: Qwen2.5-0.5B and Llama-3.2-1B."""
    qwen = shape_of_autoregressive(QWEN)
    assert qwen["attention_bias"]
    assert qwen["rope_theta"] == 1e6
    assert qwen["rope_scaling"] is None
    assert qwen["num_key_value_heads"] == 2
    llama = shape_of_autoregressive(LLAMA)
    assert not llama["attention_bias"]
    assert llama["rope_theta"] == 5e5
    assert llama["rope_scaling"] == LLAMA["rope_scaling"]
    assert (llama["head_dim"], llama["rms_norm_eps"]) == (64, 1e-5)
    older = {**LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}}
    assert shape_of_autoregressive(older)["rope_scaling"]["rope_type"] == "linear"
    with pytest.raises(ValueError, match="sliding_window = 4096 and max_position_embeddings"):
        shape_of_autoregressive({**LLAMA, "model_type": "mistral", "sliding_window": 4096})


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"attention_bias": True}, "attention_bias = True"),
    ("llama", {"mlp_bias": True}, "mlp_bias = True"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    ("qwen3", {"attention_bias": True}, "attention_bias = True"),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "sliding_attention"),
    ("mistral", {}, "sliding_window = 4096"),
    ("mistral", {"sliding_window": 16}, "sliding_window = 16"),
    ("qwen2", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("mixtral", {}, "'mixtral' is not known here; known are llama, mistral"),
]


@pytest.mark.parametrize("kind, options, message", REFUSED)
def test_what_the_transformer_does_not_do_is_named(
    kind: str, options: dict[str, Any], message: str
) -> None:
    config = {
        "model_type": kind,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        **options,
    }
    with pytest.raises(ValueError, match=message):
        MmdlmConfig(**shape_of_autoregressive(config))


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    def fails(message: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            list(convert_to_diffusion(tmp_path / "theirs", tmp_path / "ours", **options))
        assert not (tmp_path / "ours").exists()

    autoregressive("llama", tmp_path / "theirs")
    fails("image_codes is -1", image_codes=-1)
    config = tmp_path / "theirs" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "model_type": "gpt2"}))
    fails("'gpt2' cannot become a denoiser, unless it is one already; known are llama")
    config.write_text(json.dumps({**content, "num_hidden_layers": 3}))
    fails("lacks 9 tensors .model.layers.2")
    config.write_text(json.dumps({**content, "num_hidden_layers": 1}))
    fails("has beyond the model 9 tensors")
    config.write_text(json.dumps({**content, "intermediate_size": 40}))
    fails(r"of shape \(48, 32\), which does not fit config.json \(\(40, 32\)\)")
    config.write_text(json.dumps({**content, "tie_word_embeddings": True}))
    fails("tie_word_embeddings, but lm_head.weight and model.embed_tokens.weight differ")
    config.write_text(json.dumps({**content, "vocab_size": 200}))
    fails("but the embedding 200 rows")
    config.write_text(json.dumps(content))
    convert(tmp_path / "theirs", tmp_path / "ours")
    with pytest.raises(ValueError, match="exists already"):
        list(convert_to_diffusion(tmp_path / "theirs", tmp_path / "ours"))
    with pytest.raises(ValueError, match="'mmdlm' cannot become a denoiser, unless it is one"):
        list(convert_to_diffusion(tmp_path / "ours", tmp_path / "again"))
