"""Dimple's conversations, token for token, and an answer about images from end to end."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

from mmdlm.core.vocabulary import Modality
from mmdlm.models.configuration import MmdlmConfig
from mmdlm.models.modeling import MmdlmForMaskedDiffusion
from mmdlm.pipeline.generation_config import GenerationConfig
from mmdlm.pipeline.model import Model
from mmdlm.templates.conversation import turns_of
from mmdlm.templates.dimple import Dimple
from mmdlm.vision.encoders.adapter import VisionConfig
from mmdlm.vision.encoders.natural import Rounded
from tests.templates.tiny import Script, ids_of, targets_of, words_of

TILING = Rounded(patch=4, min_pixels=16, max_pixels=400)
TOWER = {
    "model_type": "qwen2_5_vl_vision",
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 2,
    "window_size": 8,
    "out_hidden_size": 12,
    "fullatt_block_indexes": [1],
}
WIDE, HIGH = Image.new("RGB", (12, 8), "red"), Image.new("RGB", (4, 12), "blue")
START, END, LOOK, LOOKED = "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"


def test_each_image_stands_between_its_markers() -> None:
    words = words_of("dimple")
    write, pad = Script(words), words.vocabulary.pad_id
    messages = [
        {"role": "user", "content": "<image>Which is <image>?"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "why?"},
    ]
    turns = turns_of(messages, TILING.views([WIDE, HIGH]))
    ask = Dimple().chat_prompt(words, turns, length=2)
    prompt = write.of(
        *(START, "system\nYou are a helpful assistant.", END, "\n", START, "user\n"),
        *(LOOK, *[pad] * 6, LOOKED, "Which is ", LOOK, *[pad] * 3, LOOKED, "?", END, "\n"),
        *(START, "assistant\nb", END, "\n", START, "user\nwhy?", END, "\n", START, "assistant\n"),
    )
    assert ids_of(ask.sequence) == [*prompt, *[write.mask] * 2]
    assert targets_of(ask.sequence) == [len(prompt), len(prompt) + 1]
    seen = [s for s in ask.sequence.segments if s.modality == Modality.FEATURE]
    assert [len(segment.ids) for segment in seen] == [6, 3]


def test_a_description_is_filled_in_up_to_the_end_of_text() -> None:
    words = words_of("dimple")
    write = Script(words)
    (image,) = TILING.views([WIDE])
    ask = Dimple().infill_prompt(words, "A [MASK].", image=image)
    prompt = ids_of(Dimple().caption_prompt(words, image, length=0).sequence)
    assert ids_of(ask.sequence) == [*prompt, *write.of("A", write.mask, ".", write.eos)]
    assert Dimple().infill_prompt(words, "A [MASK]").sequence.segments[0].ids.tolist() == [
        write.eos
    ]


@pytest.fixture
def model() -> Model:
    words = words_of("dimple")
    vision = VisionConfig(TOWER, TILING, select_layer="final", projector="mlp2x_silu")
    config = MmdlmConfig(
        vocabulary=words.vocabulary.to_dict(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        rope_sections=[2, 3, 3],
        attention_bias=True,
        shift=True,
        initializer_range=0.5,
        vision=vision.to_dict(),
    )
    torch.manual_seed(0)
    denoiser = MmdlmForMaskedDiffusion(config).double().eval()
    assert denoiser.vision is not None
    denoiser.vision.projector[2].weight.data *= 20  # so that images count
    return Model(denoiser, words.tokenizer, prompt_template=Dimple())


def test_several_images_are_described_as_each_alone(model: Model) -> None:
    asks = [
        model.prompt_template.caption_prompt(model.codec, image, length=8)
        for image in TILING.views([WIDE, HIGH])
    ]
    together = model.text_run(asks, GenerationConfig(4), None).texts()
    assert together == [
        text for ask in asks for text in model.text_run([ask], GenerationConfig(4), None).texts()
    ]
    assert together[0] != together[1]
    assert len(model.caption([WIDE, HIGH], num_inference_steps=4)) == 2  # as it was published


def test_its_tokenizer_may_end_a_text_as_a_turn(model: Model) -> None:
    model.text_tokenizer.eos_token = END  # the published one does, and config.json does not
    again = replace(model, text_tokenizer=model.text_tokenizer)
    ids = torch.tensor(Script(model.codec).of("a", model.codec.vocabulary.eos_id, "b"))
    assert again.prompt_template.decode(again.codec, ids) == "a"
    model.text_tokenizer.eos_token = LOOK
    with pytest.raises(ValueError, match=r"has the end of text '<\|vision_start\|>'"):
        replace(model, text_tokenizer=model.text_tokenizer)


def test_guidance_compares_with_a_text_that_has_no_image(model: Model) -> None:
    (image,) = TILING.views([WIDE])
    ask = model.prompt_template.caption_prompt(model.codec, image, length=4)
    plain, guided = (
        model.text_run(
            [ask], GenerationConfig(4, guidance_scale=scale), torch.Generator().manual_seed(0)
        ).texts()
        for scale in (1.0, 5.0)
    )
    assert plain != guided
