"""A reward for an image by ImageReward, a model of what people prefer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
)

from mmdlm.rl.reward import RewardUnavailable
from mmdlm.rl.rewards.images.clip_score import in_batches, texts_of
from mmdlm.rl.rewards.images.images import images_of

REPOSITORY, FILE = "THUDM/ImageReward", "ImageReward.pt"
WORDS = "bert-base-uncased"  # whose tokenizer it reads prompts with
LONGEST = 35  # tokens of a prompt; what is longer is cut
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
OFFSET, SCALE = 0.16717362830052426, 1.0333394966054072  # of raw scores over its own data
HEAD = (1024, 128, 64, 16, 1)
# Names in the published file -> those of transformers; what matches none is not used for the score.
NAMES = (
    (r"blip\.visual_encoder\.cls_token", "vision.embeddings.class_embedding"),
    (r"blip\.visual_encoder\.pos_embed", "vision.embeddings.position_embedding"),
    (r"blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.norm", r"vision.encoder.layers.\1.layer_norm"),
    (
        r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.",
        r"vision.encoder.layers.\1.self_attn.projection.",
    ),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.", r"vision.encoder.layers.\1.self_attn."),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (r"blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"blip\.text_encoder\.(?!.*position_ids)", "text."),
    (r"mlp\.layers\.0\.", "score.0."),
    (r"mlp\.layers\.2\.", "score.1."),  # dropout stands between
    (r"mlp\.layers\.4\.", "score.2."),
    (r"mlp\.layers\.6\.", "score.3."),
    (r"mlp\.layers\.7\.", "score.4."),
)


class ImageRewardModel(nn.Module):
    """BLIP's encoder of images, its encoder of texts that looks at them, and a linear score.

    The layers of the score have nothing between them, as published. By default of the published
    size: ViT-L/16 at 224 pixels, and BERT's base.
    """

    def __init__(
        self, vision: BlipVisionConfig | None = None, text: BlipTextConfig | None = None
    ) -> None:
        super().__init__()
        self.vision = BlipVisionModel(
            vision
            or BlipVisionConfig(
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=24,
                num_attention_heads=16,
                image_size=224,
                layer_norm_eps=1e-6,
            )
        )
        text = text or BlipTextConfig(num_attention_heads=12, encoder_hidden_size=1024)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        sizes = (text.hidden_size, *HEAD)
        self.score = nn.Sequential(*(nn.Linear(*both) for both in pairwise(sizes)))

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Images [N, 3, S, S], prompts [N, T] and where they are [N, T] -> [N] scores."""
        seen = self.vision(pixels).last_hidden_state
        read = self.text(ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        score: Tensor = self.score(read[:, 0]).squeeze(-1)
        return (score - OFFSET) / SCALE

    def load_published(self, weights: Mapping[str, Tensor]) -> None:
        """Take the weights of the published file; RuntimeError where one is missing or too much."""
        found = {}
        for name, tensor in weights.items():
            for pattern, ours in NAMES:
                if re.match(pattern, name):
                    found[re.sub(pattern, ours, name, count=1)] = tensor
                    break
        self.load_state_dict(found)


@dataclass(frozen=True)
class Judge:
    """The model with its tokenizer."""

    model: ImageRewardModel
    tokenizer: Any
    device: torch.device

    @torch.no_grad()
    def scores(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """[N] images and a text for each -> [N]."""
        size = int(self.model.vision.config.image_size)
        read = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
        ).to(self.device)
        pixels = torch.stack([pixels_of(one, size) for one in images]).to(self.device)
        found: Tensor = self.model(pixels, read.input_ids, read.attention_mask)
        return found


def pixels_of(image: Image.Image, size: int) -> Tensor:
    """[3, size, size]: the middle of the image, whose shorter side is made so long."""
    width, height = image.size
    if width <= height:
        width, height = size, int(size * height / width)
    else:
        width, height = int(size * width / height), size
    scaled = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    levels = np.asarray(scaled.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    return ((torch.from_numpy(levels) - mean) / std).permute(2, 0, 1)


@cache
def load_image_reward(weights: Path | None, device: str) -> Judge:
    """Load the published model once, in evaluation mode; see `ImageRewardScore`."""
    from huggingface_hub import hf_hub_download

    if weights is not None and not weights.is_file():
        raise RewardUnavailable(
            f"there is no file {str(weights)!r}; give the weights of ImageReward"
        )
    try:
        path = weights or Path(hf_hub_download(REPOSITORY, FILE))
        tokenizer = AutoTokenizer.from_pretrained(WORDS)
    except (OSError, ValueError) as error:
        raise RewardUnavailable(
            f"{REPOSITORY} and the tokenizer {WORDS} cannot be downloaded here; load them where "
            "there is a network, and give the file as `weights`"
        ) from error
    model = ImageRewardModel()
    try:
        model.load_published(torch.load(path, map_location="cpu", weights_only=True))
    except (RuntimeError, EOFError, UnpicklingError) as error:
        raise RewardUnavailable(
            f"{str(path)!r} does not hold the model ImageReward-v1.0; give its {FILE}"
        ) from error
    model = model.to(device).eval().requires_grad_(False)
    return Judge(model, tokenizer, torch.device(device))


@dataclass(frozen=True)
class ImageRewardScore:
    """ImageReward's score of image and prompt: about -2 to 2, with mean 0 over its own data.

    Its parts are those of BLIP, which transformers has: the package of the authors, which asks for
    old libraries, is not needed.

    Attributes:
        weights: The published file (1.8 GB); None: from the Hub, THUDM/ImageReward.
        column: As in `ClipScore`.

    Source: arXiv:2304.05977. MMaDA's UniGRPO weighs it by .1 (arXiv:2505.15809, section 5.2).
    """

    weights: Path | None = None
    batch_size: int = 16
    column: str = ""
    device: str = "cpu"

    def prepare(self) -> None:
        """Load the model; see `Rubric.prepare`."""
        load_image_reward(self.weights, self.device)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """[N] scores."""
        images = images_of(completions)
        texts = texts_of(prompts, columns, self.column)
        judge = load_image_reward(self.weights, self.device)
        return [*in_batches(judge.scores, images, texts, self.batch_size)]
