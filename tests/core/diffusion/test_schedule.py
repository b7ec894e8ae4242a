"""Each schedule rises from clean to noise, and its weight is its slope over its value."""

from __future__ import annotations

import math

import pytest
import torch

from mmdlm.core.diffusion.schedule import Cosine, Linear, MaskSchedule, Shifted
from mmdlm.experimental.schedules import LogLinear, Polynomial

SCHEDULES = [
    Linear(),
    Linear(eps=1e-3),
    Cosine(),
    Polynomial(0.5),
    Polynomial(2),
    Polynomial(3),
    Polynomial(5),
    LogLinear(),
    LogLinear(eps=0.1),
    Shifted(),
    Shifted(1 / 3),
]
T = torch.linspace(0, 1, 100_001, dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_rises_from_clean_to_noise(schedule: MaskSchedule):
    p_mask = schedule.p_mask(T)
    clean = schedule.eps if isinstance(schedule, Linear) else 0.0
    noise = 1 - schedule.eps if isinstance(schedule, LogLinear) else 1.0
    assert float(p_mask[0]) == pytest.approx(clean)
    assert float(p_mask[-1]) == pytest.approx(noise)
    assert (p_mask.diff() >= 0).all()
    torch.testing.assert_close(schedule.alpha(T), 1 - p_mask)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_slope_is_the_derivative(schedule: MaskSchedule):
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    numeric = (schedule.p_mask(t + 1e-6) - schedule.p_mask(t - 1e-6)) / 2e-6
    torch.testing.assert_close(schedule.slope(t), numeric, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_weight_times_p_mask_integrates_to_the_noise_added(schedule: MaskSchedule):
    t = T + 0.5 / len(T)  # midpoints
    integral = (schedule.weight(t[:-1]) * schedule.p_mask(t[:-1])).mean()
    added = schedule.p_mask(T[-1]) - schedule.p_mask(T[0])
    assert float(integral) == pytest.approx(float(added), rel=2e-3)
    if schedule in (Linear(), Cosine(), Polynomial(2)):
        assert float(integral) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_weight_is_finite_and_not_negative_everywhere(schedule: MaskSchedule):
    t = torch.tensor([0.0, 1e-38, 1e-30, 1e-12, 1e-6, 0.5, 1.0])
    weight = schedule.weight(t)
    assert torch.isfinite(weight).all()
    assert (weight >= 0).all()


def test_formulas():
    half = torch.tensor(0.5, dtype=torch.float64)
    assert float(Cosine().p_mask(half)) == pytest.approx(math.sqrt(0.5))
    assert float(Linear(eps=1e-3).p_mask(half)) == pytest.approx(0.5005)
    assert float(Polynomial(3).p_mask(half)) == pytest.approx(0.125)
    sigma = -math.log(1 - (1 - 1e-3) * 0.5)
    assert float(LogLinear().p_mask(half)) == pytest.approx(1 - math.exp(-sigma))
    assert float(Linear().weight(half)) == pytest.approx(2.0)


@pytest.mark.parametrize(
    "make", [lambda: Polynomial(0), lambda: Linear(eps=1.0), lambda: LogLinear(eps=-0.1)]
)
def test_refuses_what_is_no_schedule(make):
    with pytest.raises(ValueError, match="must"):
        make()
