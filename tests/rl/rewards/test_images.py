"""Rewards on images: by pixels, by the model's own words, and by models that are not here."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mmdlm.experimental.hps import Hps, load_hps
from mmdlm.rl.reward import RewardUnavailable, Rubric
from mmdlm.rl.rewards.images import clip_score
from mmdlm.rl.rewards.images.clip_score import ClipScore
from mmdlm.rl.rewards.images.nearest_name import Gallery, NearestName, levels_of
from mmdlm.rl.rewards.images.round_trip import RoundTrip, word_f1

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255,) * 3}


def image(color: tuple[int, int, int], size: int = 8) -> Image.Image:
    return Image.new("RGB", (size, size), color)


def gallery() -> Gallery:
    names = tuple(frozenset({name, f"{name} square"}) for name in COLORS)
    return Gallery(names, levels_of([image(one) for one in COLORS.values()]))


# ---- the nearest name


def test_the_named_image_is_the_nearest() -> None:
    drawn = [image((200, 10, 0)), image((200, 10, 0)), image((0, 0, 255))]
    names = ["red", "blue", "blue square"]
    columns: dict[str, Any] = {"name": names, "gallery": gallery()}
    assert NearestName(top=1)([""] * 3, drawn, **columns) == [1, 0, 1]
    assert NearestName(top=4)([""] * 3, drawn, **columns) == [1, 1, 1]
    reciprocal = NearestName(score="reciprocal")([""] * 3, drawn, **columns)
    assert reciprocal[0] == reciprocal[2] == 1
    assert reciprocal[1] in (1 / 2, 1 / 3, 1 / 4)
    margin = NearestName(score="margin")([""] * 3, drawn, **columns)
    assert margin[2] == 1
    assert 0.5 < margin[0] < 1  # nearly red, and nothing else is near
    assert margin[1] < 0


def test_images_of_another_size_are_prepared() -> None:
    def prepare(images: Sequence[Image.Image]) -> Tensor:
        return levels_of([one.resize((8, 8)) for one in images])

    one = gallery()
    scaled = Gallery(one.names, one.levels, prepare)
    arguments: dict[str, Any] = {"name": ["red"], "gallery": scaled}
    assert NearestName(top=1)([""], [image((255, 0, 0), 16)], **arguments) == [1]
    with pytest.raises(ValueError, match="resize"):
        NearestName()([""], [image((255, 0, 0), 16)], name=["red"], gallery=one)


def test_names_that_the_gallery_does_not_have() -> None:
    with pytest.raises(ValueError, match="'mauve'"):
        NearestName()([""], [image((0, 0, 0))], name=["mauve"], gallery=gallery())
    with pytest.raises(ValueError, match="one for each"):
        Gallery((frozenset({"a"}),), torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


def test_text_is_no_image() -> None:
    with pytest.raises(ValueError, match="completion 0 is str"):
        NearestName()([""], ["red"], name=["red"], gallery=gallery())


# ---- round trip


def describe(images: Sequence[Image.Image]) -> list[str]:
    """Reads the color of the middle."""
    seen = [one.getpixel((4, 4)) for one in images]
    return [next(name for name, one in COLORS.items() if one == two) + " square" for two in seen]


def test_round_trip_compares_words() -> None:
    drawn = [image(COLORS["red"]), image(COLORS["blue"])]
    rubric = Rubric({"words": RoundTrip(), "exact": RoundTrip(score="exact")})
    found = rubric(
        ["red square"] * 2,
        drawn,
        columns={"name": ["red square"] * 2},
        context={"describe": describe},
    )
    assert found.rewards["words"].tolist() == [1, 0.5]
    assert found.rewards["exact"].tolist() == [1, 0]
    assert found.extras["round_trip/caption"] == ["red square", "blue square"]


def test_words_in_common() -> None:
    assert word_f1("a b c", "c b a") == 1
    assert word_f1("", "") == 1
    assert word_f1("a a", "a b") == 0.5


def test_a_caption_for_each_image() -> None:
    with pytest.raises(ValueError, match="0 captions of 1"):
        RoundTrip()([""], [image((0, 0, 0))], name=["x"], describe=lambda images: [])


# ---- CLIP, HPS


class TinyClip(nn.Module):
    """A space of three colors: images by their mean, texts by the color that they name."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def encode_image(self, pixels: Tensor) -> Tensor:
        return pixels.mean((2, 3)) * self.scale

    def encode_text(self, ids: Tensor) -> Tensor:
        return torch.eye(3)[ids]


def fake_open_clip() -> types.ModuleType:
    module = types.ModuleType("open_clip")

    def transform(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255

    def create(model: str, *, pretrained: str | None, device: str) -> tuple[Any, Any, Any]:
        if model == "unknown":
            raise RuntimeError("Model config for unknown not found.")
        return TinyClip().to(device), None, transform

    def get_tokenizer(model: str) -> Any:
        return lambda texts: torch.tensor([list(COLORS).index(one.split()[0]) for one in texts])

    module.create_model_and_transforms = create  # type: ignore[attr-defined]
    module.get_tokenizer = get_tokenizer  # type: ignore[attr-defined]
    return module


@pytest.fixture
def open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", fake_open_clip())
    clip_score.load_judge.cache_clear()
    load_hps.cache_clear()


@pytest.mark.usefixtures("open_clip")
def test_clip_score_is_the_scaled_cosine() -> None:
    drawn = [image((255, 0, 0)), image((255, 0, 0)), image((255, 255, 0))]
    prompts = ["red square", "blue square", "green square"]
    found = ClipScore(batch_size=2)(prompts, drawn)
    assert found == pytest.approx([2.5, 0, 2.5 / 2**0.5])
    by_column = ClipScore(column="name")(["?"] * 3, drawn, name=["red"] * 3)
    assert by_column[:2] == pytest.approx([2.5, 2.5])
    with pytest.raises(ValueError, match="'name'"):
        ClipScore(column="name")(["?"], drawn[:1])


@pytest.mark.usefixtures("open_clip")
def test_hps_is_a_cosine_of_its_own_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": {"scale": torch.tensor(-1.0)}}, path)
    assert Hps(weights=path)(["red"], [image((255, 0, 0))]) == pytest.approx([-1])
    with pytest.raises(RewardUnavailable, match="no file"):
        Hps(weights=tmp_path / "other.pt")(["red"], [image((255, 0, 0))])
    torch.save({"state_dict": {"other": torch.ones(1)}}, tmp_path / "wrong.pt")
    with pytest.raises(RewardUnavailable, match="does not hold a ViT-H-14"):
        Hps(weights=tmp_path / "wrong.pt")(["red"], [image((255, 0, 0))])


@pytest.mark.usefixtures("open_clip")
def test_unknown_models_are_one_sentence() -> None:
    with pytest.raises(ValueError, match="random weights"):
        ClipScore(pretrained=None)
    with pytest.raises(RewardUnavailable, match="'unknown'"):
        ClipScore(model="unknown")(["red"], [image((255, 0, 0))])


# ---- the same with open_clip itself, where it is installed


TINY_CLIP = {
    "embed_dim": 8,
    "vision_cfg": {
        "image_size": 16,
        "patch_size": 8,
        "layers": 1,
        "width": 32,
        "head_width": 16,
        "patch_dropout": 0.5,  # at random, where the model is not in evaluation mode
    },
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
OWN = ([0.0] * 3, [0.5] * 3)  # mean and standard deviation of its images, in its folder


@dataclass(frozen=True)
class Tiny:
    """A random model of open_clip, the folder that it would be published as, and a name for it."""

    library: Any
    network: Any
    folder: Path
    name: str = "mmdlm_tiny"

    @property
    def weights(self) -> Path:
        return self.folder / "open_clip_pytorch_model.bin"

    @property
    def usual(self) -> tuple[Any, Any]:
        """Mean and standard deviation of images for models without their own."""
        return self.library.OPENAI_DATASET_MEAN, self.library.OPENAI_DATASET_STD

    @torch.no_grad()
    def cosine(self, images: list[Image.Image], texts: list[str], scale: Any) -> list[float]:
        """By hand, of images that have its size already."""
        mean, std = (torch.tensor(one).view(3, 1, 1) for one in scale)
        pixels = levels_of(images) / 255
        seen = self.network.encode_image((pixels - mean) / std)
        read = self.network.encode_text(self.library.SimpleTokenizer(context_length=12)(texts))
        return ((seen * read).sum(-1) / seen.norm(dim=-1) / read.norm(dim=-1)).tolist()


@pytest.fixture
def tiny_clip(tmp_path: Path) -> Tiny:
    library = pytest.importorskip("open_clip")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = library.CLIP(**TINY_CLIP).eval()
    tiny = Tiny(library, network, tmp_path / "tiny_clip")
    tiny.folder.mkdir()
    torch.save(network.state_dict(), tiny.weights)
    preprocess = dict(zip(("mean", "std"), OWN, strict=True))
    config = {"model_cfg": TINY_CLIP, "preprocess_cfg": preprocess}
    (tiny.folder / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / f"{tiny.name}.json").write_text(json.dumps(TINY_CLIP))
    library.add_model_config(tmp_path / f"{tiny.name}.json")
    clip_score.load_judge.cache_clear()
    load_hps.cache_clear()
    return tiny


TEXTS = ["a red heart", "two cats", "the sea"]


def noises() -> list[Image.Image]:
    """Another transform than that of evaluation, which crops at random, would be seen."""
    levels = np.random.default_rng(0).integers(256, size=(3, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in levels]


def test_clip_score_of_a_model_that_open_clip_knows(tiny_clip: Tiny) -> None:
    expected = tiny_clip.cosine(noises(), TEXTS, tiny_clip.usual)
    assert min(expected) < 0 < max(expected)
    score = ClipScore(model=tiny_clip.name, pretrained=str(tiny_clip.weights), batch_size=2)
    found = score(TEXTS, noises())
    assert found == pytest.approx([max(0, 2.5 * one) for one in expected], abs=1e-5)


def test_clip_score_of_a_folder_of_open_clip(tiny_clip: Tiny) -> None:
    """With the mean and the standard deviation that stand in it."""
    expected = tiny_clip.cosine(noises(), TEXTS, OWN)
    assert expected != pytest.approx(tiny_clip.cosine(noises(), TEXTS, tiny_clip.usual), abs=1e-3)
    found = ClipScore(model=f"local-dir:{tiny_clip.folder}", pretrained=None)(TEXTS, noises())
    assert found == pytest.approx([max(0, 2.5 * one) for one in expected], abs=1e-5)


def test_hps_reads_its_weights_into_a_model_of_open_clip(tiny_clip: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "HPS.pt"
    torch.save({"state_dict": tiny_clip.network.state_dict()}, path)
    found = load_hps(path, "cpu", tiny_clip.name).cosine(noises(), TEXTS)
    expected = tiny_clip.cosine(noises(), TEXTS, tiny_clip.usual)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("model", ["no_such_model", "mmdlm_tiny"])
def test_what_open_clip_does_not_load_is_one_sentence(model: str, tiny_clip: Tiny) -> None:
    """Neither a name that it does not know nor weights that it does not find."""
    with pytest.raises(RewardUnavailable, match=f"open_clip does not load the model '{model}'"):
        ClipScore(model=model, pretrained="absent")(["red"], [image((255, 0, 0))])


def test_an_absent_package_stops_the_run_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    clip_score.load_judge.cache_clear()
    with pytest.raises(RewardUnavailable, match="pip install"):
        Rubric({"judge": ClipScore(model="absent")})(["red"], [image((255, 0, 0))])


def test_the_nearest_name_is_what_the_emoji_benchmark_measures() -> None:
    from eval.emoji.answers import Answers
    from eval.emoji.gallery import SIZE, to_levels
    from eval.emoji.gallery import Gallery as All
    from eval.emoji.measures import score

    read = All.read(str(Path(__file__).parents[2] / "data" / "emoji_images.tar"))
    one = Gallery(read.right, read.levels, lambda images: to_levels(images, SIZE))
    generator = torch.Generator().manual_seed(0)
    places = torch.randperm(len(read.emoji), generator=generator).tolist()
    noise = torch.randint(256, (len(places), 3, 16, 16), generator=generator, dtype=torch.uint8)
    blended = [
        Image.blend(
            read.emoji[place].image.convert("RGB").resize((16, 16)),
            Image.fromarray(grain.permute(1, 2, 0).numpy()),
            0.4,
        )
        for place, grain in zip(places, noise, strict=True)
    ]
    answers = Answers(
        captions=[""] * len(places),
        drawings=[to_levels(blended, SIZE)],
        originals=read.levels[places],
        reconstructions=read.levels[places],
    )
    columns, _ = score(answers, read, places)
    names = [read.emoji[place].name for place in places]
    for top in (1, 5):
        found = NearestName(top=top)([""] * len(names), blended, name=names, gallery=one)
        assert found == columns[f"drawing_top_{top}"].double().tolist()
        assert top == 1 or any(found)
