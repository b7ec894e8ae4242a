"""`generate` on the model classes: our sampler under transformers' names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    GenerationConfig,
    PreTrainedTokenizerFast,
    TextDiffusionStreamer,
)

from mmdlm.core.sampling.sampler import Sampler
from mmdlm.core.sequence import Sequence, collate, text_segment
from mmdlm.models.encoder import MmdlmEncoder
from mmdlm.models.encoder_config import MmdlmEncoderConfig
from tests.models.tiny import VOCABULARY, tiny_model

PROMPT = torch.tensor([[3, 4, 5, 6]])


class Letters:
    """A tokenizer whose id n is the n-th letter."""

    def decode(self, token_ids: Any, **options: Any) -> str:
        return "".join(chr(97 + int(one)) for one in torch.as_tensor(token_ids).flatten())


class Recorder:
    """A streamer that keeps what it is told."""

    def __init__(self) -> None:
        self.final: list[list[int]] = []
        self.drafts: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.final.append(value.flatten().tolist())

    def put_draft(self, value: Tensor) -> None:
        self.drafts.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def by_the_sampler(model: Any, prompt: list[int], count: int, **options: Any) -> list[int]:
    """The same text from our own parts."""
    sequence = Sequence((text_segment(prompt), text_segment([0] * count, target=True)))
    sampler = Sampler(**{"steps": count, "stop_ids": (VOCABULARY.eos_id,), **options})
    batch = collate([sequence], VOCABULARY)
    ids = sampler(model, batch, generator=torch.Generator().manual_seed(0)).ids[0].tolist()
    new = ids[len(prompt) :]
    if VOCABULARY.eos_id in new:
        end = new.index(VOCABULARY.eos_id) + 1
        new[end:] = [VOCABULARY.pad_id] * (count - end)
    return prompt + new


def test_a_model_of_blocks_writes_them_one_after_the_other() -> None:
    """Also behind left padding; what is kept changes nothing."""
    model = tiny_model(block_length=4)
    short, long = PROMPT[0, :2].tolist(), PROMPT[0].tolist()
    expected = [by_the_sampler(model, one, 9) for one in (short, long)]
    pad = [VOCABULARY.pad_id] * (len(long) - len(short))
    found = model.generate(
        torch.tensor([pad + short, long]),
        attention_mask=torch.tensor([[0] * len(pad) + [1] * len(short), [1] * len(long)]),
        max_new_tokens=9,
    )
    assert found.tolist() == [pad + expected[0], expected[1]]


@pytest.mark.parametrize("seed", range(3))
def test_generate_is_our_sampler(seed: int) -> None:
    model = tiny_model(seed=seed)
    expected = by_the_sampler(model, PROMPT[0].tolist(), 8, block_length=4)
    found = model.generate(PROMPT, max_new_tokens=8, block_length=4)
    assert found.tolist() == [expected]
    config = GenerationConfig(max_new_tokens=8)
    config.block_length = 4
    assert torch.equal(model.generate(PROMPT, generation_config=config), found)
    assert torch.equal(model.generate(PROMPT, max_length=12, block_length=4), found)
    assert torch.equal(
        model.generate(
            input_ids=PROMPT, generation_config={"max_new_tokens": 8, "block_length": 4}
        ),
        found,
    )


def test_padding_on_the_left_changes_no_text() -> None:
    model = tiny_model(seed=1)
    both = torch.tensor([[3, 4, 5, 6], [VOCABULARY.pad_id, VOCABULARY.pad_id, 7, 8]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    found = model.generate(both, attention_mask=mask, max_new_tokens=6)
    assert found[0].tolist() == by_the_sampler(model, [3, 4, 5, 6], 6)
    assert found[1, 2:].tolist() == by_the_sampler(model, [7, 8], 6)


def test_draws_follow_the_generator() -> None:
    model = tiny_model(seed=2)

    def drawn(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(PROMPT, max_new_tokens=12, do_sample=True, generator=generator)

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))
    torch.manual_seed(5)
    first = model.generate(PROMPT, max_new_tokens=12, temperature=1.0)
    torch.manual_seed(5)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=12, temperature=1.0), first)
    assert torch.equal(
        model.generate(PROMPT, max_new_tokens=12, temperature=1.0, do_sample=False),
        model.generate(PROMPT, max_new_tokens=12),
    )


def test_a_stop_string_ends_a_text() -> None:
    model = tiny_model(seed=0)
    whole = model.generate(PROMPT, max_new_tokens=10, eos_token_id=22, suppress_tokens=[22])
    text = Letters().decode(whole[0, 4:])
    stop = text[3:5]
    length = text.index(stop) + 2
    found = model.generate(
        PROMPT,
        max_new_tokens=10,
        eos_token_id=22,
        suppress_tokens=[22],
        stop_strings=stop,
        tokenizer=Letters(),
        block_length=1,
        num_inference_steps=10,
    )
    in_order = model.generate(
        PROMPT, max_new_tokens=10, eos_token_id=22, suppress_tokens=[22], block_length=1
    )
    text = Letters().decode(in_order[0, 4:])
    length = text.index(stop) + 2 if stop in text else 10
    assert Letters().decode(found[0, 4 : 4 + length]) == text[:length]
    assert found[0, 4 + length :].tolist() == [VOCABULARY.pad_id] * (10 - length)
    with pytest.raises(ValueError, match="tokenizer="):
        model.generate(PROMPT, stop_strings=["a"])


def test_a_streamer_sees_final_tokens_once_and_drafts_of_the_rest() -> None:
    model, recorder = tiny_model(seed=1), Recorder()
    found = model.generate(PROMPT, max_new_tokens=8, streamer=recorder)
    prompt, *parts = recorder.final
    assert prompt == PROMPT[0].tolist()
    said = [one for part in parts for one in part]
    rest = found[0, 4:].tolist()
    assert said == rest[: len(said)]
    assert set(rest[len(said) :]) <= {VOCABULARY.pad_id}
    assert recorder.ended
    assert recorder.drafts
    assert all(VOCABULARY.mask_id in draft for draft in recorder.drafts[:1])
    with pytest.raises(ValueError, match="one text"):
        model.generate(PROMPT.repeat(2, 1), streamer=Recorder())


def test_transformers_own_streamer_prints(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mmdlm.models.modeling import MmdlmForMaskedDiffusion

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_checkpoint)
    model = MmdlmForMaskedDiffusion.from_pretrained(tiny_checkpoint).eval()
    prompt = torch.tensor([tokenizer.encode("red heart")])
    streamer = TextDiffusionStreamer(tokenizer, skip_prompt=True)
    found = model.generate(prompt, max_new_tokens=6, streamer=streamer)
    printed = capsys.readouterr().out
    assert "\033[33m" in printed
    assert printed.endswith("\n")
    text = tokenizer.decode(found[0, prompt.shape[1] :], skip_special_tokens=True)
    assert text.split()[:1] == [] or text.split()[0] in printed


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"num_beams": 4}, "num_beams"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_length": 4}, "above the prompt"),
        ({"top_p": 2.0}, "top_p"),
        ({"pixel_values": torch.ones(1, 3, 8, 8)}, "vision"),
        ({"attention_mask": torch.ones(1, 9)}, "does not fit prompts"),
    ],
)
def test_what_generate_does_not_take_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        tiny_model().generate(PROMPT, **options)


def test_an_encoder_writes_as_well() -> None:
    encoder = BertConfig(
        vocab_size=VOCABULARY.size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=VOCABULARY.pad_id,
    )
    config = MmdlmEncoderConfig(vocabulary=VOCABULARY.to_dict(), encoder=encoder.to_dict())
    model = MmdlmEncoder(config).eval()
    assert model.generate(PROMPT, max_new_tokens=5).shape == (1, 9)
    with pytest.raises(ValueError, match="no images"):
        model.generate(PROMPT, pixel_values=torch.ones(1, 3, 8, 8))
