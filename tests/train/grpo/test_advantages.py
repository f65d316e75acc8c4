"""Advantages by hand, and by torch's own statistics."""

import math

import numpy as np
import pytest
import torch

from flashvl.train.grpo.advantages import group_advantages, has_signal
from flashvl.train.rewards.scoring import FAILED, total_rewards

NAN = math.nan


def test_advantages_are_differences_in_unbiased_deviations() -> None:
    rewards = np.array([0.0, 1.0, 1.0, 2.5])
    truth = torch.tensor(rewards)
    wanted = (truth - truth.mean()) / (truth.std() + 1e-4)
    assert group_advantages(rewards).tolist() == pytest.approx(wanted.tolist())


def test_one_right_answer_among_two() -> None:
    """The deviation of 0 and 1 is the root of 1/2."""
    wanted = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert group_advantages(np.array([1.0, 0.0])).tolist() == pytest.approx([wanted, -wanted])


def test_an_undefined_reward_counts_in_nothing() -> None:
    found = group_advantages(np.array([1.0, NAN, 0.0, 3.0]))
    others = group_advantages(np.array([1.0, 0.0, 3.0]))
    assert found.tolist() == [others[0], 0.0, others[1], others[2]]


@pytest.mark.parametrize("rewards", [[1.0, 1.0, 1.0], [NAN, NAN], [NAN, 2.0], [1.0, NAN, 1.0]])
def test_without_different_rewards_there_is_no_signal(rewards: list[float]) -> None:
    assert not has_signal(np.array(rewards))
    assert group_advantages(np.array(rewards)).tolist() == [0.0] * len(rewards)


def test_different_rewards_are_a_signal() -> None:
    assert has_signal(np.array([0.0, NAN, 1e-3]))


@pytest.mark.parametrize(
    ("parts", "totals"),
    [
        ([[1.0, 0.5], [0.0, 1.0]], [2.5, 1.0]),
        ([[1.0, NAN], [0.0, 1.0]], [NAN, 1.0]),
        ([[1.0, NAN], [0.0, NAN]], [2.0, 0.0]),  # the second function says nothing
        ([[1.0, FAILED], [0.0, FAILED]], [NAN, NAN]),
        ([[NAN, NAN], [NAN, NAN]], [NAN, NAN]),
    ],
)
def test_rewards_are_weighted(parts: list[list[float]], totals: list[float]) -> None:
    found = total_rewards(np.array(parts), np.array([2.0, 1.0]))
    assert found.tolist() == pytest.approx(totals, nan_ok=True)
