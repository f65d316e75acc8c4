"""The miniature's charts."""

import base64
import io
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flashvl.eval.miniature.latency import Timed
from flashvl.eval.miniature.results import Result

Records = Sequence[Mapping[str, Any]]
"""Records of the steps of a stage, as its log has them."""

BLUE, RED, GREY = "#2a7f9e", "#d1495b", "#7a8699"
COLORS = {"SFT": GREY, "RL": RED, "SFT + RL": BLUE}
SERIES = (BLUE, RED, GREY)
SMOOTHED_STEPS = 10
"""Steps over whose mean a noisy figure is drawn."""


def as_picture(figure: Figure) -> str:
    """The figure as the data URI of a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=140, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def plot_rows(result: Result, columns: Sequence[str]) -> Figure:
    """Exact match by row: a dot for each seed, and the mean as a line."""
    figure = Figure(figsize=(1.5 + 1.5 * len(result.rows), 3.2), layout="constrained")
    axes = figure.subplots()
    for number, (column, color) in enumerate(zip(columns, SERIES, strict=False)):
        shift = 0.24 * (number - (len(columns) - 1) / 2)
        for place, row in enumerate(result.rows.values()):
            values = row[column].values
            x = place + shift
            axes.plot([x - 0.09, x + 0.09], [row[column].mean] * 2, color=color, linewidth=2.5)
            label = None if place else column
            axes.scatter([x] * len(values), values, s=16, color=color, alpha=0.65, label=label)
    axes.set_xticks(range(len(result.rows)), list(result.rows))
    _finish(axes, f"exact match, {len(result.seeds)} seeds", "")
    if len(columns) > 1:
        axes.legend(frameon=False, fontsize=8)
    return figure


def plot_latency(timed: Sequence[Timed]) -> Figure:
    """The time to the first token by visual tokens, and the time of an answer by its tokens."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    first, answer = figure.subplots(1, 2)
    for each, color in zip(timed, (GREY, BLUE, "#e0a030", RED), strict=True):
        first.scatter(each.visual_tokens, each.median_first_ms, color=color, label=each.name)
        times = np.median(each.times_ms, axis=0)
        answer.plot(np.arange(1, len(times) + 1), times, color=color, label=each.name)
    _finish(first, "ms to the first token", "visual tokens")
    _finish(answer, "ms", "output tokens")
    first.set_ylim(bottom=0)
    answer.legend(frameon=False, fontsize=8)
    return figure


def plot_preferences(logs: Sequence[Records]) -> Figure:
    """DPO: accuracy on held-out pairs, and the rewards of both captions.

    Args:
        logs: the records of each seed's stage.
    """
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    accuracy, rewards = figure.subplots(1, 2)
    for records in logs:
        _draw(accuracy, records, "eval_accuracy", RED, begin=0.5)
        _draw(rewards, records, "eval_reward_chosen", BLUE, begin=0.0)
        _draw(rewards, records, "eval_reward_rejected", RED, begin=0.0)
    _finish(accuracy, "accuracy on held-out pairs")
    _finish(rewards, "implicit reward: faithful (blue), other (red)")
    return figure


def plot_reasoning(logs: Mapping[str, Sequence[Records]]) -> Figure:
    """The loss of SFT, and GRPO's reward and length of completions.

    Args:
        logs: by way (`SFT`, `RL`, `SFT + RL`), the records of each seed's last stage.
    """
    figure = Figure(figsize=(13, 3.2), layout="constrained")
    loss, reward, length = figure.subplots(1, 3)
    for way, runs in logs.items():
        for number, records in enumerate(runs):
            label = "" if number else way
            if way == "SFT":
                _draw(loss, records, "loss", COLORS[way])
            else:
                _draw(reward, records, "reward", COLORS[way], label=label)
                _draw(length, records, "completion_length", COLORS[way])
    _finish(loss, "loss of SFT")
    _finish(reward, "mean reward of a step's completions")
    _finish(length, "tokens of a completion")
    reward.legend(frameon=False, fontsize=8)
    return figure


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
    axes.plot(steps, values, color=color, linewidth=1.3, label=label or None)


def _finish(axes: Axes, title: str, below: str = "step") -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(below)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
