"""Advantages against plain loops, and groups that have nothing to teach."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from mmdlm.rl.advantage import AccuracyFilter, MeanBaseline, Standardized, reward_statistics
from mmdlm.rl.statistics import Statistics

REWARD = torch.tensor([1.0, 0.0, 2.5, 1.0, -1.0, 0.5, 3.0])
GROUP = torch.tensor([4, 9, 4, 9, 4, 4, 7])  # in any order, of any size


def groups() -> dict[int, list[int]]:
    return {g: [i for i in range(7) if GROUP[i] == g] for g in (4, 7, 9)}


def test_mean_baseline_subtracts_the_mean_of_the_group():
    got = MeanBaseline()(REWARD, group=GROUP)
    for members in groups().values():
        values = [float(REWARD[i]) for i in members]
        for i in members:
            assert float(got[i]) == pytest.approx(float(REWARD[i]) - statistics.mean(values))


def test_standardized_divides_by_the_deviation_of_the_group():
    got = Standardized(epsilon=1e-4)(REWARD, group=GROUP)
    for members in groups().values():
        values = [float(REWARD[i]) for i in members]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        for i in members:
            expected = (float(REWARD[i]) - statistics.mean(values)) / (deviation + 1e-4)
            assert float(got[i]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("advantage", [MeanBaseline(), Standardized()])
def test_equal_rewards_and_groups_of_one_have_no_advantage(advantage):
    got = advantage(torch.tensor([0.3, 0.3, 0.3, 8.0]), group=torch.tensor([1, 1, 1, 2]))
    torch.testing.assert_close(got, torch.zeros(4), atol=1e-3, rtol=0)


@pytest.mark.parametrize("advantage", [MeanBaseline(), Standardized()])
def test_unknown_rewards_take_no_part(advantage):
    nan = math.nan
    reward = torch.tensor([1.0, nan, 0.0, nan, nan])
    got = advantage(reward, group=torch.tensor([0, 0, 0, 1, 1]))
    alone = advantage(torch.tensor([1.0, 0.0]), group=torch.tensor([0, 0]))
    torch.testing.assert_close(got, torch.tensor([alone[0], 0.0, alone[1], 0.0, 0.0]))


def test_filter_drops_prompts_all_right_and_all_wrong():
    right = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, math.nan, math.nan])
    group = torch.tensor([0, 0, 1, 1, 2, 2, 2, 2, 3])
    kept = AccuracyFilter()(right, group=group)
    assert kept.tolist() == [False] * 4 + [True] * 3 + [False] * 2
    assert not AccuracyFilter(low=0.7, high=0.9)(right, group=group).any()
    assert AccuracyFilter(low=0.5, high=0.9)(right, group=group).sum() == 3


def test_filter_bounds_are_inside():
    right = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])
    kept = AccuracyFilter(low=0.2, high=0.8)(right, group=torch.zeros(5, dtype=torch.int64))
    assert kept.all()


def test_statistics_have_the_names_and_values_of_trl():
    reward = torch.tensor([1.0, 3.0, 2.0, 2.0, math.nan])
    logged = reward_statistics(reward, group=torch.tensor([0, 0, 1, 1, 2])).values()
    assert logged.keys() == {"reward", "reward_std", "frac_reward_zero_std"}
    assert logged["reward"] == pytest.approx(2.0)
    assert logged["reward_std"] == pytest.approx(math.sqrt(2) / 2)
    assert logged["frac_reward_zero_std"] == pytest.approx(0.5)


def test_statistics_add_up():
    a = Statistics.means(x=(torch.tensor([1.0, 2.0]), None)) + Statistics(
        least={"low": torch.tensor(0.3)}, most={"high": torch.tensor(0.3)}
    )
    b = Statistics.means(
        x=(torch.tensor([6.0, 100.0]), torch.tensor([True, False])),
        y=(torch.tensor([1.0]), torch.tensor([False])),
    ) + Statistics(least={"low": torch.tensor(0.1)}, most={"high": torch.tensor(0.1)})
    assert (a + b).values() == pytest.approx({"x": 3.0, "low": 0.1, "high": 0.3})


def test_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="epsilon must be above 0, got 0"):
        Standardized(epsilon=0)
    with pytest.raises(ValueError, match=r"0 <= low <= high <= 1 is needed, got 0.9 and 0.1"):
        AccuracyFilter(low=0.9, high=0.1)
