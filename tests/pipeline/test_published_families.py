"""What users call on published families: answers, conversations, drawings and edits."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from mmdlm import load
from mmdlm.core.sequence import Batch, collate, pack, text_segment
from mmdlm.core.sequence import Sequence as Document
from mmdlm.pipeline.convert import convert
from mmdlm.pipeline.generation_config import GenerationConfig
from mmdlm.pipeline.model import Model
from mmdlm.pipeline.task_defaults import Defaults
from mmdlm.templates.auto import LAYOUTS
from mmdlm.templates.llada import Llada
from mmdlm.templates.llada_v import LladaV
from mmdlm.templates.lumina import Lumina
from mmdlm.templates.mmada import Mmada
from mmdlm.templates.prompt_template import PromptTemplate
from mmdlm.vision.encoders.adapter import VisionConfig
from mmdlm.vision.encoders.anyres import Anyres
from mmdlm.vision.tokenizers.base import ImageTokenizer
from tests.templates.tiny import CODES, transformer, words_of

CELL = 4
FEW: dict[str, Any] = {"max_new_tokens": 6, "num_inference_steps": 3}
TOWER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


class Grays(ImageTokenizer):
    """A code is the grey of a cell: 0 black, 15 white."""

    family = "Grays"

    def __init__(self) -> None:
        super().__init__()
        self.codebook_size, self.image_size, self.downsampling = CODES, 16, CELL

    @property
    def config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config(cls, config: Any) -> Grays:
        return cls()

    def encode(self, pixels: Tensor) -> Tensor:
        grey = torch.nn.functional.avg_pool2d(pixels.mean(1, keepdim=True), CELL)
        return ((grey.flatten(1) + 1) / 2 * (CODES - 1)).round().long().clamp(0, CODES - 1)

    def reconstruct(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def decode(self, codes: Tensor, *, grid: tuple[int, int] | None = None) -> Tensor:
        rows, columns = self.check_codes(codes, grid)
        grey = codes.view(len(codes), 1, rows, columns) / (CODES - 1) * 2 - 1
        return grey.repeat_interleave(CELL, 2).repeat_interleave(CELL, 3).expand(-1, 3, -1, -1)


def model_of(prompt_template: PromptTemplate, **options: Any) -> Model:
    """Random weights in float64; the family's own decoding, at temperature 0."""
    words = words_of(prompt_template.family)
    vision = None
    if prompt_template.sees == "features":
        tiling = Anyres(size=8, grid=2, shapes=((2, 1), (1, 2), (2, 2)))
        vision = VisionConfig(tower=TOWER, tiling=tiling).to_dict()
    shift = "dream" in prompt_template.family
    defaults = Defaults().updated(prompt_template.generation)
    cold = {
        name: replace(value, temperature=0.0, order_temperature=0.0)
        for name, value in vars(defaults).items()
        if isinstance(value, GenerationConfig)
    }
    return Model(
        transformer(words.vocabulary, vision=vision, shift=shift),
        words.tokenizer,
        Grays() if words.vocabulary.image_codes else None,
        max_length=4096,
        defaults=replace(defaults, **cold),
        prompt_template=prompt_template,
        **options,
    )


@pytest.fixture(scope="module", params=["llada", "dream", "mmada", "llada_v", "lavida_dream"])
def speaker(request: pytest.FixtureRequest) -> Model:
    return model_of(LAYOUTS[request.param])


@pytest.fixture(scope="module")
def seer() -> Model:
    return model_of(LladaV())


def image(width: int = 16, height: int = 16, *, seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(levels.numpy())


SHORT = [{"role": "user", "content": "hi"}]
LONG = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "what is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "and 3 + 3, and why, at some length?"},
]


# --- conversations --------------------------------------------------------------------------------


def test_several_conversations_in_one_pass_are_what_they_are_alone(speaker: Model) -> None:
    together = speaker.chat([SHORT, LONG, SHORT[:1]], **FEW)
    assert together == [speaker.chat(one, **FEW) for one in (SHORT, LONG, SHORT)]
    assert together[0] != together[1]
    assert speaker.answer(["hi", "what?"], **FEW)[0] == speaker.answer("hi", **FEW) == together[0]
    guided = speaker.chat([SHORT, LONG], guidance_scale=2.0, **FEW)
    assert guided == [speaker.chat(one, guidance_scale=2.0, **FEW) for one in (SHORT, LONG)]


def test_texts_in_one_pass_are_what_they_are_alone(speaker: Model) -> None:
    texts = ["once upon", "in a galaxy far, far away"]
    assert speaker.complete(texts, **FEW) == [speaker.complete(one, **FEW) for one in texts]
    holes = ["a [MASK:2] b", "the [MASK] of a longer text"]
    filled = speaker.infill(holes)
    assert filled == [speaker.infill(one) for one in holes]
    assert filled[0].startswith("a")
    assert filled[1].endswith(" of a longer text")


def test_images_of_a_batch_stay_with_their_conversations(seer: Model) -> None:
    one, two, wide = image(seed=1), image(seed=2), image(24, 16, seed=3)
    ask: list[tuple[str, Any]] = [
        ("what?", one),
        ("nothing to see", None),
        ("compare <image> and <image>", [two, wide]),
        ("what?", wide),
    ]
    together = seer.answer([text for text, _ in ask], [image for _, image in ask], **FEW)
    assert together == [seer.answer(text, image, **FEW) for text, image in ask]
    assert together[0] != together[3]
    swapped = seer.answer("compare <image> and <image>", [wide, two], **FEW)
    assert swapped != together[2]
    guided = seer.answer("what?", one, guidance_scale=3.0, **FEW)
    assert isinstance(guided, str)
    messages = [{"role": "user", "content": "<image>\nwhat?"}]
    assert seer.chat(messages, one, **FEW) == together[0]
    assert seer.chat([messages, SHORT], [[one], []], **FEW)[0] == together[0]


def test_a_caption_is_an_answer_to_the_familys_own_question(seer: Model) -> None:
    short = replace(seer.defaults, max_text_tokens=6)
    model = replace(seer, defaults=short)
    caption = model.caption(image(), num_inference_steps=3)
    question = "<image>\nPlease describe the image in detail."
    # what an answer must not contain a caption may, so that these ids are compared by length alone
    assert isinstance(caption, str)
    assert isinstance(seer.answer(question, image(), **FEW), str)
    assert model.caption([image(), image(seed=1)], num_inference_steps=3)[0] == caption


class Sure:
    """A denoiser that is sure of one answer, [T] ids, whatever the prompt."""

    def __init__(self, model: Model, answer: list[int]) -> None:
        self.vocabulary, self.answer = model.denoiser.vocabulary, answer
        self.batches: list[Batch] = []

    def hidden(self, x_t: Tensor, batch: Batch, **_: Any) -> Tensor:
        self.batches.append(batch)
        place = (batch.target.cumsum(1) - 1).clamp(0, len(self.answer) - 1)
        ids = torch.tensor(self.answer)[place]
        return torch.nn.functional.one_hot(ids, self.vocabulary.size) * 50.0

    def head_weight(self) -> None:
        """None: tests count what `logits_at` is asked for."""

    def logits_at(
        self, hidden: Tensor, positions: Tensor, *, ids: tuple[int, int] | None = None
    ) -> Tensor:
        return hidden[positions][:, slice(*(ids or (0, self.vocabulary.size)))]


def sure(model: Model, *parts: str) -> tuple[Model, Sure]:
    known = model.text_tokenizer.get_vocab()
    ids: list[int] = []
    for part in parts:
        ids += [known[part]] if part in known else model.text_tokenizer.encode(part)
    denoiser = Sure(model, ids)
    return replace(model, denoiser=denoiser), denoiser


def test_what_follows_the_end_is_dropped() -> None:
    for end in ("<|eot_id|>", "<|endoftext|>"):
        model, _ = sure(model_of(Llada()), " yes ", end, "no, no")
        assert model.answer("?", max_new_tokens=20) == "yes"
        assert model.complete("?", max_new_tokens=20) == " yes "
    model, _ = sure(model_of(Llada()), "no end")
    assert model.answer("?", max_new_tokens=6) == "no end"


def test_steps_follow_the_length() -> None:
    model, denoiser = sure(model_of(Llada()), "y" * 64)  # 128 steps for 128 tokens
    model.answer("?", max_new_tokens=16)
    assert len(denoiser.batches) == 16
    denoiser.batches.clear()
    model.answer("?", max_new_tokens=40, num_inference_steps=10, block_length=8)
    assert len(denoiser.batches) == 10
    assert int(denoiser.batches[0].target.sum()) == 40
    denoiser.batches.clear()
    model.answer("?", max_new_tokens=3, block_length=1)
    assert len(denoiser.batches) == 3


def test_suppressed_tokens_do_not_occur() -> None:
    model, _ = sure(model_of(LladaV()), "<|endoftext|>", "<|start_header_id|>")
    assert "<|" not in model.answer("?", max_new_tokens=4)


# --- images as codes ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def painter() -> Model:
    return model_of(Mmada())


@pytest.fixture(scope="module")
def editor() -> Model:
    return model_of(Lumina(side=24, edit_side=16, step=4))


def same(a: list[Image.Image], b: list[Image.Image]) -> bool:
    return [one.tobytes() for one in a] == [one.tobytes() for one in b]


def test_mmada_draws_describes_and_mends(painter: Model) -> None:
    prompts = ["a cat", "a rather longer prompt"]
    together = painter.text_to_image(prompts, num_inference_steps=4)
    assert [one.size for one in together] == [(16, 16)] * 2
    alone = [painter.text_to_image(one, num_inference_steps=4)[0] for one in prompts]
    assert same(together, alone)
    *_, last = painter.draw_trajectory("a cat", num_inference_steps=4)
    assert same(last, together[:1])
    quick = replace(painter.defaults.answer, num_inference_steps=4, block_length=None)
    thinker = replace(painter, defaults=replace(painter.defaults, answer=quick))
    thoughtful = thinker.text_to_image(prompts, num_inference_steps=4, think=True)
    assert not same(thoughtful, together)
    *_, last = thinker.draw_trajectory(prompts, num_inference_steps=4, think=True)
    assert same(last, thoughtful)
    padded = replace(painter, prompt_template=Mmada(attend_pads=True))
    assert not same(padded.text_to_image("a cat", num_inference_steps=4), together[:1])
    before, mask = image(), Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 8, 16))
    after = painter.inpaint(before, mask, "a cat", num_inference_steps=3)
    assert after.crop((8, 0, 16, 16)).tobytes() == before.crop((8, 0, 16, 16)).tobytes()
    assert isinstance(painter.answer("what?", before, **FEW), str)
    assert isinstance(painter.infill("a [MASK:2]", image=before), str)
    assert painter.answer("what?", before, think=True, **FEW) != painter.answer(
        "what?", before, **FEW
    )


def test_masked_padding_changes_nothing(painter: Model) -> None:
    """Why MMaDA's prompts need none: positions are relative, and nothing else tells."""
    prompt_template, words = Mmada(), painter.codec
    codes = painter.encode([image()], "answer")[0]
    document = prompt_template.image_prompt(words, "a cat", image=codes).sequence
    left = Document((text_segment([words.vocabulary.pad_id] * 9),))
    alone = collate([document], words.vocabulary)
    shifted = replace(alone, position=alone.position + 9)
    hidden, moved = (painter.denoiser.hidden(alone.ids, batch) for batch in (alone, shifted))
    torch.testing.assert_close(hidden, moved, atol=1e-4, rtol=1e-3)  # rotation in float32
    packed = pack([document, left], words.vocabulary, length=len(document) + 9)
    assert torch.equal(packed.ids[0, : len(document)], alone.ids[0])
    beside = painter.denoiser.hidden(packed.ids, packed)
    torch.testing.assert_close(beside[:, : len(document)], hidden, atol=1e-5, rtol=1e-5)


def test_lumina_draws_any_shape(editor: Model) -> None:
    drawn = editor.text_to_image("a cat", num_inference_steps=4)
    assert drawn[0].size == (24, 24)
    wide = editor.text_to_image(
        ["a cat", "a dog, and more"], height=8, width=40, num_inference_steps=4
    )
    assert [one.size for one in wide] == [(40, 8)] * 2
    alone = editor.text_to_image("a cat", height=8, width=40, num_inference_steps=4)
    assert same(wide[:1], alone)
    *_, last = editor.draw_trajectory("a cat", height=8, width=40, num_inference_steps=4)
    assert same(last, alone)


def test_lumina_edits_looks_and_mends(editor: Model) -> None:
    edited = editor.edit(image(40, 20), "make it night", num_inference_steps=3)
    assert edited.size == (20, 12)  # 15 of at most 16 cells, nearest to 2 : 1 of those that fit
    few = {"num_inference_steps": 3}
    stay = editor.edit(image(40, 20), "make it night", image_guidance_scale=1.0, **few)
    free = editor.edit(image(40, 20), "make it night", guidance_scale=1.0, **few)
    off = editor.edit(
        image(40, 20), "make it night", guidance_scale=1.0, image_guidance_scale=1.0, **few
    )
    assert len({one.tobytes() for one in (edited, stay, free, off)}) > 2
    assert isinstance(editor.answer("what?", [image(), image(40, 20)], **FEW), str)
    together = editor.answer(["what?", "why, then?"], [image(), image(40, 20)], **FEW)
    assert together[1] == editor.answer("why, then?", image(40, 20), **FEW)
    before, mask = image(40, 20), Image.new("L", (40, 20), 0)
    mask.paste(255, (0, 0, 20, 20))
    after = editor.inpaint(before, mask, "x", **few)
    assert after.size == before.size
    assert after.crop((20, 0, 40, 20)).tobytes() == before.crop((20, 0, 40, 20)).tobytes()


# --- bad input ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bad:
    prompt_template: PromptTemplate
    call: Any
    says: str


@pytest.mark.parametrize(
    "bad",
    [
        Bad(Llada(), lambda m: m.answer(" "), "question ' ' is empty"),
        Bad(Llada(), lambda m: m.answer("a", max_new_tokens=0), "at least 1, got 0"),
        Bad(Llada(), lambda m: m.answer("a", max_new_tokens=2.5), "at least 1, got 2.5"),
        Bad(Llada(), lambda m: m.answer("a", temperature=-1), "must not be negative, got -1"),
        Bad(Llada(), lambda m: m.answer("a", block_length=0), "at least 1, got 0"),
        Bad(
            Llada(),
            lambda m: m.answer("a", max_new_tokens=9, block_length=3, num_inference_steps=2),
            "2 steps are too few for 3 blocks",
        ),
        Bad(Llada(), lambda m: m.answer("a", think=True), "not trained to think"),
        Bad(Llada(), lambda m: m.answer("a", image()), "reads only text and was given 1 image"),
        Bad(Llada(), lambda m: m.answer("<image>"), "has 1 <image> placeholder but was given 0"),
        Bad(Llada(), lambda m: m.answer(["a", "b"], [None]), "2 questions but 1 entries of imag"),
        Bad(Llada(), lambda m: m.answer("x" * 5000), "and leaves no room for 128 new ones"),
        Bad(Llada(), lambda m: m.answer("x", max_new_tokens=4096), "leaves no room for 4096 new"),
        Bad(Llada(), lambda m: m.complete(" "), "text ' ' is empty"),
        Bad(Llada(), lambda m: m.complete("x" * 4096), "leaves no room"),
        Bad(Llada(), lambda m: m.text_to_image("a"), "not trained for text_to_image; it is for"),
        Bad(Llada(), lambda m: m.caption(image()), "not trained for caption"),
        Bad(Llada(), lambda m: m.inpaint(image(), image()), "not trained for inpaint"),
        Bad(Llada(), lambda m: m.edit(image(), "x"), "not trained for edit"),
        Bad(Llada(), lambda m: m.infill("a [MASK]", image=image()), "was given 1 image"),
        Bad(Llada(), lambda m: m.chat([]), "the conversation is empty"),
        Bad(Llada(), lambda m: m.chat({"role": "user"}), "is a list of messages, not dict"),
        Bad(Llada(), lambda m: m.chat([SHORT, []]), "the conversation is empty"),
        Bad(Llada(), lambda m: m.chat([SHORT, SHORT], [[]]), "2 conversations but 1 entries"),
        Bad(LladaV(), lambda m: m.answer("a <image>", [image()] * 2), "1 <image> placeholder but"),
        Bad(LladaV(), lambda m: m.chat(SHORT, image()), "0 <image> placeholders but was given 1"),
        Bad(LladaV(), lambda m: m.answer("a", "missing.png"), "no image file at 'missing.png'"),
        Bad(Mmada(), lambda m: m.answer("a", [image()] * 2), "one image in a conversation"),
        Bad(Mmada(), lambda m: m.answer("a", image(1, 1)), "1x1 pixels is too small to be seen"),
        Bad(Mmada(), lambda m: m.caption(image(20000, 10)), "20000x10 pixels is too narrow"),
        Bad(Lumina(), lambda m: m.edit(image(10, 20000), "a"), "10x20000 pixels is too narrow"),
        Bad(LladaV(), lambda m: m.caption(image(1, 1)), "1x1 pixels is too small to be seen"),
        Bad(LladaV(), lambda m: m.answer("a", image(20000, 10)), "20000x10 pixels is too narrow"),
        Bad(LladaV(), lambda m: m.caption(3), "int is no image"),
        Bad(LladaV(), lambda m: m.caption(b"..."), "cannot read the image as an image"),
        Bad(Mmada(), lambda m: m.text_to_image("a", height=8), "images of 16 x 16 pixels only"),
        Bad(Lumina(), lambda m: m.text_to_image("a", think=True), "not trained to think before it"),
        Bad(
            Mmada(),
            lambda m: m.text_to_image("a", think=True, negative_prompt="b"),
            "negative_prompt 'b' has no place where the model thinks",
        ),
        Bad(Lumina(), lambda m: m.text_to_image("a", height=9), "height 9 is not a multiple of 4"),
        Bad(Lumina(), lambda m: m.edit(image(), " "), "instruction ' ' is empty"),
        Bad(Lumina(), lambda m: m.edit([], "x"), "there is no image to edit"),
        Bad(Lumina(), lambda m: m.chat(SHORT), "not trained for chat; it is for caption, answer"),
    ],
    ids=lambda bad: f"{bad.prompt_template.family}: {bad.says[:30]}",
)
def test_bad_calls_are_one_sentence(bad: Bad) -> None:
    with pytest.raises(ValueError, match=re.escape(bad.says)) as caught:
        bad.call(model_of(bad.prompt_template))
    assert "\n" not in str(caught.value)


def test_a_model_without_its_eyes_or_its_image_tokenizer_says_so() -> None:
    blind = model_of(LladaV())
    blind = replace(blind, denoiser=transformer(blind.denoiser.vocabulary))
    with pytest.raises(ValueError, match="without its vision adapter and cannot look at 1 image"):
        blind.answer("a", image())
    bare = replace(model_of(Mmada()), image_tokenizer=None)
    assert isinstance(bare.answer("a", **FEW), str)
    for call in (lambda: bare.text_to_image("a"), lambda: bare.answer("a", image())):
        with pytest.raises(ValueError, match="has no image tokenizer here, though .* 16 image cod"):
            call()


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_a_published_folder_is_spoken_to_as_its_family_is(family: str, tmp_path: Path) -> None:
    model, dream = model_of(LAYOUTS[family]), family == "dream"
    vocabulary = model.denoiser.vocabulary
    network = transformer(vocabulary, shift=dream, attention_bias=dream).float()
    network.save_pretrained(tmp_path / "ours")
    list(convert(tmp_path / "ours", tmp_path / family, to=family))
    model.text_tokenizer.save_pretrained(tmp_path / family)
    loaded = load(tmp_path / family, device="cpu", dtype=torch.float64)
    assert loaded.prompt_template is LAYOUTS[family]
    assert loaded.defaults == Defaults().updated(loaded.prompt_template.generation)
    hot = replace(model, denoiser=network.double(), defaults=loaded.defaults)
    assert loaded.answer("hi", **FEW) == hot.answer("hi", **FEW)
    (tmp_path / family / "generation_config.json").write_text('{"answer": {"temperature": 0.7}}')
    again = load(tmp_path / family, device="cpu").defaults.answer
    assert again == replace(loaded.defaults.answer, temperature=0.7)


def test_a_batch_of_nothing_is_nothing(speaker: Model) -> None:
    assert speaker.answer([]) == []
    assert speaker.complete([]) == []
