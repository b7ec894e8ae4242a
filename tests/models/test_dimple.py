"""Dimple's vision tower and positions against transformers' Qwen2.5-VL, where they come from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2_5_VLVisionConfig,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mmdlm.core.sequence import (
    Batch,
    Sequence,
    collate,
    feature_segment,
    image_segment,
    pack,
    text_segment,
)
from mmdlm.core.vocabulary import Modality
from mmdlm.models.configuration import MmdlmConfig, read_config
from mmdlm.models.families.auto import family_named
from mmdlm.models.modeling import MmdlmForMaskedDiffusion

VISION = {
    "depth": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 12,
    "fullatt_block_indexes": [1],
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "vocab_size": 64,
}
SECTIONS = [2, 3, 3]
PUBLISHED = {
    **TEXT,
    "model_type": "dimple",
    "rope_theta": 1000000.0,
    "mrope_section": SECTIONS,
    "mask_token_id": 62,
    "vision_config": VISION,
}
PAD = 55  # stands for <|image_pad|>


@pytest.fixture
def model() -> MmdlmForMaskedDiffusion:
    torch.manual_seed(0)
    model = MmdlmForMaskedDiffusion(read_config(PUBLISHED)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def noise(width: int, height: int) -> Image.Image:
    levels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3))
    return Image.fromarray(levels.astype(np.uint8))


IMAGES = [noise(100, 60), noise(640, 480), noise(30, 170)]


def document(model: MmdlmForMaskedDiffusion, images: list[Image.Image]) -> Sequence:
    """Text, an image, text, another ... text."""
    assert model.vision is not None
    segments = [text_segment([1, 2, 3])]
    for n, views in enumerate(model.vision.config.tiling.views(images)):
        segments += [
            image_segment(views, model.vocabulary),
            text_segment([7 + n, 8], target=True),
        ]
    return Sequence(tuple(segments))


def qwen_grids(images: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches [P, 3 * 2 * 14 * 14] and grids [N, 3] of the published processor."""
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 336**2})
    inputs = processor(images, return_tensors="pt")
    return inputs["pixel_values"], inputs["image_grid_thw"]


def weights(model: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """Tensors of a part of a model, by their names in it."""
    state = model.state_dict()
    return {name[len(prefix) :]: state[name] for name in state if name.startswith(prefix)}


@torch.no_grad()
def test_images_are_seen_as_by_qwen_and_projected_with_a_silu(model) -> None:
    tower = Qwen2_5_VisionTransformerPretrainedModel(Qwen2_5_VLVisionConfig(**VISION)).eval()
    tower.load_state_dict(weights(model, "vision.tower."))
    theirs = {
        family_named("dimple").weights.reversed(name): tensor
        for name, tensor in model.state_dict().items()
    }
    first, second = nn.Linear(12, 32), nn.Linear(32, 32)
    for number, linear in ((1, first), (2, second)):
        linear.weight.copy_(theirs[f"img_projector.linear_{number}.weight"])
        linear.bias.copy_(theirs[f"img_projector.linear_{number}.bias"])
    expected = second(nn.functional.silu(first(tower(*qwen_grids(IMAGES)).pooler_output)))
    features = model.vision(model.vision.config.tiling.views(IMAGES))
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=0)


def positions(batch: Batch) -> torch.Tensor:
    """[3, 1, L], as Qwen2.5-VL counts them for the one document of a batch."""
    vision = {"spatial_merge_size": 2}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "num_hidden_layers": 1},
        vision_config={**VISION, **vision, "depth": 1},
        image_token_id=PAD,
    )
    seen = batch.of(Modality.FEATURE)
    ids = batch.ids.masked_fill(seen, PAD)
    _, grids = qwen_grids(IMAGES)
    place, _ = Qwen2_5_VLModel(config).get_rope_index(ids, seen.int(), image_grid_thw=grids)
    return place


@torch.no_grad()
def test_hidden_states_are_those_of_qwen_without_its_causal_mask(model) -> None:
    config = Qwen2_5_VLTextConfig(
        **TEXT,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1000000.0,
            "mrope_section": SECTIONS,
        },
    )
    qwen = Qwen2_5_VLTextModel(config).eval()
    qwen.load_state_dict(weights(model, "model."))
    batch = model.see(collate([document(model, IMAGES)], model.vocabulary))
    place = positions(batch)
    assert batch.axes is not None
    assert torch.equal(batch.axes, place.permute(1, 2, 0))
    embeddings = model.model.embed_tokens(batch.ids)
    embeddings[batch.of(Modality.FEATURE)] = batch.features
    length = batch.ids.shape[1]
    expected = qwen(
        inputs_embeds=embeddings,
        position_ids=place,
        attention_mask={"full_attention": torch.zeros(1, 1, length, length)},
    ).last_hidden_state
    hidden = model.hidden(batch.ids, batch)  # each state predicts the token at its place
    torch.testing.assert_close(hidden[:, 1:], expected[:, :-1], atol=1e-5, rtol=0)


@torch.no_grad()
def test_documents_with_images_are_seen_as_alone(model) -> None:
    documents = [document(model, IMAGES[:1]), document(model, IMAGES[2:]), document(model, [])]
    documents.sort(key=len, reverse=True)  # as they are packed
    alone = []
    for one in documents:
        batch = model.see(collate([one], model.vocabulary))
        alone.append(model.hidden(batch.ids, batch)[0])
    padded = model.see(collate(documents, model.vocabulary, length=len(documents[0]) + 5))
    for row, one in zip(model.hidden(padded.ids, padded), alone, strict=True):
        torch.testing.assert_close(row[: len(one)], one, atol=1e-5, rtol=0)
    packed = model.see(pack(documents, model.vocabulary, length=sum(map(len, documents)) + 2))
    hidden = model.hidden(packed.ids, packed)[0, :-2]
    torch.testing.assert_close(hidden, torch.cat(alone), atol=1e-5, rtol=0)


@torch.no_grad()
def test_text_alone_is_dream_s_to_the_bit(model) -> None:
    blind = MmdlmConfig.from_dict({**model.config.to_dict(), "vision": None, "rope_sections": None})
    dream = MmdlmForMaskedDiffusion(blind).eval()
    dream.load_state_dict({n: t for n, t in model.state_dict().items() if "vision" not in n})
    batch = collate([Sequence((text_segment([1, 2, 3, 4]),))], model.vocabulary)
    assert torch.equal(model.hidden(batch.ids, batch), dream.hidden(batch.ids, batch))
    axes = batch.position[..., None].expand(-1, -1, 3)
    assert all(map(torch.equal, model.model.rotary(axes), dream.model.rotary(batch.position)))


def test_features_without_rows_are_refused(model) -> None:
    batch = collate(
        [Sequence((feature_segment(torch.zeros(4, 32), model.vocabulary),))], model.vocabulary
    )
    with pytest.raises(ValueError, match="features without rows and columns"):
        model.hidden(batch.ids, batch)


def test_configs_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rope_sections \[2, 3\] make 5 pairs .* has 8"):
        read_config({**PUBLISHED, "mrope_section": [2, 3]})
    with pytest.raises(ValueError, match="full_attn_mask = False"):
        read_config({**PUBLISHED, "full_attn_mask": False})


def test_only_what_dimple_can_say_is_written_as_dimple(model) -> None:
    family = family_named("dimple")
    ours = model.config.to_dict()
    assert family.published_config(ours)["vision_config"].items() >= VISION.items()
    with pytest.raises(ValueError, match="write it as 'dream'"):
        family.published_config({**ours, "vision": None})
    tiling = {**ours["vision"]["tiling"], "max_pixels": 10**6}
    with pytest.raises(ValueError, match="at most 24x24 patches"):
        family.published_config({**ours, "vision": {**ours["vision"], "tiling": tiling}})


def test_what_a_config_leaves_out_is_published_dimple_s() -> None:
    config = read_config(TEXT | {"model_type": "dimple", "hidden_size": 256})
    assert config.rope_sections == [16, 24, 24]
    assert config.vision["tower"]["hidden_size"] == 1280
    assert config.vision["tiling"]["max_pixels"] == 336 * 336
