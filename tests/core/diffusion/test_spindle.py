"""Tokens that say much are masked early, and the loss is the bound all the same."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmdlm.core.diffusion.forward import Absorbing, PerModality
from mmdlm.core.diffusion.schedule import Linear
from mmdlm.core.diffusion.spindle import Spindle
from mmdlm.core.losses.objective import ModalityLoss, Objective
from mmdlm.core.losses.token_losses import SpindleBound, TokenLoss, Tokens, WeightedCrossEntropy
from mmdlm.core.sequence import Sequence, collate, text_segment
from mmdlm.core.vocabulary import Vocabulary
from mmdlm.experimental.score_entropy import ScoreEntropy
from tests.core.fakes import TEXT, VOCABULARY, TinyDenoiser, copies, document, ragged, rng

V = 3
SMALL = Vocabulary(size=V + 1, text=(0, V), image=(V, V), mask_id=V, pad_id=V, eos_id=0)


def counted(folder: Path, counts: list[int]) -> Path:
    path = folder / "counts.pt"
    torch.save(torch.tensor(counts), path)
    return path


@pytest.fixture
def process(tmp_path: Path) -> Spindle:
    """Every token of the fakes' vocabulary twice as frequent as the next."""
    return Spindle(counted(tmp_path, [2**i for i in range(TEXT)][::-1]), strength=0.3)


def test_touches_targets_only(process: Spindle):
    batch = ragged()
    t = torch.rand(batch.ids.shape, generator=rng())
    corruption = process.corrupt(batch, t, VOCABULARY, generator=rng())
    assert corruption.is_noised.any()
    assert not (corruption.is_noised & ~batch.target).any()
    assert torch.equal(corruption.x_t[~corruption.is_noised], batch.ids[~corruption.is_noised])
    assert (corruption.x_t[corruption.is_noised] == VOCABULARY.mask_id).all()
    for part in (corruption.p_mask, corruption.weight):
        assert torch.isfinite(part[batch.target]).all()


def test_clean_at_0_and_all_noise_at_1(process: Spindle):
    batch = ragged()
    clean, noise = (
        process.corrupt(batch, torch.full((len(batch),), t), VOCABULARY, generator=rng())
        for t in (0.0, 1.0)
    )
    assert not clean.is_noised.any()
    assert torch.equal(noise.is_noised, batch.target)


def test_rare_tokens_are_masked_more_often_at_every_time(process: Spindle):
    batch = copies(document(400, 0, seed=3), 2)
    for t in (0.1, 0.5, 0.9):
        corruption = process.corrupt(batch, torch.full((2,), t), VOCABULARY, generator=rng())
        order = batch.ids[0][batch.target[0]].argsort(stable=True)
        p = corruption.p_mask[0][batch.target[0]][order]
        assert (p.diff() >= -1e-6).all()
        assert p[0] < t < p[-1]


@pytest.mark.parametrize("strength", [0.05, 0.3, 2.0])
def test_each_token_has_a_schedule_with_its_own_slope(strength: float, tmp_path: Path):
    spindle = Spindle(counted(tmp_path, [1000, 30, 0]), strength=strength)
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    p = torch.stack([p_mask(spindle, t, v) for v in range(V)], 1)
    torch.testing.assert_close(p[0], torch.zeros(V, dtype=torch.float64))
    torch.testing.assert_close(p[-1], torch.ones(V, dtype=torch.float64))
    assert (p.diff(dim=0) >= -1e-12).all()
    middle = t[100:-100]
    h = 1e-6
    slope = torch.stack(
        [(p_mask(spindle, middle + h, v) - p_mask(spindle, middle - h, v)) / (2 * h)
         for v in range(V)], 1
    )  # fmt: skip
    weight = spindle.rates(middle, SMALL, ids=(0, V))
    torch.testing.assert_close(weight * p[100:-100], slope, rtol=1e-5, atol=1e-6)


def p_mask(spindle: Spindle, t: Tensor, v: int) -> Tensor:
    """[T] times -> probability that token v is masked, as `corrupt` has it."""
    batch = collate([Sequence((text_segment([v] * len(t), target=True),))], SMALL)
    return spindle.corrupt(batch, t[None], SMALL, generator=rng()).p_mask[0]


def bound(
    spindle: Spindle, joint: Tensor, *, loss: TokenLoss, exact: bool = True, tilted: bool = False
) -> Tensor:
    """[V, V] loss of each pair of tokens, over all masks and times; joint is the data's law.

    The denoiser is the true posterior at time t, one that takes no notice of the neighbor, or one
    that leans to the tokens with high rates.
    """
    t = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    p = torch.stack([p_mask(spindle, t, v) for v in range(V)], 1)  # [T, V]
    rates = spindle.rates(t, SMALL, ids=(0, V))
    total = torch.zeros(V, V, dtype=torch.float64)
    for x in itertools.product(range(V), repeat=2):
        for masked in itertools.product((False, True), repeat=2):
            chance = torch.ones_like(t)
            for i in range(2):
                chance = chance * (p[:, x[i]] if masked[i] else 1 - p[:, x[i]])
            for i in range(2):
                if not masked[i]:
                    continue
                other = 1 - i
                table = joint if i == 0 else joint.T  # [x_i, x_other]
                if masked[other] or not exact:
                    seen = table[None] * (p[:, None] if exact else 1)  # [T, x_i, x_other]
                    law = seen.sum(-1).expand(len(t), V)
                else:
                    law = table[:, x[other]].expand(len(t), V)
                law = law * p if exact else law  # that it is still masked says something
                these = Tokens(
                    x_0=torch.full((len(t),), x[i]),
                    x_t=torch.full((len(t),), V),
                    p_mask=p[:, x[i]],
                    slope=rates[:, x[i]] * p[:, x[i]],
                    weight=rates[:, x[i]],
                    rates=lambda: rates,
                )
                values = loss((law * rates if tilted else law).log(), these)
                total[x] += (chance * values).mean()
    return total


def test_the_bound_is_tight_for_the_true_posterior_and_not_below(tmp_path: Path):
    """Enumerated: its mean is the entropy of the data, and higher for a worse denoiser."""
    spindle = Spindle(counted(tmp_path, [1000, 30, 3]), strength=0.3)
    joint = torch.tensor([[0.4, 0.1, 0.02], [0.05, 0.2, 0.08], [0.1, 0.02, 0.03]]).double()
    entropy = -float((joint * joint.log()).sum())

    def mean(loss: TokenLoss, **denoiser: bool) -> float:
        return float((joint * bound(spindle, joint, loss=loss, **denoiser)).sum())

    assert mean(SpindleBound()) == pytest.approx(entropy, abs=1e-4)
    assert mean(SpindleBound(), exact=False) > entropy + 0.02
    assert mean(SpindleBound(), tilted=True) > entropy + 0.005
    # what weighted cross-entropy likes best is not the truth, and is below the entropy
    assert mean(WeightedCrossEntropy(), tilted=True) < entropy - 0.005


def test_without_strength_it_is_the_linear_schedule(tmp_path: Path):
    spindle = Spindle(counted(tmp_path, [5, 1, 0]), strength=0.0)
    batch = ragged()
    t = torch.rand(len(batch), generator=rng())
    one, other = (
        process.corrupt(batch, t, VOCABULARY, generator=rng())
        for process in (spindle, Absorbing(Linear()))
    )
    assert torch.equal(one.x_t, other.x_t)
    torch.testing.assert_close(one.weight, other.weight)


def test_the_objective_puts_it_together(process: Spindle):
    """The text's loss sees the rates of all tokens, and the image's is as it was."""
    batch, model = ragged(), TinyDenoiser()
    both = PerModality(text=process, image=Absorbing(Linear()))
    corruption = Objective(process=both).corrupt(batch, VOCABULARY, generator=rng())
    sums = [
        Objective(process=both, text=ModalityLoss(loss)).terms(model, batch, corruption).sums
        for loss in (SpindleBound(), WeightedCrossEntropy())
    ]
    assert torch.isfinite(sums[0]["text"])
    assert not torch.isclose(sums[0]["text"], sums[1]["text"])
    torch.testing.assert_close(sums[0]["image"], sums[1]["image"])


def test_mistakes_are_named(tmp_path: Path):
    batch = ragged()

    def fails(path: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Spindle(path).corrupt(batch, torch.zeros(len(batch)), VOCABULARY, generator=rng())

    fails(tmp_path / "nowhere.pt", r"nowhere\.pt cannot be read")
    (tmp_path / "damaged.pt").write_bytes(b"no tensor")
    fails(tmp_path / "damaged.pt", r"damaged\.pt cannot be read")
    fails(counted(tmp_path, [1] * (TEXT + 1)), "count with the tokenizer of the model")
    with pytest.raises(ValueError, match="strength must be 0 or more"):
        Spindle(tmp_path / "counts.pt", strength=-1.0)
    with pytest.raises(ValueError, match="SpindleBound is for the Spindle process"):
        Objective(process=Absorbing(Linear()), text=ModalityLoss(SpindleBound()))
    with pytest.raises(ValueError, match="ScoreEntropy is for the Absorbing process"):
        Objective(process=Spindle(tmp_path / "counts.pt"), text=ModalityLoss(ScoreEntropy()))
