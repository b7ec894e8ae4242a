"""Compiled layers stay compiled, however they are called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mmdlm.core.sampling.sampler import Sampler
from mmdlm.core.sequence import Batch, collate
from mmdlm.models.compilation import compile_layers
from mmdlm.models.modeling import MmdlmForMaskedDiffusion
from tests.core.fakes import VOCABULARY, document, rng
from tests.models.tiny import tiny_model


def batch_of(number: int) -> Batch:
    """Ragged prompts and answers, of other lengths in each round."""
    documents = [
        document(3 + number, 4, seed=10 * number + i, prompt=2 + (3 * number + 5 * i) % 7)
        for i in range(4)
    ]
    return collate(documents, VOCABULARY)


def training_sequence(model: nn.Module, denoiser: MmdlmForMaskedDiffusion, batch: Batch) -> None:
    """One round: rollouts, a reference without the adapter, and two ways to learn."""
    denoiser.eval()
    Sampler(steps=4, temperature=1.0)(denoiser, batch, generator=rng())
    with torch.no_grad(), model.disable_adapter():  # type: ignore[operator]
        denoiser.hidden(batch.ids, batch, query_mask=batch.target)
    denoiser.train()
    denoiser.gradient_checkpointing_enable({"use_reentrant": False})
    denoiser.hidden(batch.ids, batch, query_mask=batch.target).sum().backward()
    denoiser.gradient_checkpointing_disable()
    denoiser.hidden(batch.ids, batch).sum().backward()


@pytest.fixture
def _limit_of_torch() -> Iterator[None]:
    """As torch has it, whatever ran before; monkeypatch would hide the setting afterwards."""
    with torch._dynamo.config.patch(recompile_limit=8):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("_limit_of_torch")
def test_layers_stay_compiled_from_round_to_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under LoRA, dropout, recomputing and ragged prompts."""
    peft = pytest.importorskip("peft")
    torch._dynamo.reset()
    compiled, called = [0], [0]

    def backend(graph: torch.fx.GraphModule, given: Any) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            compiled[0] += 1
            return graph(*inputs)

        return run

    compile_ = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda module, mode: compile_(module, backend=backend)
    )
    options = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.1)
    model = peft.get_peft_model(
        tiny_model(vocabulary=VOCABULARY.to_dict(), num_hidden_layers=3), options
    )
    denoiser = model.base_model.model
    compile_layers(denoiser)
    for layer in denoiser.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.register_forward_pre_hook(lambda *_: called.__setitem__(0, called[0] + 1))
    for number in range(6):
        compiled[0] = called[0] = 0
        training_sequence(model, denoiser, batch_of(number))
        assert called[0] > 15
        if number:
            assert compiled[0] >= 0.9 * called[0]
