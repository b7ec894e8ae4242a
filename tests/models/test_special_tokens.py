"""Tokenizers that are written know mask and padding by name, and text by its own ids."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast, pipeline

import mmdlm
from mmdlm.core.vocabulary import Vocabulary
from mmdlm.models.special_tokens import of_text_only, with_special_tokens


@pytest.fixture(scope="module")
def saved(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    mmdlm.load(tiny_checkpoint).save_pretrained(folder)
    return folder


def test_a_saved_tokenizer_has_the_ids_of_the_vocabulary(
    tiny_checkpoint: Path, saved: Path
) -> None:
    before = PreTrainedTokenizerFast.from_pretrained(tiny_checkpoint)
    tokenizer, model = AutoTokenizer.from_pretrained(saved), mmdlm.load(saved)
    vocabulary = model.denoiser.vocabulary
    assert tokenizer.mask_token_id == vocabulary.mask_id
    assert tokenizer.pad_token_id == vocabulary.pad_id
    assert len(tokenizer) == len(before) + 2
    assert before.mask_token is None
    again = with_special_tokens(tokenizer, vocabulary)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_our_own_code_sees_the_text_only(tiny_checkpoint: Path, saved: Path) -> None:
    before, after = mmdlm.load(tiny_checkpoint).text_tokenizer, mmdlm.load(saved).text_tokenizer
    assert after.get_vocab() == before.get_vocab()
    assert len(after) == len(before)
    assert after.mask_token is after.pad_token is None
    assert after.add_tokens(["zeppelin"]) == 1
    assert after.convert_tokens_to_ids("zeppelin") == len(before)
    assert of_text_only(before) is before


def test_a_saved_model_writes_what_it_wrote(tiny_checkpoint: Path, saved: Path) -> None:
    one, other = mmdlm.load(tiny_checkpoint), mmdlm.load(saved)
    assert one.infill("red [MASK:3]") == other.infill("red [MASK:3]")
    words = "[MASK] [PAD] are words"
    assert one.codec.encode(words) == other.codec.encode(words)


def test_ids_that_a_tokenizer_knows_keep_their_names(tiny_checkpoint: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_checkpoint)
    size = len(tokenizer)
    inside = Vocabulary(
        size=size, text=(0, size), image=(size, size), mask_id=5, pad_id=0, eos_id=0
    )
    found = with_special_tokens(tokenizer, inside)
    assert len(found) == size
    assert found.mask_token == tokenizer.convert_ids_to_tokens(5)
    assert found.pad_token == tokenizer.eos_token
    behind = Vocabulary(
        size=size + 9, text=(0, size), image=(size, size), mask_id=size + 7, pad_id=0, eos_id=0
    )
    assert with_special_tokens(tokenizer, behind).mask_token is None


def test_fill_mask(saved: Path) -> None:
    model, tokenizer = (
        AutoModelForMaskedLM.from_pretrained(saved),
        AutoTokenizer.from_pretrained(saved),
    )
    fill = pipeline("fill-mask", model=model, tokenizer=tokenizer)
    found = fill(f"red {tokenizer.mask_token}", top_k=3)
    ids = torch.tensor([tokenizer.encode(f"red {tokenizer.mask_token}")])
    logits = model(ids).logits[0, ids[0] == tokenizer.mask_token_id][0]
    assert [one["token"] for one in found] == logits.topk(3).indices.tolist()
    assert found[0]["score"] == pytest.approx(float(logits.softmax(-1).max()), rel=1e-4)
