"""Numbers of rows follow from the data, and those that do not fit are refused before a step."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerFast

from data_pipelines.shards.shards import write_shard
from data_pipelines.shards.stream import SequenceStream
from data_pipelines.sources.conversations import Conversation
from data_pipelines.sources.image_text import ImageText, Tasks
from data_pipelines.sources.preferences import Preference
from data_pipelines.sources.source import Source, encode_array
from data_pipelines.sources.text import Text
from data_pipelines.text_tokenizer import token_counts
from mmdlm.cli.recipe import run
from mmdlm.models.auto import PretrainedDenoiser
from mmdlm.vision.tokenizers.auto import load_image_tokenizer
from mmdlm.vision.tokenizers.base import ImageTokenizer
from tests.train.test_pretrain import recipe  # noqa: F401
from train import pretrain
from train.stages import document_lengths
from train.stages.denoising import Data, prompt_template_for_denoiser, read_sources, words_for
from train.stages.model_shape import Shape
from train.stages.row_lengths import settle, slots_for

ROOT = Path(__file__).parents[2]
CODES = 16  # of an image of the tiny image tokenizer
SMALL = Shape(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
CAPTIONS = ["red heart", "heart", "", "woman dark skin tone", "q" * 20, "red" * 3] * 2

Settle = Callable[..., tuple[Data, Shape | None, str]]


@pytest.fixture
def tokenizer(tiny_checkpoint: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(tiny_checkpoint)


@pytest.fixture
def images(tiny_checkpoint: Path) -> ImageTokenizer:
    return load_image_tokenizer(tiny_checkpoint / "image_tokenizer")


def captioned(folder: Path, captions: Sequence[str | list[str]]) -> Path:
    """A shard of images of codes with captions, which are texts or lists of them."""
    write_shard(
        folder / "0.tar",
        [
            {
                "__key__": f"{number:06d}",
                "txt": str(caption).encode(),
                "json": json.dumps({"captions": caption}).encode(),
                "codes.npy": encode_array(np.full(CODES, number % 25, np.uint16)),
            }
            for number, caption in enumerate(captions)
        ],
    )
    return folder


@pytest.fixture
def settled(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, images: ImageTokenizer) -> Settle:
    """settled(source options, model, data options, captions, prompts) -> what `settle` returns."""

    def call(
        model: Shape | PretrainedDenoiser = SMALL,
        *,
        captions: Sequence[str | list[str]] = CAPTIONS,
        prompts: Sequence[str] = (),
        read: Any = None,
        **data: Any,
    ) -> tuple[Data, Shape | None, str]:
        shards = str(captioned(tmp_path / "codes", captions))
        sources = data.pop("sources", None) or [Source(shards, read or ImageText())]
        is_new = isinstance(model, Shape)
        denoiser = model.build(tokenizer, images, seed=0, attention="sdpa") if is_new else model
        shape = model if is_new else None
        found = settle(
            Data(sources, **data),
            shape,
            denoiser,
            tokenizer,
            images,
            prompt_template_for_denoiser(denoiser),
            prompts=prompts,
        )
        if is_new:
            assert denoiser.config.text_slots == found[1].text_slots
            assert denoiser.config.max_position_embeddings == found[1].max_position_embeddings
        return found

    return call


def numbers(found: tuple[Data, Shape | None, str]) -> tuple[Any, ...]:
    """Text slots of source and model, length, positions."""
    data, model, _ = found
    assert model is not None
    slots = data.sources[0].to_sequence.text_slots
    return slots, model.text_slots, data.length, model.max_position_embeddings


# ---- what is left out is computed ----------------------------------------------------------------


def test_all_numbers_follow_from_captions_of_odd_lengths(settled: Settle, tokenizer) -> None:
    longest = max(token_counts(tokenizer, CAPTIONS)) + 1
    assert longest > 16
    found = settled()
    assert numbers(found) == (longest, longest, CODES + 2 + longest, CODES + 2 + longest)
    assert found[2] == (
        f"rows: text_slots {longest}, data.length {CODES + 2 + longest}, max_position_embeddings "
        f"{CODES + 2 + longest}, from all 12 documents; the longest text has {longest} tokens with "
        "its end"
    )
    data, model, _ = found
    again = settled(model, sources=data.sources)
    assert numbers(again) == numbers(found)


def test_what_was_computed_holds_each_document(settled: Settle, tokenizer, images) -> None:
    data, model, _ = settled()
    denoiser = model.build(tokenizer, images, seed=0, attention="sdpa")
    prompt_template = prompt_template_for_denoiser(denoiser)
    sources = read_sources(data, denoiser, words_for(denoiser, tokenizer, images), prompt_template)
    stream = SequenceStream(
        sources,
        denoiser.vocabulary,
        tokenizer=tokenizer,
        length=data.length,
        repeat=False,
        max_broken=0.0,
    )
    assert {len(one) for one in stream} == {data.length}


def test_short_captions_leave_room_for_longer_prompts(settled: Settle) -> None:
    assert numbers(settled(captions=["heart"]))[:2] == (16, 16)
    assert slots_for(3, cut=True) == 16
    assert slots_for(300, cut=True) == 64
    assert slots_for(300, cut=False) == 300


def test_the_longest_of_several_captions_counts(settled: Settle, tokenizer) -> None:
    captions = [["heart", "q" * 30], ["heart"]]
    most = token_counts(tokenizer, ["q" * 30])[0] + 1
    assert numbers(settled(captions=captions, read=ImageText(text="json.captions")))[0] == most


def test_names_of_special_tokens_count_as_the_letters_that_are_learned(settled: Settle) -> None:
    assert numbers(settled(captions=["<|endoftext|>" * 3]))[0] > 16


def test_prompts_have_room(settled: Settle, tokenizer) -> None:
    prompt = " " + "z" * 40 + " "
    most = token_counts(tokenizer, [prompt.strip()])[0] + 1
    assert numbers(settled(prompts=[prompt]))[:2] == (most, most)


def test_an_image_counts_however_seldom_it_is_there(settled: Settle) -> None:
    read = ImageText(Tasks(draw=1e-9, caption=0, text=1))
    assert numbers(settled(captions=["heart"], read=read))[2] == CODES + 2 + 16
    read = ImageText(Tasks(draw=0, caption=0, text=1))
    assert numbers(settled(captions=["heart"], read=read))[2] == 16


def test_numbers_that_are_given_stay(settled: Settle) -> None:
    found = settled(replace(SMALL, text_slots=30))
    assert numbers(found) == (30, 30, CODES + 32, CODES + 32)
    found = settled(read=ImageText(text_slots=40))
    assert numbers(found) == (40, 40, CODES + 42, CODES + 42)
    found = settled(replace(SMALL, max_position_embeddings=100), length=90)
    assert numbers(found)[2:] == (90, 100)


def test_long_texts_are_cut_on_request_and_counted(settled: Settle) -> None:
    captions = ["heart"] * 9 + ["q" * 200]
    found = settled(captions=captions, read=ImageText(cut_long_text=True))
    assert numbers(found)[:2] == (64, 64)
    assert found[2].endswith("; 1 of 10 texts of data.sources.0 are cut")


def test_of_many_documents_the_first_are_looked_at(
    settled: Settle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_lengths, "LOOKED_AT", 3)
    assert "from the first 3 documents of a source" in settled()[2]
    monkeypatch.setattr(document_lengths, "LOOKED_AT", len(CAPTIONS))
    assert f"from all {len(CAPTIONS)} documents" in settled()[2]
    monkeypatch.setattr(document_lengths, "LOOKED_BYTES", 100)
    assert "from the first 1 documents of a source" in settled()[2]


def test_texts_alone_have_no_slots(settled: Settle, tokenizer, tmp_path: Path) -> None:
    write_shard(tmp_path / "t.tar", [{"__key__": "a", "txt": b"red heart"}])
    source = Source(str(tmp_path / "t.tar"), Text(max_tokens=50))
    most = token_counts(tokenizer, ["red heart"])[0] + 1
    data, model, said = settled(sources=[source], packed=True)
    assert (data.length, model.text_slots, model.max_position_embeddings) == (most, None, 2048)
    assert "text_slots" not in said
    # beside images, texts of any length are wanted of the model
    images = Source(str(tmp_path / "codes"), ImageText())
    data, model, _ = settled(sources=[images, source])
    assert model.text_slots is None
    assert data.sources[0].to_sequence.text_slots is not None


def test_the_recipe_of_the_bundled_model_has_the_numbers_that_it_had() -> None:
    """As does its second stage, from the numbers of its first."""
    bundled = ROOT / "mmdlm" / "checkpoints" / "emoji"
    words = PreTrainedTokenizerFast.from_pretrained(bundled)
    images = load_image_tokenizer(bundled / "image_tokenizer")
    recipes = [
        yaml.safe_load((ROOT / "configs" / "pretrain" / f"{name}.yaml").read_text())
        for name in ("emoji", "emoji_balanced")
    ]
    shape = replace(Shape(**recipes[0]["model"]["shape"]), num_hidden_layers=1)
    denoiser = shape.build(words, images, seed=0, attention="sdpa")
    for one, model in zip(recipes, (shape, None), strict=True):
        (source,) = one["data"].pop("sources")
        options = source["to_sequence"]["init_args"]
        read = ImageText(**{**options, "tasks": Tasks(**options["tasks"])})
        data = Data([Source(str(ROOT / "tests/data/emoji_codes.tar"), read)], **one["data"])
        found = settle(
            data,
            model,
            denoiser,
            words,
            images,
            prompt_template_for_denoiser(denoiser),
            prompts=one["prompts"],
        )
        assert found[0].length == 82
        assert found[0].sources[0].to_sequence.text_slots == 16
        assert (denoiser.config.text_slots, denoiser.config.max_position_embeddings) == (16, 82)


# ---- what is given and does not fit is refused ---------------------------------------------------


WRONG = {
    "few slots": (
        SMALL,
        {"read": ImageText(text_slots=16)},
        ["2 of 12 texts of data.sources.0 take more than 16 tokens", "000004: 'qqqq"],
    ),
    "other slots": (
        replace(SMALL, text_slots=32),
        {"read": ImageText(text_slots=30)},
        ["text_slots 30", "text_slots 32", "differ in their text_slots"],
    ),
    "short rows": (SMALL, {"length": 20}, ["12 of 12 documents", "more than the 20 tokens"]),
    "few positions": (
        replace(SMALL, max_position_embeddings=82),
        {"length": 274},
        ["data.length is 274", "max_position_embeddings 82", "longer than the 82 positions"],
    ),
    "positions of documents that share a row": (
        replace(SMALL, max_position_embeddings=30),
        {"length": 274, "packed": True},
        ["12 of 12 documents", "more than the 30 positions"],
    ),
    "a long prompt": (
        SMALL,
        {"read": ImageText(text_slots=22), "prompts": ["z" * 40]},
        ["1 of 1 prompts take more than 22 tokens", "'zzz"],
    ),
}


@pytest.mark.parametrize("model, options, named", WRONG.values(), ids=WRONG.keys())
def test_numbers_that_do_not_fit_are_named_with_some_that_would(
    model: Shape, options: dict[str, Any], named: list[str], settled: Settle
) -> None:
    with pytest.raises(ValueError, match="^the lengths of rows do not fit: ") as error:
        settled(model, **options)
    said = str(error.value)
    for part in (*named, "data.length is", "has text_slots", "max_position_embeddings"):
        assert part in said
    # what it says would do does
    remedy = said.rpartition("; ")[2]
    slots, length, positions = (
        int(word.rstrip(",")) for word in remedy.split() if word.rstrip(",").isdigit()
    )
    shape = replace(SMALL, text_slots=slots, max_position_embeddings=positions)
    read = ImageText(text_slots=slots)
    prompts = options.get("prompts", ())
    found = settled(shape, read=read, length=length, prompts=prompts)
    assert numbers(found) == (slots, slots, length, positions)
    settled(prompts=prompts)  # as does leaving them out


def test_rows_of_several_documents_may_be_longer_than_the_positions(settled: Settle) -> None:
    shape = replace(SMALL, max_position_embeddings=CODES + 2 + 24)
    data, _, said = settled(shape, length=274, packed=True)
    assert (data.length, data.packed) == (274, True)
    assert "data.length 274" in said


def test_a_few_texts_that_are_too_long_are_left_to_the_loader(settled: Settle) -> None:
    """Which skips and lists them, up to `max_broken`."""
    captions = ["heart"] * 150 + ["q" * 30]
    found = settled(captions=captions, read=ImageText(text_slots=16), max_broken=0.01)
    assert "1 of 151 texts of data.sources.0 are left out" in found[2]
    with pytest.raises(ValueError, match="1 of 151 texts"):
        settled(captions=captions, read=ImageText(text_slots=16), max_broken=0.001)


def test_a_model_to_start_from_keeps_its_numbers(settled: Settle, tokenizer, images) -> None:
    shape = replace(SMALL, text_slots=24, max_position_embeddings=CODES + 26)
    start = shape.build(tokenizer, images, seed=0, attention="sdpa")
    data, model, _ = settled(start)
    assert (data.sources[0].to_sequence.text_slots, data.length, model) == (24, CODES + 26, None)
    with pytest.raises(
        ValueError,
        match=r"the model to start from has text_slots 24.*shorten texts.*cut_long_text: true",
    ):
        settled(start, captions=["q" * 30])
    data, _, said = settled(start, captions=["q" * 30], read=ImageText(cut_long_text=True))
    assert data.length == CODES + 26
    assert "1 of 1 texts of data.sources.0 are cut" in said
    with pytest.raises(ValueError, match="rows of 60 tokens.*text_slots 24, data.length 42 would"):
        settled(start, length=60)
    small = replace(shape, max_position_embeddings=30)
    with pytest.raises(ValueError, match="start from a model with more positions"):
        settled(small.build(tokenizer, images, seed=0, attention="sdpa"))


def test_documents_that_cannot_be_used_are_told_at_once(settled: Settle, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none of 12 documents can be used; the last: .*captionz"):
        settled(read=ImageText(text="json.captionz"))
    write_shard(tmp_path / "empty.tar", [])
    with pytest.raises(ValueError, match="none of 0 documents can be used; .*empty"):
        settled(sources=[Source(str(tmp_path / "empty.tar"), ImageText())])


def test_conversations_need_a_length(settled: Settle, tokenizer, images) -> None:
    source = Source(str(ROOT / "tests/data/conversations.tar"), Conversation())
    with pytest.raises(ValueError, match=r"data\.length is null, but conversations"):
        settled(sources=[source])
    data, model, _ = settled(sources=[source], length=300)
    assert (data.length, model.text_slots, model.max_position_embeddings) == (300, None, 2048)
    denoiser = model.build(tokenizer, images, seed=0, attention="sdpa")
    known = words_for(denoiser, tokenizer, images)
    with pytest.raises(ValueError, match=r"data\.length is null.* up to the 2048 tokens"):
        read_sources(Data([source]), denoiser, known, prompt_template_for_denoiser(denoiser))


def test_a_document_in_a_shared_row_that_is_longer_than_the_positions_is_no_good(
    tokenizer, images, tmp_path: Path
) -> None:
    """Of those that were not looked at, too."""
    shape = replace(SMALL, text_slots=16, max_position_embeddings=CODES + 2 + 15)
    denoiser = shape.build(tokenizer, images, seed=0, attention="sdpa")
    source = Source(str(captioned(tmp_path / "codes", CAPTIONS)), ImageText(text_slots=16))
    data = Data([source], length=100, packed=True)
    known = words_for(denoiser, tokenizer, images)
    sources = read_sources(data, denoiser, known, prompt_template_for_denoiser(denoiser))
    stream = SequenceStream(
        sources, denoiser.vocabulary, tokenizer=tokenizer, length=100, max_broken=0.0
    )
    with pytest.raises(ValueError, match="a document of 34 tokens is longer than the 33 positions"):
        next(stream)


def test_a_row_of_a_pair_may_be_longer_than_the_positions(tokenizer, images) -> None:
    """Its two documents have positions each."""
    shape = replace(SMALL, max_position_embeddings=40)
    denoiser = shape.build(tokenizer, images, seed=0, attention="sdpa")
    known, prompt_template = (
        words_for(denoiser, tokenizer, images),
        prompt_template_for_denoiser(denoiser),
    )
    url = str(ROOT / "tests/data/preferences.tar")
    (source,) = read_sources(
        Data([Source(url, Preference())], length=80), denoiser, known, prompt_template
    )
    assert source.to_sequence.positions == 40
    with pytest.raises(ValueError, match="length is 80, but the model takes 40"):
        read_sources(
            Data([Source(url, Conversation())], length=80), denoiser, known, prompt_template
        )


# ---- through the recipe --------------------------------------------------------------------------


def without_numbers(path: Path) -> dict[str, Any]:
    config = json.loads(path.read_text())
    del config["data"]["sources"][0]["to_sequence"]["init_args"]["text_slots"]
    del config["data"]["length"], config["model"]["shape"]["text_slots"]
    config["training"] |= {"max_steps": 1, "gradient_accumulation_steps": 1}
    return config


def started(config: dict[str, Any], folder: Path, *more: str) -> Path:
    path, out = folder / "numbers.json", folder / "out"
    path.write_text(json.dumps(config))
    sys.argv = ["recipe", "--config", str(path), "--out", str(out), *more]
    run(pretrain.main)
    return out


@pytest.fixture(autouse=True)
def _arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)


@pytest.mark.slow
def test_a_run_records_its_numbers_and_goes_on_with_them(
    recipe: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = without_numbers(recipe)
    out = started(config, tmp_path)
    assert "rows: text_slots 16, data.length 34, max_position_embe" in capsys.readouterr().out
    told = json.loads((out / "step_00000001" / "settings.json").read_text())
    assert told["data"]["length"] == 34
    assert told["data"]["sources"][0]["to_sequence"]["text_slots"] == 16
    assert told["model"]["shape"]["max_position_embeddings"] == 34
    final = json.loads((out / "final" / "config.json").read_text())
    assert (final["text_slots"], final["max_position_embeddings"]) == (16, 34)
    config["training"]["max_steps"] = 2
    started(config, tmp_path)
    assert (out / "step_00000002").is_dir()


def test_a_run_with_wrong_numbers_never_starts(
    recipe: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pretrain, "fit", None)
    config = without_numbers(recipe)
    wrong = ["--data.packed=false", "--data.length=274", "--model.shape.max_position_embeddings=82"]
    with pytest.raises(SystemExit) as status:
        started(config, tmp_path, *wrong)
    assert status.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "data.length is 274, model has max_position_embeddings 82; but rows of 274" in said
    assert "data.length 34, model.shape.max_position_embeddings 34 would do" in said
    assert not (tmp_path / "out").exists()
