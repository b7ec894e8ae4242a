"""Published encoders as denoisers: alone, padded and packed they say what they said before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    CamembertConfig,
    EuroBertConfig,
    ModernBertConfig,
    PreTrainedConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from mmdlm.core.sequence import Batch, Sequence, collate, feature_segment, pack, text_segment
from mmdlm.core.vocabulary import Vocabulary
from mmdlm.models.encoder import MmdlmEncoder
from mmdlm.models.encoder_config import MmdlmEncoderConfig

SIZE = 48
WORDS = Vocabulary(size=SIZE, text=(0, SIZE), image=(SIZE, SIZE), mask_id=4, pad_id=1, eos_id=2)
TINY = {
    "vocab_size": SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
CONFIGS: list[PreTrainedConfig] = [
    BertConfig(**TINY),
    RobertaConfig(**TINY),
    XLMRobertaConfig(**TINY),
    CamembertConfig(**TINY),
    ModernBertConfig(**TINY, local_attention=6, global_attn_every_n_layers=2),
    EuroBertConfig(**TINY, num_key_value_heads=4),
]
KINDS = [config.model_type for config in CONFIGS]


def tiny(config: PreTrainedConfig, *, attention: str = "sdpa", seed: int = 0) -> MmdlmEncoder:
    """In eval mode; no parameter is zero or one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ours = MmdlmEncoderConfig(vocabulary=WORDS.to_dict(), encoder=config.to_dict())
        ours._attn_implementation = attention
        model = MmdlmEncoder(ours)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def texts(*lengths: int) -> list[Sequence]:
    generator = torch.Generator().manual_seed(1)
    return [
        Sequence((text_segment(torch.randint(5, SIZE, (n,), generator=generator), target=True),))
        for n in lengths
    ]


def logits(model: MmdlmEncoder, batch: Batch) -> torch.Tensor:
    """[M, V] at the targets, row by row."""
    return model.logits_at(model.hidden(batch.ids, batch), batch.target)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("config", CONFIGS, ids=KINDS)
@torch.no_grad()
def test_a_text_alone_gives_the_logits_of_the_original(
    config: PreTrainedConfig, attention: str
) -> None:
    model = tiny(config, attention=attention)
    (text,) = texts(20)
    ids = text.segments[0].ids[None]
    expected = model.encoder(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=0)
    batch = collate([text], WORDS)
    torch.testing.assert_close(logits(model, batch), expected[0], atol=1e-5, rtol=0)
    part = model.logits_at(model.hidden(batch.ids, batch), batch.target, ids=(7, 30))
    torch.testing.assert_close(part, expected[0, :, 7:30], atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("config", CONFIGS, ids=KINDS)
@torch.no_grad()
def test_padded_and_packed_rows_have_the_logits_that_they_have_alone(
    config: PreTrainedConfig, attention: str
) -> None:
    """Local layers included: 20 tokens are more than ModernBERT's window of 3 to either side."""
    model = tiny(config, attention=attention)
    documents = texts(20, 13, 5)
    alone = torch.cat([logits(model, collate([one], WORDS)) for one in documents])
    padded = collate(documents, WORDS, length=24)
    torch.testing.assert_close(logits(model, padded), alone, atol=1e-5, rtol=0)
    packed = pack(documents, WORDS, length=41)
    assert len(packed) == 1
    torch.testing.assert_close(logits(model, packed), alone, atol=1e-5, rtol=0)

    ids = torch.full((1, 24), WORDS.pad_id)
    ids[0, 4:] = documents[0].segments[0].ids  # padded on the left
    mask = torch.arange(24)[None] >= 4
    left = model(ids, attention_mask=mask.long()).logits[0, 4:]
    torch.testing.assert_close(left, alone[:20], atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", CONFIGS, ids=KINDS)
def test_it_is_stored_and_read(config: PreTrainedConfig, tmp_path: Path) -> None:
    model = tiny(config)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert isinstance(again, MmdlmEncoder)
    assert isinstance(AutoModelForMaskedLM.from_pretrained(tmp_path), MmdlmEncoder)
    assert AutoConfig.from_pretrained(tmp_path).encoder.model_type == config.model_type
    assert again.vocabulary == WORDS
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    decoder = again.encoder.get_output_embeddings()
    assert (decoder.weight is again.get_input_embeddings().weight) == config.tie_word_embeddings


def test_no_tensor_is_made_up(tmp_path: Path) -> None:
    model = tiny(CONFIGS[0])
    state = model.state_dict()
    state.pop("encoder.bert.encoder.layer.0.attention.self.query.weight")
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"1 missing keys: .*layer\.0\.attention\.self\.query"):
        MmdlmEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("config", CONFIGS, ids=KINDS)
def test_it_trains_with_recomputed_activations(config: PreTrainedConfig) -> None:
    """The gradients are the same, and each parameter has one."""
    batch = pack(texts(9, 7, 4), WORDS, length=20)
    gradients = []
    for recompute in (False, True):
        model = tiny(config).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if recompute:
            model.gradient_checkpointing_enable()
        logits(model, batch).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert not [name for name, gradient in gradients[0].items() if gradient is None]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("config", CONFIGS, ids=KINDS)
def test_layers_are_what_is_sharded_apart(config: PreTrainedConfig) -> None:
    model = tiny(config)
    (name,) = model._no_split_modules
    assert sum(type(module).__name__ == name for module in model.modules()) == 4


def test_images_are_refused() -> None:
    model = tiny(CONFIGS[0])
    batch = collate([Sequence((feature_segment(torch.zeros(2, 32), WORDS),))], WORDS)
    with pytest.raises(ValueError, match="sees no images"):
        model.hidden(batch.ids, batch)


def test_what_is_no_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match="'gpt2' is not known here; known are bert, roberta"):
        MmdlmEncoderConfig(vocabulary=WORDS.to_dict(), encoder={"model_type": "gpt2"})
    with pytest.raises(ValueError, match="is_decoder = true"):
        MmdlmEncoderConfig(
            vocabulary=WORDS.to_dict(), encoder={**TINY, "model_type": "bert", "is_decoder": True}
        )


def test_the_longest_document_leaves_out_the_offset_of_positions() -> None:
    assert tiny(CONFIGS[0]).config.max_position_embeddings == 64
    model = tiny(CONFIGS[1])
    assert model.config.max_position_embeddings == 62
    assert torch.isfinite(logits(model, collate(texts(62), WORDS))).all()
