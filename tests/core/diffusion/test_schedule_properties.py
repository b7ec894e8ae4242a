"""What holds of every mask schedule at every time, whatever its numbers."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmdlm.core.diffusion.schedule import Cosine, Linear, MaskSchedule, Shifted
from mmdlm.experimental.schedules import LogLinear, Polynomial
from tests import properties  # noqa: F401 (its settings)

SHARES = st.floats(0, 0.9)
SCHEDULES = st.one_of(
    st.builds(Linear, SHARES),
    st.just(Cosine()),
    st.builds(Polynomial, st.floats(0.2, 6)),
    st.builds(LogLinear, SHARES),
    st.builds(Shifted, st.floats(0.05, 20)),
)
DTYPES = st.sampled_from([torch.float32, torch.float64])


def times(first: float = 0.0, last: float = 1.0) -> st.SearchStrategy[list[float]]:
    return st.lists(st.floats(first, last), min_size=2, max_size=20)


def tensor(values: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(dtype)


@given(SCHEDULES, times(), DTYPES)
def test_mass_is_kept(schedule: MaskSchedule, t: list[float], dtype: torch.dtype) -> None:
    masked, clean = schedule.p_mask(tensor(t, dtype)), schedule.alpha(tensor(t, dtype))
    assert masked.dtype == clean.dtype == dtype
    assert ((masked >= 0) & (masked <= 1) & (clean >= 0) & (clean <= 1)).all()
    torch.testing.assert_close(masked + clean, torch.ones_like(masked))


@given(SCHEDULES, times(), DTYPES)
def test_more_is_masked_the_later_it_is(
    schedule: MaskSchedule, t: list[float], dtype: torch.dtype
) -> None:
    rounding = torch.finfo(dtype).eps
    assert (schedule.p_mask(tensor(sorted(t), dtype)).diff() >= -rounding).all()
    assert (schedule.slope(tensor(t, dtype)) >= 0).all()


@given(SCHEDULES, times(0.01, 0.99))
def test_slope_is_the_finite_difference(schedule: MaskSchedule, t: list[float]) -> None:
    at, step = tensor(t), 1e-5
    difference = (schedule.p_mask(at + step) - schedule.p_mask(at - step)) / (2 * step)
    torch.testing.assert_close(schedule.slope(at), difference, rtol=1e-5, atol=1e-9)


@given(SCHEDULES, st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted))
def test_slope_adds_up_to_what_is_masked_between_two_times(
    schedule: MaskSchedule, between: list[float]
) -> None:
    edges = torch.linspace(*between, 2001, dtype=torch.float64)
    middle = (edges[1:] + edges[:-1]) / 2
    total = (schedule.slope(middle) * edges.diff()).sum()
    p_mask = schedule.p_mask(edges)
    torch.testing.assert_close(total, p_mask[-1] - p_mask[0], rtol=1e-4, atol=1e-9)


@given(SCHEDULES, times(), DTYPES)
def test_weight_is_the_slope_over_the_masked_share_and_finite(
    schedule: MaskSchedule, t: list[float], dtype: torch.dtype
) -> None:
    at = tensor(t, dtype)
    weight, p_mask, slope = schedule.weight(at), schedule.p_mask(at), schedule.slope(at)
    assert (weight.isfinite() & (weight >= 0)).all()
    told = p_mask > 1e-30  # below, the quotient has lost its digits
    torch.testing.assert_close((weight * p_mask)[told], slope[told], rtol=1e-4, atol=1e-9)


@given(SCHEDULES, st.lists(st.floats(0, 1), min_size=6, max_size=6))
def test_times_are_taken_one_by_one(schedule: MaskSchedule, t: list[float]) -> None:
    together = tensor(t).view(2, 3)
    for function in (schedule.p_mask, schedule.alpha, schedule.slope, schedule.weight):
        apart = torch.stack([function(one) for one in tensor(t)]).view(2, 3)
        torch.testing.assert_close(function(together), apart)
