"""Advantages of the completions of a group, as TRL computes them."""

import numpy as np
import numpy.typing as npt

Float64s = npt.NDArray[np.float64]

LEAST_DEVIATION = 1e-4
"""Amount added to a group's standard deviation, by which the differences are divided."""
NO_SIGNAL = 1e-8
"""Standard deviation up to which the rewards of a group count as equal."""


def group_advantages(rewards: Float64s) -> Float64s:
    """(completions of a group,): how much better each is than the group, in standard deviations.

    Args:
        rewards: (completions of a group,); NaN where a reward is undefined. Such a completion does
            not count in the group's mean and deviation, and its advantage is 0.
    """
    advantages = np.zeros(len(rewards))
    is_defined = ~np.isnan(rewards)
    defined = rewards[is_defined]
    if len(defined) > 1:
        deviation = defined.std(ddof=1)
        advantages[is_defined] = (defined - defined.mean()) / (deviation + LEAST_DEVIATION)
    return advantages


def has_signal(rewards: Float64s) -> bool:
    """Whether the defined rewards of a group differ, so that it teaches anything."""
    defined = rewards[~np.isnan(rewards)]
    return len(defined) > 1 and bool(defined.std(ddof=1) > NO_SIGNAL)
