"""A plan as text for a person."""

from collections.abc import Sequence
from dataclasses import asdict

from flashvl.train.plan.gpus import GIB
from flashvl.train.plan.plan import GB, Plan, describe_all
from flashvl.train.plan.rollouts import DECODE_SHARE

REST = "Evaluations, the start of workers and repeated steps come on top."
"""What no plan counts."""
BAR = 30
"""Columns of the longest bar of the memory's parts."""


def describe_plan(plan: Plan) -> str:
    """The plan in sections, for a terminal of 80 columns or more."""
    heading = f"{plan.stage}: {plan.num_rows:,} rows on {plan.num_gpus} x {plan.gpu.name}"
    sections = [
        _section("Stage", _stage(plan)),
        _section(f"Memory of a GPU (token_budget {plan.token_budget:,})", _memory(plan)),
        _section("Step", _step(plan)),
        _section("Storage", _storage(plan)),
        _section("In all", _total(plan)),
    ]
    return "\n\n".join([heading, *sections, _notes(plan)])


def compare_plans(plans: Sequence[Plan]) -> str:
    """A line for each of several stages, and their sums."""
    first = plans[0]
    heading = f"{len(plans)} stages on {first.num_gpus} x {first.gpu.name}"
    has_cost = first.cost is not None
    lines = [
        f"{'stage':<14}{'rows':>11}{'steps':>9}{'trained':>10}{'GiB':>7}{'s/step':>8}"
        f"{'rows/s/GPU':>11}{'hours':>8}{'GPU-hours':>10}{'cost':>10}"
    ]
    for plan in plans:
        lines.append(
            f"{plan.stage:<14}{plan.num_rows:>11,}{plan.num_steps:>9,}"
            f"{plan.parameters.num_trained / 1e6:>9,.1f}M{plan.memory.total / GIB:>7.1f}"
            f"{plan.step_s:>8.3f}"
            f"{plan.rows_per_s_of_a_gpu:>11.1f}{plan.hours:>8.1f}{plan.gpu_hours:>10,.0f}"
            f"{plan.cost or 0:>10,.0f}"
        )
    sums = describe_all(plans)
    rows, steps = sum(plan.num_rows for plan in plans), sum(plan.num_steps for plan in plans)
    lines.append(
        f"{'all':<14}{rows:>11,}{steps:>9,}{'':>36}{sums['hours']:>8.1f}"
        f"{sums['gpu_hours']:>10,.0f}{sums['cost'] or 0:>10,.0f}"
    )
    if not has_cost:
        lines = [line[:-10] for line in lines]
    slowest = sum(plan.hours_without_overlap for plan in plans)
    notes = f"{slowest:.1f} h if computing and network do not overlap.\n{REST}"
    return "\n".join([heading, "", *lines, "", notes])


def _section(title: str, lines: list[tuple[str, str]]) -> str:
    rows = [f"  {name:<18}{text}" for name, text in lines]
    return "\n".join([title, *rows])


def _stage(plan: Plan) -> list[tuple[str, str]]:
    parameters, row = plan.parameters, plan.row
    trained = f"{parameters.num_trained:,} of {parameters.num_total:,} parameters"
    paper = f"{parameters.paper_millions:.2f}M, where M is 2^20, without embeddings and heads"
    return [
        ("trained", trained),
        ("as in the paper", paper),
        (
            "a row",
            f"{row.num_tokens:,.0f} tokens: {row.visual_tokens:,.0f} of"
            f" {_count(row.num_tiles, 'tile', 'tiles')}, {row.text_tokens:,.0f} of text"
            f" ({row.source})",
        ),
        (
            "a step",
            f"{plan.global_batch_size} rows; on a GPU {plan.rows_of_a_gpu} rows in"
            f" {_count(plan.micro_batches, 'micro-batch', 'micro-batches')}",
        ),
    ]


def _memory(plan: Plan) -> list[tuple[str, str]]:
    parts = asdict(plan.memory)
    most = max(parts.values())
    lines = [
        (name, f"{size / GIB:6.1f} GiB  {'#' * round(BAR * size / most)}".rstrip())
        for name, size in parts.items()
        if size or name != "reference"
    ]
    rows = plan.largest_token_budget / plan.row.num_tokens
    state = f"ZeRO {plan.zero_stage}, {plan.precision}"
    if plan.gradient_checkpointing:
        state += ", gradient checkpointing"
    return [
        *lines,
        (
            "total",
            f"{plan.memory.total / GIB:6.1f} GiB  of {plan.usable_bytes / GIB:.1f} usable"
            f" ({plan.gpu.memory_gib} less {plan.assumptions.reserve:.0%}); {state}",
        ),
        (
            "largest budget",
            f"token_budget={plan.largest_token_budget} would fit: {rows:.0f} rows of mean length",
        ),
    ]


def _step(plan: Plan) -> list[tuple[str, str]]:
    network = plan.network
    return [
        (
            "computing",
            f"{_seconds(plan.compute_s)}  {plan.tflop_of_a_row:.2f} TFLOP a row,"
            f" {plan.assumptions.mfu:.0%} of {plan.gpu.bf16_tflops:.0f} TFLOP/s",
        ),
        (
            "network",
            f"{_seconds(network.seconds)}  {network.gradient_bytes / GB:.1f} GB of gradients and"
            f" {network.weight_bytes / GB:.1f} GB of weights sent by each GPU,"
            f" {plan.assumptions.network:g} GB/s",
        ),
        ("update", f"{_seconds(plan.update_s)}"),
        *_rollouts(plan),
        ("together", f"{_seconds(plan.step_s)}  {plan.rows_per_s_of_a_gpu:.1f} rows/s on each GPU"),
        (
            "feed",
            f"{plan.loading.rows_per_s:,.0f} rows/s: {plan.loading.bytes_per_s / 1e6:,.0f} MB/s"
            f" from the store, {plan.loading.cores:.1f} cores to decode and resize",
        ),
    ]


def _rollouts(plan: Plan) -> list[tuple[str, str]]:
    if not plan.rollout_s:
        return []
    text = (
        f"{_seconds(plan.rollout_s)}  {len(plan.row.branches)} completions of"
        f" {max(plan.row.branches):,.0f} tokens for each prompt on a GPU; a rough figure, with"
        f" {DECODE_SHARE:.0%} of its memory's {plan.gpu.bandwidth_gb_per_s} GB/s"
    )
    return [("rollouts", text)]


def _storage(plan: Plan) -> list[tuple[str, str]]:
    checkpoints = plan.checkpoints
    return [
        (
            "a checkpoint",
            f"{checkpoints.size_bytes / GB:.1f} GB: training stands still for"
            f" {checkpoints.copy_s:.2f} s, {checkpoints.write_s:.0f} s to write at"
            f" {plan.assumptions.store:g} GB/s",
        ),
        ("written", f"{checkpoints.count:,} times: one every {plan.save_steps} steps"),
        ("images read", f"{plan.loading.total_bytes / 1e12:.2f} TB"),
    ]


def _total(plan: Plan) -> list[tuple[str, str]]:
    lines = [
        ("steps", f"{plan.num_steps:,}"),
        (
            "time",
            f"{_duration(plan.hours)}; {_duration(plan.hours_without_overlap)} if computing and"
            " network do not overlap",
        ),
        (
            "GPU-hours",
            f"{plan.gpu_hours:,.3g}" if plan.gpu_hours < 10 else f"{plan.gpu_hours:,.0f}",
        ),
    ]
    if plan.cost is not None:
        lines.append(("cost", f"{plan.cost:,.0f} at {plan.assumptions.price:g} a GPU-hour"))
    return lines


def _notes(plan: Plan) -> str:
    if plan.network.seconds > plan.compute_s:
        needed = (plan.network.gradient_bytes + plan.network.weight_bytes) / plan.compute_s / GB
        return (
            f"The network bounds the step: {needed:.0f} GB/s would keep up, or a larger"
            " global_batch_size."
        )
    return REST


def _count(number: float, one: str, many: str) -> str:
    return f"{number:.3g} {one if number == 1 else many}"


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{hours * 60:.0f} min" if hours * 60 >= 1 else f"{hours * 3600:.1f} s"


def _seconds(seconds: float) -> str:
    return f"{seconds:6.2f} s" if seconds >= 0.1 else f"{seconds * 1000:6.2f} ms"
