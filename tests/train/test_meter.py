"""What a run says of its speed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmdlm.core.diffusion.forward import Absorbing
from mmdlm.core.diffusion.schedule import Linear
from mmdlm.core.losses.objective import Objective
from mmdlm.core.sequence import pack
from mmdlm.core.vocabulary import GENERATED
from mmdlm.models.costs import Costs, Machine
from mmdlm.models.modeling import MmdlmForMaskedDiffusion
from tests.core.fakes import VOCABULARY, document, ragged, rng
from tests.models.tiny import tiny_model
from train.stages.denoising import load_of
from train.stages.meter import Load, Meter

CPU = torch.device("cpu")


def network() -> MmdlmForMaskedDiffusion:
    """Over the ids of the fakes."""
    return tiny_model(vocabulary=VOCABULARY.to_dict())


def test_rates_are_over_all_steps_since_the_last_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.stages.meter._rate", lambda *_: 1000.0)
    meter = Meter(CPU, torch.float32, processes=2)
    meter.add(Load(100, 40, torch.tensor(300.0)), seconds=1.5, waited=0.5)
    meter.add(Load(60, 10, torch.tensor(700.0)), seconds=0.5, waited=0.3)
    found = meter.read()
    assert found.pop("peak_memory_gb") > 0
    assert found == {
        "data_share": 0.4,
        "tokens_per_second": 160.0,
        "target_tokens_per_second": 50.0,
        "mfu": 0.5,
    }
    meter.add(Load(10, 10), seconds=1.0, waited=0.0)
    assert meter.read().keys() == {
        *("data_share", "peak_memory_gb", "tokens_per_second", "target_tokens_per_second")
    }
    meter.add(None, seconds=1.0, waited=1.0)
    assert meter.read().keys() == {"data_share", "peak_memory_gb"}


def test_the_load_of_a_batch() -> None:
    model, batch = network(), ragged()
    corruption = Objective(Absorbing(Linear())).corrupt(batch, VOCABULARY, generator=rng())
    load = load_of(model, batch, corruption.is_noised)
    assert load.tokens == int((~batch.is_padding).sum())
    assert load.targets == int(batch.target.sum())
    twice = load_of(model, batch, torch.cat([corruption.is_noised, torch.zeros_like(batch.target)]))
    assert (twice.tokens, twice.targets) == (2 * load.tokens, load.targets)
    # operations as torch counts them, of each document alone: attention sees no other
    documents = [batch.rows(torch.tensor([row])) for row in range(len(batch))]
    counted = 0
    for row, one in enumerate(documents):
        length = int((~one.is_padding).sum())
        one = replace(
            one,
            **{
                name: getattr(one, name)[:, :length]
                for name in ("ids", "modality", "target", "document", "segment", "position")
            },
        )
        masked = corruption.is_noised[row : row + 1, :length]
        if not bool(masked.any()):
            counted += int(Costs(model.config).training(tokens=length, pairs=length**2, head=0))
            continue
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            hidden = model.hidden(one.ids, one)
            total = hidden.sum() * 0
            for kind in GENERATED:
                ids = VOCABULARY.range(kind)
                total = total + model.logits_at(hidden, masked & one.of(kind), ids=ids).sum()
            total.backward()
        counted += counter.get_total_flops()
    assert float(load.flops) == pytest.approx(counted, rel=0.01)


def test_packing_counts_pairs_within_documents_alone() -> None:
    model = network()
    documents = [document(9, 8, seed=seed) for seed in range(4)]
    packed = pack(documents, VOCABULARY, length=4 * len(documents[0]))
    alone = pack(documents, VOCABULARY, length=len(documents[0]))
    assert len(packed) == 1
    loads = [load_of(model, one, one.target) for one in (packed, alone)]
    assert loads[0].tokens == loads[1].tokens
    assert float(loads[0].flops) == float(loads[1].flops)


def test_frozen_layers_need_no_gradients_of_weights() -> None:
    model, batch = network(), ragged()
    whole = load_of(model, batch, batch.target)
    model.model.requires_grad_(False)
    frozen = load_of(model, batch, batch.target)
    saved = 2 * whole.tokens * Costs(model.config).body
    assert float(whole.flops - frozen.flops) == saved
    layer = model.model.layers[0].mlp.up_proj  # as LoRA does: a few beside many that are frozen
    layer.weight.requires_grad_(True)
    share = layer.weight.numel() / sum(p.numel() for p in model.model.layers.parameters())
    some = load_of(model, batch, batch.target)
    assert float(some.flops - frozen.flops) == pytest.approx(share * saved)


@pytest.mark.slow
def test_the_machine_is_measured() -> None:
    machine = Machine.measure(CPU, torch.float32)
    assert 1e8 < machine.flops < 1e14
    assert 1e8 < machine.bandwidth < 1e13
    assert machine.seconds([(machine.flops, machine.bandwidth / 2)]) == 1
    assert machine.seconds([(machine.flops, machine.bandwidth * 2)]) == 2
