"""The Transformer on a GPU is the Transformer on a CPU: scores, gradients and what is sampled."""

from __future__ import annotations

import pytest
import torch

from mmdlm.core.sampling.sampler import Sampler
from mmdlm.core.sequence import Batch, collate
from tests.models.tiny import VOCABULARY, document, tiny_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
WITHIN = {"atol": 1e-4, "rtol": 1e-4}


def rows() -> Batch:
    return collate([document(5, 4, seed=1), document(3, 9, seed=2)], VOCABULARY)


def masked(batch: Batch) -> torch.Tensor:
    return batch.ids.masked_fill(batch.target, VOCABULARY.mask_id)


@pytest.mark.parametrize("device", DEVICES)
def test_scores_and_gradients_are_those_of_a_cpu(device: str) -> None:
    found = []
    for where in ("cpu", device):
        model, batch = tiny_model().to(where), rows().to(where)
        hidden = model.hidden(masked(batch), batch, query_mask=batch.target)
        logits = model.logits_at(hidden, batch.target)
        logits.logsumexp(-1).sum().backward()
        gradients = {name: one.grad.cpu() for name, one in model.named_parameters()}
        found.append({"logits": logits.detach().cpu(), **gradients})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, **WITHIN, msg=name)


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_sampled_greedily_is_what_a_cpu_samples(device: str) -> None:
    ids = []
    for where in ("cpu", device):
        batch = rows().to(where)
        generator = torch.Generator(where).manual_seed(0)
        out = Sampler(steps=4)(tiny_model().to(where), batch, generator=generator)
        ids.append(out.ids.cpu())
    assert torch.equal(*ids)
