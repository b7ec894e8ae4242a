"""Models of block diffusion as users ask them: SDAR and Fast-dLLM v2."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdlm import load
from mmdlm.core.sampling.block_rules import BlockTransfer
from mmdlm.core.sampling.cache import FinishedBlocks
from mmdlm.core.sampling.unmasking import Threshold
from mmdlm.pipeline.convert import convert
from mmdlm.pipeline.model import Model
from mmdlm.pipeline.task_defaults import Defaults
from mmdlm.templates.auto import LAYOUTS
from tests.templates.tiny import transformer, words_of

SHAPES: dict[str, dict[str, Any]] = {
    "sdar": {"block_length": 4, "qk_norm": True},
    "fast_dllm": {"block_length": 16, "shift": True, "attention_bias": True},
}
FEW: dict[str, Any] = {"max_new_tokens": 10, "num_inference_steps": 5}
TALKS = [
    [{"role": "user", "content": "hi"}],
    [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "and 3 + 3, and why, at some length?"},
    ],
]


def model_of(family: str) -> Model:
    """Random weights in float64; the family's own sampling."""
    words, template = words_of(family), LAYOUTS[family]
    return Model(
        transformer(words.vocabulary, **SHAPES[family]),
        words.tokenizer,
        max_length=4096,
        defaults=Defaults().updated(template.generation),
        prompt_template=template,
    )


@pytest.fixture(scope="module", params=SHAPES)
def speaker(request: pytest.FixtureRequest) -> Model:
    return model_of(request.param)


def test_rows_do_not_meet(speaker: Model) -> None:
    together = speaker.chat(TALKS, **FEW)
    assert together == [speaker.chat(one, **FEW) for one in TALKS]
    guided = speaker.chat(TALKS, guidance_scale=2.0, **FEW)
    assert guided == [speaker.chat(one, guidance_scale=2.0, **FEW) for one in TALKS]
    assert guided != together
    texts = ["once upon", "a"]
    assert speaker.complete(texts, **FEW) == [speaker.complete(one, **FEW) for one in texts]


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_cache_is_there_and_changes_no_answer(speaker: Model, scale: float) -> None:
    config = replace(speaker.defaults.complete, guidance_scale=scale, cache=None)
    prompts = [
        speaker.prompt_template.completion_prompt(speaker.codec, text, length=10)
        for text in ("once upon a time", "a")
    ]
    run = speaker.generation_run(prompts, generation_config=config, generator=None)
    assert run.sampler.cache == FinishedBlocks()
    anew = replace(run, sampler=replace(run.sampler, cache=None))
    assert torch.equal(run.run(), anew.run())


def test_blocks_are_written_whole(speaker: Model) -> None:
    """An answer has the tokens that were asked for, and they are those of a longer one."""
    template, codec = speaker.prompt_template, speaker.codec
    block = speaker.denoiser.block_length
    config = replace(speaker.defaults.complete, num_inference_steps=10)
    found = []
    for length in (10, 11):
        prompt = template.completion_prompt(codec, "abc", length=length)
        scaled = replace(config, num_inference_steps=length)
        run = speaker.generation_run([prompt], generation_config=scaled, generator=None)
        (ids,) = run.results(run.run())
        assert len(ids) == length
        assert run.batch.ids.shape[1] % block == 0
        assert run.sampler.steps == (run.sampler.block_length or block)
        found.append(ids)
    assert torch.equal(found[0], found[1][:10])


def test_counts_are_of_whole_blocks() -> None:
    model = model_of("sdar")
    prompt = model.prompt_template.completion_prompt(model.codec, "abc", length=8)
    config = replace(model.defaults.complete, num_inference_steps=4)
    run = model.generation_run([prompt], generation_config=config, generator=None)
    assert run.sampler.unmasking == Threshold(0.85, fallback=BlockTransfer(4))
    assert run.sampler.steps == 2


def test_a_length_that_does_not_fit_is_refused(speaker: Model) -> None:
    with pytest.raises(ValueError, match="block_length 7 does not divide the blocks of"):
        speaker.answer("hi", block_length=7, **FEW)
    assert isinstance(speaker.answer("hi", block_length=2, **FEW), str)


def test_a_cache_of_blocks_needs_blocks() -> None:
    words = words_of("dream")
    dream = Model(
        transformer(words.vocabulary, shift=True),
        words.tokenizer,
        defaults=Defaults().updated({"answer": {"cache": "blocks"}}),
        prompt_template=LAYOUTS["dream"],
    )
    with pytest.raises(ValueError, match="this batch is not cut into blocks"):
        dream.answer("hi", **FEW)


@pytest.mark.parametrize("family", SHAPES)
def test_a_published_folder_is_spoken_to_as_its_family_is(family: str, tmp_path: Path) -> None:
    """Also a model that was born here and is written in the family's format."""
    model = model_of(family)
    network = transformer(model.denoiser.vocabulary, **SHAPES[family]).float()
    network.save_pretrained(tmp_path / "ours")
    list(convert(tmp_path / "ours", tmp_path / family, to=family))
    model.text_tokenizer.save_pretrained(tmp_path / family)
    loaded = load(tmp_path / family, device="cpu", dtype=torch.float64)
    assert loaded.prompt_template is LAYOUTS[family]
    assert loaded.defaults == model.defaults
    assert loaded.denoiser.block_length == SHAPES[family]["block_length"]
    own = replace(model, denoiser=network.double())
    assert loaded.answer("hi", **FEW) == own.answer("hi", **FEW)


def test_no_other_family_takes_its_blocks(tmp_path: Path) -> None:
    shape = {"block_length": 4, "shift": True, "attention_bias": True}
    transformer(words_of("dream").vocabulary, **shape).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="dream cannot say block_length = 4"):
        list(convert(tmp_path / "ours", tmp_path / "dream", to="dream"))
