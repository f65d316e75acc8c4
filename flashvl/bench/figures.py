"""Charts of latency: the paper's Figure 1 (speed and quality) and the bars of its section A.4."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flashvl.bench.latency import Latency
from flashvl.bench.machine import Machine
from flashvl.bench.throughput import Throughput

OURS, THEIRS = "#d1495b", "#7a8699"
"""Colours of the engine and of every other contender."""


def plot_latencies(
    latencies: Sequence[Latency],
    machine: Machine,
    path: Path,
    scores: Mapping[str, float] = {},
    at_once: Sequence[Throughput] = (),
) -> None:
    """Write a PNG: bars of TTFT, TPOT and tokens/s; given `scores`, Figure 1 comes before them.

    Args:
        scores: average of the paper's benchmarks by the contender's name. Figure 1 leaves out a
            contender without one.
        at_once: throughputs at one width, which get bars of their own.
    """
    num_panels = 3 + bool(scores) + bool(at_once)
    figure = Figure(figsize=(4.2 * num_panels, 3.4), layout="constrained")
    panels = list(figure.subplots(1, num_panels))
    if scores:
        _scatter(panels.pop(0), latencies, scores)
    for axes, title, values in (
        (
            panels[0],
            "time to first token from a JPEG, s",
            [x.ttft_from_jpeg_ms / 1e3 for x in latencies],
        ),
        (panels[1], "time per output token, ms", [x.tpot_ms for x in latencies]),
        (panels[2], "tokens/s from a JPEG", [x.tokens_per_s_from_jpeg for x in latencies]),
    ):
        _bars(axes, title, [x.name for x in latencies], values)
    if at_once:
        title = f"tokens/s, {at_once[0].width} requests at once"
        _bars(panels[3], title, [x.name for x in at_once], [x.tokens_per_s for x in at_once])
    figure.suptitle(
        f"One request at a time, {len(latencies[0].rounds[0].gaps_s) + 1} tokens: {machine.device},"
        f" {machine.threads} threads, {machine.dtype}",
        fontsize=10,
    )
    figure.savefig(path, dpi=160)


def _scatter(axes: Axes, latencies: Sequence[Latency], scores: Mapping[str, float]) -> None:
    for each in latencies:
        if each.name in scores:
            place = (each.tokens_per_s_from_jpeg, scores[each.name])
            axes.scatter(*place, s=70, color=_color(each.name), zorder=3)
            axes.annotate(
                each.name, place, xytext=(0, 8), textcoords="offset points", ha="center", fontsize=8
            )
    axes.set_title("quality and speed", fontsize=10)
    axes.set_xlabel("tokens/s from a JPEG")
    axes.set_ylabel("average of 11 benchmarks (paper, Table 2)")
    axes.margins(0.25, 0.15)
    axes.grid(alpha=0.3)


def _bars(axes: Axes, title: str, names: Sequence[str], values: Sequence[float]) -> None:
    bars = axes.barh(names, values, color=[_color(name) for name in names])
    axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _color(name: str) -> str:
    return OURS if name == "flashvl" else THEIRS
