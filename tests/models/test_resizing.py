"""More ids, or fewer: rows and vocabulary follow, and no trained row is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from mmdlm.core.kernels.linear import Linear
from mmdlm.core.sequence import Batch, pack
from mmdlm.core.vocabulary import Vocabulary
from mmdlm.models.encoder import MmdlmEncoder
from mmdlm.models.encoder_config import MmdlmEncoderConfig
from mmdlm.models.resizing import resized
from tests.models.tiny import VOCABULARY, document, tiny_model

TEXT_ALONE = Vocabulary(size=40, text=(0, 40), image=(40, 40), mask_id=30, pad_id=1, eos_id=1)
# As a converted Qwen has it: rows that no token has, before the codes.
PADDED = Vocabulary(
    size=40,
    text=(0, 20),
    image=(34, 40),
    mask_id=19,
    pad_id=1,
    eos_id=1,
    begin_image_id=32,
    end_image_id=33,
)


def batch_of(vocabulary: Vocabulary) -> Batch:
    return pack([document(5, 4, seed=1)], vocabulary, length=12)


def moved(ids: torch.Tensor, old: Vocabulary, new: Vocabulary) -> torch.Tensor:
    """The same tokens under their new ids."""
    return torch.where(ids < old.text[1], ids, ids + new.text[1] - old.text[1])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("multiple", [None, 16])
def test_new_ids_continue_the_text_and_codes_move_on(
    tied: bool, multiple: int | None, tmp_path: Path
) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    before, batch = VOCABULARY, batch_of(VOCABULARY)
    with torch.no_grad():
        expected = model.lm_head(model.hidden(batch.ids, batch))
    rows = {"text": model.model.embed_tokens.weight[: before.text[1]].clone()}
    found = model.resize_token_embeddings(before.size + 3, pad_to_multiple_of=multiple)
    after = model.vocabulary
    assert found is model.model.embed_tokens
    assert found.num_embeddings == after.size == model.config.vocab_size
    assert after.size == (before.size + 3 if multiple is None else 48)
    assert after.text == (0, before.text[1] + 3)
    assert after.image_codes == before.image_codes
    assert after.mask_id == before.mask_id + 3
    assert after.eos_id == before.eos_id
    assert torch.equal(found.weight[: before.text[1]], rows["text"])
    assert type(model.lm_head) is Linear
    assert (model.lm_head.weight is found.weight) == tied

    ids = moved(batch.ids, before, after)
    old_ids = moved(torch.arange(before.size), before, after)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert again.vocabulary == after
    for one in (model, again):
        with torch.no_grad():
            logits = one.lm_head(one.hidden(ids, batch))
        torch.testing.assert_close(logits[..., old_ids], expected)


def test_ids_without_codes(tmp_path: Path) -> None:
    model = tiny_model(vocabulary=TEXT_ALONE.to_dict())
    model.resize_token_embeddings(45)
    assert model.vocabulary == Vocabulary(
        **{**TEXT_ALONE.to_dict(), "size": 45, "text": (0, 45), "image": (45, 45)}
    )
    model.resize_token_embeddings(35)  # rows at the end that the tokenizer does not use
    assert model.vocabulary.text == (0, 35)
    model.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).vocabulary == model.vocabulary


def test_rows_that_no_id_has_stay_before_the_codes() -> None:
    found = resized(PADDED, 43, rows=43)
    assert found.vocabulary.text == (0, 23)
    assert found.vocabulary.image == (37, 43)
    assert found.vocabulary.begin_image_id == 35
    assert found.order.tolist() == [*range(20), 40, 41, 42, *range(20, 40)]


@pytest.mark.parametrize(
    ("vocabulary", "count"), [(VOCABULARY, 30), (VOCABULARY, 39), (TEXT_ALONE, 30), (PADDED, 22)]
)
def test_ids_that_the_model_uses_are_not_lost(vocabulary: Vocabulary, count: int) -> None:
    """`len(tokenizer)` is less than all ids where codes stand behind the text."""
    model = tiny_model(vocabulary=vocabulary.to_dict())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=rf"resize_token_embeddings\({count}\) would lose.*give \d+ \+ N"
    ):
        model.resize_token_embeddings(count)
    assert model.vocabulary == vocabulary
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_nothing_is_asked_for() -> None:
    model = tiny_model()
    before = model.model.embed_tokens.weight.clone()
    assert torch.equal(model.resize_token_embeddings().weight, before)
    assert model.vocabulary == VOCABULARY


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_an_encoder_follows_too(kind: str, tmp_path: Path) -> None:
    shape: dict[str, Any] = {
        "model_type": kind,
        "vocab_size": VOCABULARY.size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 1,
    }
    config = MmdlmEncoderConfig(vocabulary=VOCABULARY.to_dict(), encoder=shape)
    model = MmdlmEncoder(config).eval()
    batch = batch_of(VOCABULARY)
    everywhere = torch.ones_like(batch.target)
    expected = model.logits_at(model.hidden(batch.ids, batch), everywhere)
    model.resize_token_embeddings(VOCABULARY.size + 3)
    model.save_pretrained(tmp_path)
    again = MmdlmEncoder.from_pretrained(tmp_path).eval()
    after = again.vocabulary
    assert after == model.vocabulary
    assert after.text == (0, VOCABULARY.text[1] + 3)
    ids = moved(batch.ids, VOCABULARY, after)
    old_ids = moved(torch.arange(VOCABULARY.size), VOCABULARY, after)
    for one in (model, again):
        logits = one.logits_at(one.hidden(ids, batch), everywhere)
        torch.testing.assert_close(logits[:, old_ids], expected)
