"""AutoProcessor and AutoModelForImageTextToText against our own pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

import mmdlm
import mmdlm.integrations
from mmdlm.core.vocabulary import Vocabulary
from mmdlm.integrations.collator import MaskedDiffusionCollator
from mmdlm.integrations.processor import MmdlmProcessor
from mmdlm.models.configuration import MmdlmConfig
from mmdlm.models.modeling import MmdlmForMaskedDiffusion
from mmdlm.templates.chat_template import PLAIN
from mmdlm.vision.encoders.adapter import VisionConfig
from tests.models.test_transformers_call import ANYRES, SIGLIP, image

QUESTION = "red heart"


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that sees, with random weights."""
    found = tmp_path_factory.mktemp("seeing")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_checkpoint)
    tokenizer.chat_template = PLAIN
    vocabulary = Vocabulary.build(text_size=len(tokenizer), eos_id=tokenizer.eos_token_id)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MmdlmForMaskedDiffusion(
            MmdlmConfig(
                vocabulary=vocabulary.to_dict(),
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                initializer_range=0.5,
                vision=VisionConfig(tower=SIGLIP, tiling=ANYRES).to_dict(),
            )
        )
    model.save_pretrained(found)
    tokenizer.save_pretrained(found)
    return found


def asked(*images: Image.Image) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": one} for one in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]


@torch.no_grad()
def test_a_question_about_images_has_the_answer_of_our_own_model(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert isinstance(processor, MmdlmProcessor)
    ours = mmdlm.load(folder)
    picture = image(12, 9)
    inputs = processor.apply_chat_template(asked(picture))
    written = model.generate(**inputs, max_new_tokens=6)
    theirs = ours.chat(
        [{"role": "user", "content": f"<image>{QUESTION}"}],
        images=[picture],
        max_new_tokens=6,
        num_inference_steps=6,
    )
    new = written[0, inputs["input_ids"].shape[1] :]
    text = processor.decode(new, skip_special_tokens=False).split("<|endoftext|>")[0]
    assert text.strip() == theirs
    several = processor.apply_chat_template([asked(image(8, 8), picture), asked(picture)])
    assert several["batch_num_images"].tolist() == [2, 1]
    assert several["attention_mask"][:, -1].tolist() == [1, 1]
    logits = model(**several).logits
    alone = model(**inputs).logits
    torch.testing.assert_close(logits[1, -alone.shape[1] :], alone[0], atol=1e-4, rtol=1e-4)


def test_texts_as_they_are(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    batch = processor(image(8, 8), "<image> red heart")
    slots = int(batch["mm_token_type_ids"].sum())
    assert slots == ANYRES.layout(8, 8).slots
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert batch["input_ids"][0, slots:].tolist() == tokenizer.encode(" red heart")
    assert set(processor(text=["red", "red heart"]).keys()) == {"input_ids", "attention_mask"}
    with pytest.raises(ValueError, match="1 <image>, but 2 images"):
        processor([image(8, 8), image(8, 8)], "<image> red")
    with pytest.raises(ValueError, match="no part of a message"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])
    with pytest.raises(ValueError, match="URL"):
        processor("https://example.org/a.png", "<image>")


def test_a_model_of_text_says_that_it_sees_nothing(tiny_checkpoint: Path) -> None:
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    with pytest.raises(ValueError, match="no vision adapter"):
        processor(image(8, 8), "<image>")


def test_examples_with_images_are_collated(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    examples = []
    for pictures in ([image(12, 9)], [image(8, 8), image(9, 12)], []):
        given = processor.apply_chat_template(asked(*pictures))
        one = {name: value for name, value in given.items() if name != "batch_num_images"}
        for name in ("input_ids", "mm_token_type_ids"):
            if name in one:
                one[name] = one[name][0]
        del one["attention_mask"]
        marks = torch.zeros_like(one["input_ids"])
        marks[-3:] = 1
        examples.append({**one, "completion_mask": marks})
    model = MmdlmForMaskedDiffusion.from_pretrained(folder)
    batch = MaskedDiffusionCollator(model.vocabulary)(examples)
    assert batch["batch_num_images"].tolist() == [1, 2, 0]
    loss = model(**batch).loss
    loss.backward()
    assert model.vision.projector[0].weight.grad is not None or float(loss) == 0
