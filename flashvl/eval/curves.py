"""Charts of how preference training and reasoning went, a line for each seed."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Records = Sequence[Mapping[str, Any]]
"""Records of the steps of a stage, as its log has them."""

COLORS = {"SFT": "#7a8699", "RL": "#d1495b", "SFT+RL": "#2a7f9e", "DPO": "#d1495b"}
SMOOTHED_STEPS = 10
"""Steps over whose mean a noisy figure is drawn."""


def plot_preferences(logs: Sequence[Records], path: Path) -> None:
    """Write a PNG of DPO: accuracy on held-out pairs, and the rewards of both captions.

    Args:
        logs: the records of each seed's stage.
    """
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    accuracy, rewards = figure.subplots(1, 2)
    for records in logs:
        _draw(accuracy, records, "eval_accuracy", "DPO", begin=0.5)
        _draw(rewards, records, "eval_reward_chosen", "SFT+RL", begin=0.0)
        _draw(rewards, records, "eval_reward_rejected", "DPO", begin=0.0)
    _finish(accuracy, "accuracy on held-out pairs")
    _finish(rewards, "implicit reward: faithful (blue), other (red)")
    figure.savefig(path, dpi=140)


def plot_reasoning(logs: Mapping[str, Sequence[Records]], path: Path) -> None:
    """Write a PNG of the loss of SFT, and of GRPO's reward and length of completions.

    Args:
        logs: by way (`SFT`, `RL`, `SFT+RL`), the records of each seed's last stage.
    """
    figure = Figure(figsize=(13, 3.2), layout="constrained")
    loss, reward, length = figure.subplots(1, 3)
    for way, runs in logs.items():
        for number, records in enumerate(runs):
            label = "" if number else way
            if way == "SFT":
                _draw(loss, records, "loss", way, label=label)
            else:
                _draw(reward, records, "reward", way, label=label)
                _draw(length, records, "completion_length", way)
    _finish(loss, "loss of SFT")
    _finish(reward, "mean reward of a step's completions")
    _finish(length, "tokens of a completion")
    reward.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=140)


def _draw(
    axes: Axes,
    records: Records,
    name: str,
    color: str,
    label: str = "",
    begin: float | None = None,
) -> None:
    """A line of a figure over the steps that have it.

    Args:
        begin: its value before the first step; None: it is not known, and the line is smoothed.
    """
    found = [(each["step"], each[name]) for each in records if name in each]
    steps, values = [step for step, _ in found], [value for _, value in found]
    if begin is None:
        values = [
            statistics.fmean(values[max(0, place + 1 - SMOOTHED_STEPS) : place + 1])
            for place in range(len(values))
        ]
    else:
        steps, values = [0, *steps], [begin, *values]
    axes.plot(steps, values, color=COLORS[color], linewidth=1.3, label=label or None)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
