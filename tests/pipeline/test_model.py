"""Draw, caption, infill and inpaint: what is asked for is filled, and nothing else changes."""

from __future__ import annotations

import copy
import io
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

import mmdlm
from data_pipelines.sources.image_text import ImageText, Tasks
from mmdlm import load
from mmdlm.core.kernels import linear
from mmdlm.core.sampling.sampler import Sampler
from mmdlm.core.sequence import Batch, collate
from mmdlm.core.vocabulary import Modality, Vocabulary
from mmdlm.pipeline import hub
from mmdlm.pipeline.generation_config import GenerationConfig
from mmdlm.pipeline.model import Model
from mmdlm.vision.pixels import to_image, to_pixels
from mmdlm.vision.tiles import GAP, TILE
from mmdlm.vision.tokenizers.patch_tokenizer import PatchTokenizer

FEW = {"num_inference_steps": 3}


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Model:
    return load(tiny_checkpoint, device="cpu")


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to break."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def image(width: int = 16, height: int = 16, *, seed: int = 0) -> Image.Image:
    levels = torch.randint(0, 256, (height, width, 3), generator=rng(seed), dtype=torch.uint8)
    return Image.fromarray(levels.numpy())


def same(a: list[Image.Image], b: list[Image.Image]) -> bool:
    return [one.tobytes() for one in a] == [one.tobytes() for one in b]


def near(a: list[Image.Image], b: list[Image.Image]) -> bool:
    """Equal but for the rounding of one level, which the size of a batch may change."""
    pairs = zip(a, b, strict=True)
    return all(int(np.abs(np.int16(one) - np.int16(two)).max()) <= 1 for one, two in pairs)


class Knowing(nn.Module):
    """A denoiser that is sure of the ids [L] of one document, whatever it sees."""

    def __init__(self, vocabulary: Vocabulary, ids: Tensor) -> None:
        super().__init__()
        self.vocabulary, self.ids = vocabulary, ids
        self.seen: list[tuple[Tensor, Batch]] = []

    def hidden(self, x_t: Tensor, batch: Batch, **_: Any) -> Tensor:
        self.seen.append((x_t, batch))
        return nn.functional.one_hot(self.ids[batch.position], self.vocabulary.size) * 50.0

    def head_weight(self) -> None:
        """None: tests count what `logits_at` is asked for."""

    def logits_at(
        self, hidden: Tensor, positions: Tensor, *, ids: tuple[int, int] | None = None
    ) -> Tensor:
        return hidden[positions][:, slice(*(ids or (0, self.vocabulary.size)))]


def sample_of(codes: Tensor, text: str) -> dict[str, Any]:
    """A sample as shards hold it."""
    file = io.BytesIO()
    np.save(file, codes.numpy())
    return {"codes.npy": file.getvalue(), "txt": text.encode()}


def knowing(model: Model, codes: Tensor, text: str) -> tuple[Model, Knowing]:
    """The model with a denoiser that knows one image and its text."""
    vocabulary = model.denoiser.vocabulary
    sample = ImageText(tasks=Tasks(draw=1, caption=0), text_slots=64, drop_condition=0.0)(
        sample_of(codes, text),
        vocabulary,
        tokenizer=model.text_tokenizer,
        generator=rng(),
    )
    denoiser = Knowing(vocabulary, collate([sample], vocabulary).ids[0])
    return replace(model, denoiser=denoiser), denoiser


CODES = torch.arange(16) + 3


# --- a generator for each output ------------------------------------------------------------------


def test_each_image_is_that_of_its_generator_alone(model: Model) -> None:
    prompts = ["red heart", "woman dark skin tone"]
    many = model.text_to_image(
        prompts, num_images_per_prompt=2, generator=[rng(seed) for seed in (4, 5, 6, 7)], **FEW
    )
    for number, one in enumerate(many):
        prompt = prompts[number // 2]
        assert same([one], model.text_to_image(prompt, generator=rng(4 + number), **FEW))
    *_, last = model.draw_trajectory(prompts, generator=[rng(4), rng(6)], **FEW)
    assert same(last, [many[0], many[2]])


def test_each_text_is_that_of_its_generator_alone(model: Model) -> None:
    drawing = replace(model, defaults=model.defaults.in_each_task(temperature=1.0, remask=0.3))
    images = [image(seed=seed) for seed in range(3)]
    captions = drawing.caption(images, generator=[rng(seed) for seed in range(3)], **FEW)
    texts = ["woman [MASK] skin", "red [MASK:3]"]
    filled = drawing.infill(texts, generator=[rng(1), rng(2)], **FEW)
    for seed, (one, said) in enumerate(zip(images, captions, strict=True)):
        assert drawing.caption(one, generator=rng(seed), **FEW) == said
    for seed, (text, said) in enumerate(zip(texts, filled, strict=True), start=1):
        assert drawing.infill(text, generator=rng(seed), **FEW) == said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (42, "not 42"),
        ("0", "not '0'"),
        ([rng(), None], "generator 1 of the list must be a torch.Generator, not None"),
        ([rng()], "a list of 1 for 2 outputs"),
    ],
)
def test_what_is_no_generator_is_refused(model: Model, given: Any, message: str) -> None:
    for call in (
        lambda: model.text_to_image(["red heart", "woman"], generator=given),
        lambda: model.draw_trajectory(["red heart", "woman"], generator=given),
        lambda: model.caption([image(), image()], generator=given),
        lambda: model.infill(["red [MASK]", "a [MASK]"], generator=given),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# --- numbers that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_told(folder: Path, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][0] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "digests.json").unlink()  # of the weights as they were
    broken = load(folder, device="cpu")
    for call in (
        lambda: broken.text_to_image("red heart", **FEW),
        lambda: broken.caption(image(), **FEW),
        lambda: broken.infill("red [MASK]", **FEW),
        lambda: list(broken.draw_trajectory("red heart", num_inference_steps=1)),
    ):
        with pytest.raises(ValueError, match="numbers are not finite"):
            call()


@pytest.mark.parametrize("name", ["encoder_position", "decoder_position"])
def test_weights_of_an_image_tokenizer_that_are_not_finite_are_told(
    folder: Path, name: str
) -> None:
    path = folder / "image_tokenizer" / "model.safetensors"
    weights = load_file(path)
    weights[name][0] = float("nan")
    save_file(weights, path, {"format": "pt"})
    (path.parent / "digests.json").unlink()  # of the weights as they were
    broken = load(folder, device="cpu")
    sees = name.startswith("encoder")
    call = partial(broken.caption, image()) if sees else partial(broken.text_to_image, "heart")
    with pytest.raises(ValueError, match="image tokenizer's numbers are not finite"):
        call(num_inference_steps=3)


# --- what is known is said and drawn --------------------------------------------------------------


def test_each_task_says_what_the_denoiser_knows(model: Model) -> None:
    known, _ = knowing(model, CODES, "woman dark skin tone")
    assert model.image_tokenizer is not None
    drawn = to_image(model.image_tokenizer.decode(CODES[None])[0])
    assert same(known.text_to_image("anything"), [drawn])
    assert known.caption(image()) == "woman dark skin tone"
    assert known.caption([image(), image(seed=1)]) == ["woman dark skin tone"] * 2
    assert known.infill("woman [MASK] skin tone") == "woman dark skin tone"
    everything = Image.new("L", (16, 16), 255)
    assert same([known.inpaint(image(), everything, "anything")], [drawn])


def test_the_layout_is_the_one_of_training(model: Model) -> None:
    known, denoiser = knowing(model, CODES, "red heart")
    tokenizer, vocabulary = model.image_tokenizer, denoiser.vocabulary
    assert tokenizer is not None
    codes = tokenizer.encode(to_pixels(image())[None])[0]

    def trained(**tasks: float) -> Batch:
        source = ImageText(tasks=Tasks(**tasks), text_slots=64, drop_condition=0.0)
        sample = sample_of(codes, "red heart")
        words = model.text_tokenizer
        sequence = source(sample, vocabulary, tokenizer=words, generator=rng())
        return collate([sequence], vocabulary)

    def agree(batch: Batch, expected: Batch) -> None:
        context = ~expected.target
        assert torch.equal(batch.target, expected.target)
        assert torch.equal(batch.modality, expected.modality)
        assert torch.equal(batch.position, expected.position)
        assert torch.equal(batch.ids[context], expected.ids[context])

    known.text_to_image("red heart", guidance_scale=2.0, **FEW)
    drawing = denoiser.seen[-1][1]
    expected = trained(draw=1, caption=0)
    agree(generate_rows(drawing, 0), expected)
    agree(generate_rows(drawing, 1), expected.without_context(vocabulary))
    known.caption(image(), **FEW)
    agree(denoiser.seen[-1][1], trained(draw=0, caption=1))


def generate_rows(batch: Batch, row: int) -> Batch:
    names = ("ids", "modality", "target", "document", "segment", "position")
    return Batch(**{name: getattr(batch, name)[row : row + 1] for name in names})


# --- pure functions of inputs and seed ------------------------------------------------------------


def test_output_is_a_function_of_inputs_and_seed(model: Model) -> None:
    before = torch.random.get_rng_state()
    first = model.text_to_image("red heart", generator=rng(1), **FEW)
    assert same(first, model.text_to_image("red heart", generator=rng(1), **FEW))
    assert not same(first, model.text_to_image("red heart", generator=rng(2), **FEW))
    assert not same(first, model.text_to_image("dark heart", generator=rng(1), **FEW))
    default = model.text_to_image("red heart", **FEW)
    assert same(default, model.text_to_image("red heart", generator=rng(0), **FEW))
    hole = Image.new("L", (16, 16), 255)
    assert same([model.inpaint(image(), hole)], [model.inpaint(image(), hole)])
    assert model.caption(image()) == model.caption(image())
    assert model.infill("red [MASK:3]") == model.infill("red [MASK:3]")
    assert torch.equal(before, torch.random.get_rng_state())


def test_several_prompts_give_their_images_in_order(model: Model) -> None:
    cold = replace(model.defaults.text_to_image, temperature=0.0, order_temperature=0.0)
    exact = copy.deepcopy(model.denoiser).double()  # no near-tie goes another way in a larger batch
    model = replace(model, denoiser=exact, defaults=replace(model.defaults, text_to_image=cold))
    together = model.text_to_image(["red heart", "dark"], num_images_per_prompt=2, **FEW)
    red, dark = (model.text_to_image(one, **FEW)[0] for one in ("red heart", "dark"))
    assert near(together, [red, red, dark, dark])
    assert not near([red], [dark])


def test_images_of_any_form_have_one_caption(model: Model, tmp_path: Path) -> None:
    one = image()
    one.save(tmp_path / "one.png")
    caption = model.caption(one)
    assert model.caption(tmp_path / "one.png") == caption
    assert model.caption(str(tmp_path / "one.png")) == caption
    assert model.caption(to_pixels(one)) == caption
    assert model.caption(torch.stack([to_pixels(one)] * 2)) == [caption] * 2
    assert model.caption((one, tmp_path / "one.png")) == [caption] * 2
    assert model.caption([]) == []


# --- drawing --------------------------------------------------------------------------------------


def test_trajectory_ends_in_the_image_and_uncovers_it(model: Model) -> None:
    arguments: dict[str, Any] = {"num_images_per_prompt": 2, "num_inference_steps": 4}
    frames = list(model.draw_trajectory("red heart", **arguments))
    assert len(frames) == 4
    assert same(frames[-1], model.text_to_image("red heart", **arguments))
    covered = [sum(tiles(one) for one in frame) for frame in frames]
    assert covered == sorted(covered, reverse=True)
    assert covered[0] > covered[-1] == 0


def tiles(shown: Image.Image) -> int:
    return sum(
        shown.getpixel((x + 1, y + 1)) == TILE and shown.getpixel((x, y)) == GAP
        for x in range(0, shown.width, 4)
        for y in range(0, shown.height, 4)
    )


def test_guidance_and_negative_prompts_matter(model: Model) -> None:
    def draw(**options: Any) -> list[Image.Image]:
        return model.text_to_image("red heart", **FEW, **options)

    assert same(draw(), draw(guidance_scale=model.defaults.text_to_image.guidance_scale))
    assert not same(draw(guidance_scale=1.0), draw(guidance_scale=5.0))
    assert same(draw(negative_prompt=""), draw())
    assert not same(draw(negative_prompt="dark skin tone"), draw())
    both = model.text_to_image(["red", "dark"], negative_prompt=["dark", ""], **FEW)
    assert len(both) == 2


# --- infilling ------------------------------------------------------------------------------------


def test_only_holes_are_filled_and_none_ends_the_text(model: Model) -> None:
    targets = spied(model)
    for text, holes in [
        ("woman [MASK] skin tone", 1),
        ("[MASK] heart", 1),
        ("red [MASK][MASK:2] [MASK]", 4),
        ("woman [MASK:2]-dark [MASK] tone", 3),
    ]:
        filled = targets.model.infill(text)
        batch, ids = targets.batch, targets.ids
        assert int(batch.target.sum()) == holes
        assert torch.equal(ids[~batch.target], batch.ids[~batch.target])
        assert not bool((ids[batch.target] == targets.model.denoiser.vocabulary.eos_id).any())
        begin, end = text.split("[MASK", 1)[0].strip(), text.rsplit("]", 1)[1]
        assert filled.startswith(begin)
        assert filled.endswith(end)


def test_text_outside_the_holes_comes_back_character_by_character(model: Model) -> None:
    filled = model.infill("  woman\n\t[MASK:2]\n  <|endoftext|> tone \n")
    assert filled.startswith("  woman\n\t")
    assert filled.endswith("\n  <|endoftext|> tone \n")


def test_a_completion_keeps_the_space_before_it(model: Model) -> None:
    words = model.text_tokenizer
    vocabulary = Vocabulary.build(text_size=len(words), eos_id=words.eos_token_id)
    ids = torch.tensor([*words.encode("woman dark skin"), words.eos_token_id])
    alone = Model(Knowing(vocabulary, ids), words)
    assert alone.complete("woman", max_new_tokens=len(ids) - 1) == " dark skin"
    assert alone.complete("woman ", max_new_tokens=len(ids) - 1) == "dark skin"


def test_words_around_a_hole_have_the_tokens_they_have_in_a_text(model: Model) -> None:
    targets = spied(model)
    whole = model.text_tokenizer.encode("woman medium-dark skin tone")
    medium = model.text_tokenizer.encode("medium")
    targets.model.infill(f"woman [MASK:{len(medium)}]-dark skin tone")
    text = targets.batch.ids[targets.batch.of(Modality.TEXT)]
    hole = targets.batch.target[targets.batch.of(Modality.TEXT)]
    expected = torch.tensor(whole)
    assert torch.equal(text[: len(whole)][~hole[: len(whole)]], expected[~hole[: len(whole)]])


def test_a_image_is_looked_at(model: Model) -> None:
    guesses = {model.infill("[MASK:6]", image=image(seed=seed)) for seed in range(4)}
    assert len(guesses) > 1
    assert model.infill(["red [MASK]", "[MASK:2] tone"], image=image())[0].startswith("red")
    assert model.infill([]) == []


class Spy:
    """A model whose last batch and result can be looked at."""

    def __init__(self, model: Model) -> None:
        self.model, self.batch, self.ids = model, None, None


def spied(model: Model) -> Any:
    spy = Spy(model)

    class Watched(Sampler):
        def trajectory(self, denoiser: Any, batch: Batch, **options: Any) -> Any:
            spy.batch = batch
            for state in super().trajectory(denoiser, batch, **options):
                spy.ids = state.ids
                yield state

    class Decodes(GenerationConfig):
        def sampler(self, **options: Any) -> Sampler:
            return Watched(**vars(super().sampler(**options)))

    task = Decodes(3, temperature=1.0)
    spy.model = replace(
        model, defaults=replace(model.defaults, infill=task, inpaint=task, caption=task)
    )
    return spy


# --- inpainting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (40, 23), (5, 16), (3, 2), (64, 64)])
@pytest.mark.parametrize("prompt", ["", "red heart"])
def test_pixels_outside_the_mask_come_back_as_they_were(
    model: Model, size: tuple[int, int], prompt: str
) -> None:
    before = image(*size)
    hole = torch.rand(size[::-1], generator=rng(1)) < 0.2
    hole[0, 0] = True
    after = model.inpaint(before, hole, prompt, **FEW)
    assert after.size == before.size
    old, new = (torch.from_numpy(np.array(one)) for one in (before, after))
    assert torch.equal(old[~hole], new[~hole])
    assert not torch.equal(old[hole], new[hole])


@pytest.mark.parametrize("size", [(16, 16), (40, 23), (5, 16), (3, 2), (64, 64)])
def test_a_cell_is_repainted_where_any_of_its_pixels_is_masked(
    model: Model, size: tuple[int, int]
) -> None:
    width, height = size
    spy = spied(model)
    scale = 16 / max(size)
    left, top = ((16 - round(side * scale)) // 2 for side in size)
    for x, y in [(0, 0), (width - 1, height - 1), (width // 2, height // 3)]:
        hole = Image.new("L", size)
        hole.putpixel((x, y), 255)
        spy.model.inpaint(image(*size), hole)
        cells = spy.batch.target[spy.batch.of(Modality.IMAGE)].view(4, 4)
        # the middle of the pixel on the square of 16 pixels, in cells of 4
        middle_x = left + (x + 0.5) * round(width * scale) / width
        middle_y = top + (y + 0.5) * round(height * scale) / height
        assert cells[int(middle_y / 4), int(middle_x / 4)]
        # and no cell further away than the pixel reaches
        rows, columns = cells.nonzero(as_tuple=True)
        reach = 2 + scale / 2 + 1e-6
        assert bool(((columns * 4 + 2 - middle_x).abs() <= reach).all())
        assert bool(((rows * 4 + 2 - middle_y).abs() <= reach).all())


def test_masks_of_any_form_say_the_same(model: Model) -> None:
    hole = torch.zeros(16, 16, dtype=torch.bool)
    hole[2:9, 4:7] = True
    grey = Image.fromarray((hole * 255).to(torch.uint8).numpy())
    forms = [hole, hole[None], hole.float(), grey, grey.convert("1"), grey.convert("RGB")]
    results = [model.inpaint(image(), form, "red", **FEW) for form in forms]
    assert len({one.tobytes() for one in results}) == 1


def test_context_stays_in_both_branches_of_inpainting(model: Model) -> None:
    known, denoiser = knowing(model, CODES, "red heart")
    hole = torch.zeros(16, 16, dtype=torch.bool)
    hole[:4, :4] = True
    known.inpaint(image(), hole, "red heart")
    batch = denoiser.seen[-1][1]
    codes = batch.ids[batch.of(Modality.IMAGE)].view(2, 16)[:, 1:]
    assert torch.equal(codes[0], codes[1])
    mask_id = denoiser.vocabulary.mask_id
    assert not bool((codes == mask_id).any())
    assert bool((batch.ids[1][batch.of(Modality.TEXT)[1]] == mask_id).all())


# --- other kinds of model -------------------------------------------------------------------------


def test_texts_of_any_length(model: Model) -> None:
    free = replace(model, text_slots=None, defaults=replace(model.defaults, max_text_tokens=9))
    assert len(free.text_to_image(["red", "woman dark skin tone"], **FEW)) == 2
    assert len(free.text_to_image("red", negative_prompt="woman dark skin tone", **FEW)) == 1
    assert isinstance(free.caption(image()), str)
    assert free.infill("woman [MASK] skin tone").endswith("skin tone")
    assert free.infill("woman [MASK] skin tone", image=image()).endswith("skin tone")
    free.inpaint(image(), torch.ones(16, 16), **FEW)
    short = replace(free, max_length=24)  # 16 codes, 2 marks, 5 tokens and the end
    with pytest.raises(ValueError, match=r"tokens, but this model takes at most 5; shorten it"):
        short.text_to_image("woman dark skin tone and much more")


def test_a_model_of_text_alone(model: Model) -> None:
    words = model.text_tokenizer
    vocabulary = Vocabulary.build(text_size=len(words), eos_id=words.eos_token_id)
    ids = torch.tensor([*words.encode("woman dark skin tone"), words.eos_token_id])
    alone = Model(Knowing(vocabulary, ids), words)
    assert alone.infill("woman [MASK] skin tone") == "woman dark skin tone"
    for call in (
        lambda: alone.text_to_image("red"),
        lambda: alone.caption(image()),
        lambda: alone.inpaint(image(), torch.ones(16, 16)),
        lambda: alone.infill("[MASK]", image=image()),
    ):
        with pytest.raises(ValueError, match="this model knows only text"):
            call()


# --- bad arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda m: m.text_to_image(""), "prompt '' is empty"),
        (lambda m: m.text_to_image(["red", " \n"]), r"prompt ' \\n' is empty"),
        (lambda m: m.text_to_image([]), "there is no prompt"),
        (lambda m: m.text_to_image("@" * 70), "has 71 tokens, but this model takes at most 63"),
        (lambda m: m.text_to_image("a", negative_prompt="@" * 70), "has 71 tokens"),
        (lambda m: m.text_to_image("a", num_inference_steps=0), "at least 1, .*got 0"),
        (lambda m: m.text_to_image("a", guidance_scale=float("nan")), "finite number, got nan"),
        (lambda m: m.text_to_image("a", num_images_per_prompt=0), "at least 1, .*got 0"),
        (lambda m: m.text_to_image("a", negative_prompt=["a", "b"]), "2 negative prompts for 1"),
        (
            lambda m: m.text_to_image("a", negative_prompt="b", guidance_scale=1.0),
            "negative_prompt 'b' has no effect at guidance_scale 1",
        ),
        (
            lambda m: m.draw_trajectory(""),
            "prompt '' is empty",
        ),  # at the call, not at the first frame
        (lambda m: m.caption("missing.png"), "no image file at 'missing.png'"),
        (lambda m: m.caption([3]), "int is no image"),
        (lambda m: m.caption(torch.full((3, 16, 16), 200.0)), r"pixels lie in \[-1, 1\]"),
        (lambda m: m.caption(torch.zeros(3, 16, 16, dtype=torch.uint8)), "is torch.uint8"),
        (lambda m: m.caption(torch.zeros(1, 16, 16)), r"\[3, H, W\]"),
        (lambda m: m.caption(image(), num_inference_steps=-1), "at least 1, got -1"),
        (lambda m: m.infill("red heart"), "text 'red heart' has no hole; write"),
        (lambda m: m.infill("red [MASK:0]"), r"\[MASK:0\] in 'red \[MASK:0\]' is a hole of no"),
        (lambda m: m.infill("[MASK:99999999999]"), "but this model takes at most 63; shorten it"),
        (lambda m: m.infill("[MASK]", image="missing.png"), "missing.png"),
        (lambda m: m.inpaint(image(), Image.new("L", (16, 16))), "the mask has no hole"),
        (
            lambda m: m.inpaint(image(), Image.new("L", (8, 4), 255)),
            "the mask is 8 x 4 but the image is 16 x 16",
        ),
        (lambda m: m.inpaint(image(), "mask.png"), "str is no mask"),
        (lambda m: m.inpaint(image(), torch.ones(16, 16), "@" * 70), "71 tokens"),
        (
            lambda m: m.inpaint(image(), torch.ones(16, 16), num_inference_steps=0),
            "at least 1, .*got 0",
        ),
    ],
)
def test_bad_arguments_are_one_sentence(model: Model, call: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        call(model)
    assert "\n" not in str(caught.value)


# --- loading --------------------------------------------------------------------------------------


def test_loading_is_silent_and_leaves_the_settings_of_transformers(
    tiny_checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_info()
    try:
        mmdlm.load(str(tiny_checkpoint))
        assert transformers_logging.get_verbosity() == transformers_logging.INFO
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.set_verbosity(verbosity)
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")


def test_weights_stored_in_half_precision_are_computed_in_float32(
    folder: Path, model: Model
) -> None:
    for path in (folder / "model.safetensors", folder / "image_tokenizer" / "model.safetensors"):
        tensors = {name: tensor.half() for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
        (path.parent / "digests.json").unlink()  # of the weights as they were
    half = load(folder, device="cpu")
    for module in (half.denoiser, half.image_tokenizer):
        assert isinstance(module, nn.Module)
        assert {p.dtype for p in module.parameters()} == {torch.float32}
        assert not module.training
    assert load(folder, device="cpu", dtype=torch.bfloat16).denoiser.dtype == torch.bfloat16


def test_a_checkpoint_carries_its_settings(folder: Path) -> None:
    settings = {"text_to_image": {"num_inference_steps": 5}}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert len(list(load(folder).draw_trajectory("red"))) == 5
    (folder / "generation_config.json").write_text('{"steps": 5}')
    with pytest.raises(ValueError, match=r"generation_config.json: unknown key 'steps'"):
        load(folder)


def test_a_bundled_name_comes_before_a_folder(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "BUNDLED", tiny_checkpoint.parent)
    (tmp_path / tiny_checkpoint.name).mkdir()
    assert load(tiny_checkpoint.name).text_slots == 64
    with pytest.raises(ValueError, match="config.json is missing"):
        load(f"./{tiny_checkpoint.name}")
    with pytest.raises(ValueError, match=f"no model 'unknown'.*{tiny_checkpoint.name}"):
        load("unknown")


@pytest.mark.parametrize("name", ["", "no model", "/nowhere/at/all", "../x", "owner/name"])
def test_what_is_not_there_is_said(name: str) -> None:
    with pytest.raises(ValueError, match="give a bundled name") as caught:
        load(name)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


def remove(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def cut(name: str) -> Any:
    def broken(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) * 2 // 3])

    return broken


def edit(name: str, **changes: Any) -> Any:
    def broken(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **changes}))

    return broken


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def misshape_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][1:].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def no_end_of_text(folder: Path) -> None:
    content = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({name: value for name, value in content.items() if name != "eos_token"})
    )


def many_words(folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(["wordy"])
    tokenizer.save_pretrained(folder)


def few_codes(folder: Path) -> None:
    shutil.rmtree(folder / "image_tokenizer")
    other = PatchTokenizer(
        image_size=16, patch=4, width=16, heads=2, decoder_depth=1, levels=(3, 3), seam_width=4
    )
    other.save_pretrained(folder / "image_tokenizer")


@pytest.mark.parametrize(
    "damage, says",
    [
        (remove("config.json"), r"config.json is missing"),
        (remove("model.safetensors"), r"model.safetensors is missing"),
        (remove("tokenizer.json"), r"tokenizer.json is missing"),
        (remove("tokenizer_config.json"), r"tokenizer_config.json is missing"),
        (remove("image_tokenizer/config.json"), r"config.json is missing"),
        (remove("image_tokenizer/model.safetensors"), r"holds no weights"),
        (lambda f: shutil.rmtree(f / "image_tokenizer"), "no folder .*image_tokenizer"),
        (cut("config.json"), r"config.json cannot be read"),
        (cut("model.safetensors"), r"model.safetensors is damaged"),
        (cut("tokenizer.json"), r"tokenizer.json is damaged"),
        (cut("tokenizer_config.json"), "is damaged"),
        (cut("image_tokenizer/model.safetensors"), r"model.safetensors is damaged"),
        (edit("config.json", model_type="llama"), "describes a model of type 'llama'"),
        (edit("config.json", num_key_value_heads=3), "config.json: .*not a multiple of .* 3"),
        (edit("config.json", hidden_size="wide"), "hidden_size must be a whole number"),
        (edit("config.json", text_slots="many"), "text_slots must be .* got 'many'"),
        (edit("config.json", vocabulary=None), "config.json: vocabulary is missing"),
        (edit("config.json", vocabulary={"size": 3}), "config.json: vocabulary"),
        (edit("config.json", num_hidden_layers=3), "missing.*model.layers.2"),
        (edit("config.json", text_slots=1), "text_slots 1 .* no room for text"),
        (drop_tensor, "missing.*lm_head.weight"),
        (misshape_tensor, "mismatched.*model.norm.weight"),
        (no_end_of_text, "no end of text"),
        (many_words, r"the text tokenizer has \d+ ids, but the model knows text ids up to"),
        (few_codes, "the image tokenizer has 9 codes, but the model's vocabulary has 25"),
    ],
)
def test_a_broken_checkpoint_is_one_sentence(folder: Path, damage: Any, says: str) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=says) as caught:
        load(folder)
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


# --- what is kept from call to call ---------------------------------------------------------------


@pytest.mark.skipif(linear._PACK is None, reason="this torch has no oneDNN")
def test_weights_are_packed_once_and_anew_when_they_change(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packings: list[int] = []
    pack = linear._laid_out

    def counted(weight: Tensor) -> Tensor:
        packings.append(1)
        return pack(weight)

    monkeypatch.setattr(linear, "_laid_out", counted)
    model = load(tiny_checkpoint, device="cpu")
    denoiser = model.denoiser
    assert isinstance(denoiser, nn.Module)
    before = model.text_to_image("red heart", num_inference_steps=5)
    number = len(packings)
    assert number > 0
    twin = model.with_generation(cache="stable", cache_refresh=1)
    assert same(twin.text_to_image("red heart", num_inference_steps=5), before)
    assert len(packings) == number
    for parameter in denoiser.parameters():  # as a moving average that knows nothing of autograd
        parameter.data.mul_(torch.randn(parameter.shape, generator=rng()))
    after = model.text_to_image("red heart", num_inference_steps=5)
    assert not same(after, before)
    assert len(packings) == 2 * number
    assert same(copy.deepcopy(model).text_to_image("red heart", num_inference_steps=5), after)
    fresh = replace(model, denoiser=copy.deepcopy(denoiser))
    assert fresh.packed is not model.packed
    assert same(fresh.text_to_image("red heart", num_inference_steps=5), after)
