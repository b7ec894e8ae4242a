"""ImageReward: the published network in transformers' parts, and what it is shown."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import BlipTextConfig, BlipVisionConfig

from mmdlm.rl.reward import RewardUnavailable
from mmdlm.rl.rewards.images import image_reward
from mmdlm.rl.rewards.images.image_reward import ImageRewardModel, ImageRewardScore, pixels_of

# What the published code (image-reward 1.5) gives for the weights, prompts and images below.
PUBLISHED = [-133.48492432, -124.16718292, -112.08592987]
SEEN, READ = 16, 24  # widths


def tiny() -> ImageRewardModel:
    vision = BlipVisionConfig(
        hidden_size=SEEN,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        vocab_size=40,
        hidden_size=READ,
        encoder_hidden_size=SEEN,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
    )
    return ImageRewardModel(vision, text).eval()


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes in the published file, of a tiny model."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, inner: int, outer: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outer, inner), (outer,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    eye, words = "blip.visual_encoder", "blip.text_encoder"
    shapes[f"{eye}.cls_token"], shapes[f"{eye}.pos_embed"] = (1, 1, SEEN), (1, 5, SEEN)
    shapes[f"{eye}.patch_embed.proj.weight"] = (SEEN, 3, 16, 16)
    shapes[f"{eye}.patch_embed.proj.bias"] = (SEEN,)
    norm(f"{eye}.norm", SEEN)
    shapes[f"{words}.embeddings.word_embeddings.weight"] = (40, READ)
    shapes[f"{words}.embeddings.position_embeddings.weight"] = (12, READ)
    norm(f"{words}.embeddings.LayerNorm", READ)
    for n in range(2):
        block, layer = f"{eye}.blocks.{n}", f"{words}.encoder.layer.{n}"
        norm(f"{block}.norm1", SEEN)
        norm(f"{block}.norm2", SEEN)
        linear(f"{block}.attn.qkv", SEEN, 3 * SEEN)
        linear(f"{block}.attn.proj", SEEN, SEEN)
        linear(f"{block}.mlp.fc1", SEEN, 64)
        linear(f"{block}.mlp.fc2", 64, SEEN)
        for kind, context in (("attention", READ), ("crossattention", SEEN)):
            linear(f"{layer}.{kind}.self.query", READ, READ)
            linear(f"{layer}.{kind}.self.key", context, READ)
            linear(f"{layer}.{kind}.self.value", context, READ)
            linear(f"{layer}.{kind}.output.dense", READ, READ)
            norm(f"{layer}.{kind}.output.LayerNorm", READ)
        linear(f"{layer}.intermediate.dense", READ, 32)
        linear(f"{layer}.output.dense", 32, READ)
        norm(f"{layer}.output.LayerNorm", READ)
    sizes = {0: (READ, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    for n, (inner, outer) in sizes.items():
        linear(f"mlp.layers.{n}", inner, outer)
    return shapes


def given() -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Weights under their published names, images, prompts, and where these are."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: 0.3 * torch.randn(shape, generator=generator)
        for name, shape in sorted(published_shapes().items())
    }
    ids = torch.randint(1, 40, (3, 9), generator=generator)
    pixels = torch.randn(3, 3, 32, 32, generator=generator)
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1, 5:] = mask[2, 2:] = 0
    return weights, pixels, ids, mask


@torch.no_grad()
def test_scores_are_those_of_the_published_code() -> None:
    weights, pixels, ids, mask = given()
    unused = {  # stand in the file, too
        "blip.text_encoder.embeddings.position_ids": torch.arange(12)[None],
        "blip.vision_proj.weight": torch.ones(2, SEEN),
        "blip.text_proj.bias": torch.ones(2),
    }
    model = tiny()
    model.load_published({**weights, **unused})
    assert model(pixels, ids, mask).tolist() == pytest.approx(PUBLISHED, rel=1e-5)


def test_a_file_that_lacks_a_weight_is_refused() -> None:
    weights, *_ = given()
    del weights["blip.text_encoder.encoder.layer.1.crossattention.self.key.weight"]
    with pytest.raises(RuntimeError, match="crossattention"):
        tiny().load_published(weights)


def test_the_published_size() -> None:
    with torch.device("meta"):
        model = ImageRewardModel()
    assert sum(one.numel() for one in model.parameters()) == 446_206_689
    assert model.text.config.num_attention_heads == 12


@pytest.mark.parametrize("size", [(48, 32), (32, 48), (32, 32)])
def test_the_middle_of_a_image_is_shown(size: tuple[int, int]) -> None:
    """A white middle of 32 pixels between black sides, in the colors that CLIP was shown."""
    image = Image.new("RGB", size)
    left, top = (size[0] - 32) // 2, (size[1] - 32) // 2
    image.paste((255, 255, 255), (left, top, left + 32, top + 32))
    mean, std = np.array(image_reward.MEAN), np.array(image_reward.STD)
    expected = ((1 - mean) / std)[:, None, None] * np.ones((3, 32, 32))
    np.testing.assert_allclose(pixels_of(image, 32).numpy(), expected, rtol=1e-5)


class Tokenizer:
    """Words are their lengths."""

    def __call__(self, texts: list[str], **options: Any) -> Any:
        assert options["max_length"] == 35
        assert options["truncation"]
        assert options["padding"]
        ids = torch.tensor([[len(text)] for text in texts])
        read = SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))
        read.to = lambda device: read
        return read


def test_a_reward_for_each_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, *_ = given()
    torch.save(weights, tmp_path / "ImageReward.pt")
    monkeypatch.setattr(image_reward, "ImageRewardModel", tiny)
    monkeypatch.setattr(image_reward.AutoTokenizer, "from_pretrained", lambda name: Tokenizer())
    image_reward.load_image_reward.cache_clear()
    reward = ImageRewardScore(weights=tmp_path / "ImageReward.pt", batch_size=2)
    images = [Image.new("RGB", (40, 40), one) for one in ("red", "blue", "white")]
    together = reward(["a", "bb", "ccc"], images)
    alone = [reward([text], [one]) for text, one in zip(["a", "bb", "ccc"], images, strict=True)]
    assert together == pytest.approx([one for (one,) in alone], rel=1e-5)
    assert len(set(together)) == 3
    with pytest.raises(RewardUnavailable, match=r"no file .*absent.pt"):
        ImageRewardScore(weights=tmp_path / "absent.pt").prepare()
    torch.save({"mlp.layers.0.bias": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(RewardUnavailable, match="does not hold the model ImageReward"):
        ImageRewardScore(weights=tmp_path / "other.pt").prepare()


def test_without_a_network_a_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any) -> None:
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", absent)
    image_reward.load_image_reward.cache_clear()
    with pytest.raises(RewardUnavailable, match="cannot be downloaded here; load them where"):
        ImageRewardScore().prepare()
