"""diffusers' pipeline of block refinement writes text by a model of ours, and only text."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdlm import load
from mmdlm.core.sequence import collate
from mmdlm.pipeline.model import Model
from mmdlm.pipeline.text_network import TextNetwork
from mmdlm.templates.chat_template import PLAIN


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Model:
    model = load(tiny_checkpoint, device="cpu")
    model.text_tokenizer.chat_template = PLAIN
    return model


def test_logits_are_those_that_the_sampler_sees(model: Model) -> None:
    prompt = model.prompt_template.infill_prompt(model.codec, "woman [MASK:3] tone")
    batch = collate([prompt.sequence], model.denoiser.vocabulary)
    text = batch.modality[0] == 1
    ids = batch.ids[:, text]
    vocabulary = model.denoiser.vocabulary
    logits = model.text_network(ids).logits
    assert logits.shape == (*ids.shape, vocabulary.size)
    start, stop = vocabulary.text
    lowest = torch.finfo(logits.dtype).min
    assert bool((logits[..., stop:] == lowest).all())
    padded = torch.nn.functional.pad(ids, (0, 5), value=vocabulary.pad_id)
    mask = (torch.arange(padded.shape[1]) < ids.shape[1]).long()[None]
    behind = model.text_network(padded, attention_mask=mask).logits[:, : ids.shape[1]]
    torch.testing.assert_close(behind[..., start:stop], logits[..., start:stop])
    with torch.no_grad():
        plain = model.denoiser(ids).logits
    torch.testing.assert_close(plain[..., start:stop], logits[..., start:stop])


def test_shifted_logits_stand_at_the_token_that_they_predict(model: Model) -> None:
    network = copy.deepcopy(model.denoiser)
    network.config.shift = True
    ids = torch.tensor([model.codec.encode("red heart woman")])
    start, stop = network.vocabulary.text
    logits = TextNetwork(network, model.device)(ids).logits[..., start:stop]
    with torch.no_grad():
        published = network(ids).logits[..., start:stop]  # those at i predict token i + 1
    torch.testing.assert_close(logits[:, 1:], published[:, :-1])


def test_diffusers_writes_text_and_nothing_else(model: Model) -> None:
    diffusers = pytest.importorskip("diffusers")
    if not hasattr(diffusers, "LLaDA2Pipeline"):
        pytest.skip("diffusers is older than LLaDA2Pipeline")
    vocabulary = model.denoiser.vocabulary

    def written(network: object) -> Any:
        pipe = diffusers.LLaDA2Pipeline(
            model=network,
            scheduler=diffusers.BlockRefinementScheduler(),
            tokenizer=model.text_tokenizer,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            "red heart",
            gen_length=16,
            block_length=8,
            num_inference_steps=8,
            temperature=1.0,
            mask_token_id=vocabulary.mask_id,
            eos_early_stop=False,
            editing_threshold=None,
            generator=torch.Generator().manual_seed(0),
            output_type="text",
        )

    output = written(model.text_network)
    start, stop = vocabulary.text
    assert output.sequences.shape == (1, 16)
    assert bool(((output.sequences >= start) & (output.sequences < stop)).all())
    assert isinstance(output.texts[0], str)
    # As the network has it, without its ranges, image codes do come up: the test can fail.
    assert bool((written(model.denoiser).sequences >= stop).any())
