"""What `flashvl bench` prints: results as lines of text and tables."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # to print one benchmark's result takes no library of another's
    from flashvl.bench.caption import CaptionSpeed
    from flashvl.bench.feed import Growth
    from flashvl.bench.grpo import GrpoSpeed
    from flashvl.bench.images import ImageSpeed
    from flashvl.bench.latency import Latency
    from flashvl.bench.machine import Machine
    from flashvl.bench.serve import Overload, ServiceSpeeds, Speed
    from flashvl.bench.throughput import Throughput
    from flashvl.bench.together import Company
    from flashvl.bench.train import TrainSpeed


def describe_images(speeds: Sequence["ImageSpeed"], size: tuple[int, int], rounds: int) -> str:
    """JPEGs of `size` (width, height) a second, one line for each way."""
    width, height = size
    lines = [f"JPEGs of {width}x{height} a second, one core, median of {rounds} rounds"]
    lines += [f"{each.name:<40}{each.images_per_s:8.1f}{each.relative:8.2f}x" for each in speeds]
    return "\n".join(lines)


def describe_latencies(latencies: Sequence["Latency"], machine: "Machine") -> str:
    """The machine's limits, and a row for each contender."""
    header = (
        *("", "prompt", "TTFT ms", "TPOT ms", "tokens/s", "TTFT from JPEG", "tokens/s from JPEG"),
        *("prefill", "decode", "roofline"),
    )
    rows = [
        (
            each.name,
            str(each.prompt_tokens),
            f"{each.ttft_ms:.1f}",
            f"{each.tpot_ms:.2f}",
            f"{each.tokens_per_s:.2f}",
            f"{each.ttft_from_jpeg_ms:.1f}",
            f"{each.tokens_per_s_from_jpeg:.2f}",
            f"{each.prefill_fraction:.0%}",
            f"{each.decode_fraction:.0%}",
            f"{each.roofline_fraction:.0%}",
        )
        for each in latencies
    ]
    return f"{_describe_machine(machine)}\n{_table(header, rows)}"


def describe_throughputs(found: Sequence["Throughput"], machine: "Machine | None" = None) -> str:
    """A row for each contender and width; above them, given `machine`, its limits."""
    header = ("width", "", "tokens/s", "decoding", "TTFT ms", "TPOT ms", "roofline", "batches")
    rows = [
        (
            str(each.width),
            each.name,
            f"{each.tokens_per_s:.1f}",
            f"{each.decode_tokens_per_s:.1f}",
            f"{each.ttft_ms:.0f}",
            f"{each.tpot_ms:.1f}",
            f"{each.roofline_fraction:.0%}",
            *(() if each.times_batches is None else (f"{each.times_batches:.2f}x",)),
        )
        for each in found
    ]
    table = _table(header[: len(rows[0])], rows)
    return table if machine is None else f"{_describe_machine(machine)}\n{table}"


def describe_captioning(speed: "CaptionSpeed", rounds: int) -> str:
    """Images a second of the job, of its limit and the limit's two parts, and of the naive way."""
    limit = f"1 / (1 / {speed.engine:.1f} + 1 / ({speed.cores} x {speed.decoding:.1f}))"
    lines = {
        "engine alone, from tiles": speed.engine,
        "decoding alone, one core": speed.decoding,
        f"both on the same cores: {limit}": speed.limit,
        f"flashvl caption: {speed.of_limit:.2f} of that": speed.job,
        f"map_batches over generate; the job is {speed.times_naive:.2f} times as fast": speed.naive,
    }
    return "\n".join(
        [
            f"images/s, median of {rounds} rounds, {speed.cores} cores",
            *(f"{rate:8.1f}  {what}" for what, rate in lines.items()),
        ]
    )


def describe_service(found: "ServiceSpeeds") -> str:
    """The service beside its engine for each number of clients, and how it bore the overload."""
    header = ("", "clients", "TTFT ms", "tokens/s", "largest gap ms")
    rows = [
        (
            each.name,
            str(each.width),
            f"{each.ttft_ms:.1f}",
            f"{each.tokens_per_s:.1f}",
            f"{each.largest_gap_ms:.1f}",
        )
        for each in found.speeds
    ]
    pairs = zip(found.speeds[::2], found.speeds[1::2], strict=True)
    lines = [_table(header, rows), *(_compare(engine, service) for engine, service in pairs)]
    if found.overload is not None:
        lines.append(_describe_overload(found.overload))
    return "\n".join(lines)


def _compare(engine: "Speed", service: "Speed") -> str:
    return (
        f"{engine.width} clients: TTFT {service.ttft_ms - engine.ttft_ms:+.1f} ms,"
        f" {service.tokens_per_s / engine.tokens_per_s:.2f} of the engine's tokens/s"
    )


def _describe_overload(overload: "Overload") -> str:
    share = overload.answered_per_s / overload.capacity_per_s
    return (
        f"{overload.offered_per_s:.1f} requests/s offered to a capacity of"
        f" {overload.capacity_per_s:.1f}: {overload.answered_per_s:.1f} answered/s"
        f" ({share:.2f} of capacity), {overload.refused} refused, {overload.failed} failed\n"
        f"TTFT of the answered: p50 {overload.ttft_p50_ms:.0f} ms, p99"
        f" {overload.ttft_p99_ms:.0f} ms, bound {overload.ttft_bound_ms:.0f} ms;"
        f" memory {overload.memory_start_mb:.0f} -> {overload.memory_end_mb:.0f} MB"
    )


def describe_together(found: "Company", rounds: int) -> str:
    """The times to the first token and the job's rows a second, each alone and with the other."""
    header = ("", "alone", "together", "together / alone")
    rows = [
        (name, f"{alone:.1f}", f"{together:.1f}", f"{together / alone:.2f}x")
        for name, alone, together in (
            ("TTFT p50, ms", found.ttft_p50_alone_ms, found.ttft_p50_together_ms),
            ("TTFT p99, ms", found.ttft_p99_alone_ms, found.ttft_p99_together_ms),
            ("rows/s of the job", found.rows_per_s_alone, found.rows_per_s_together),
        )
    ]
    return (
        f"{found.requests} requests alone and {found.requests} beside the job, {found.rate:g} a"
        f" second, {rounds} rounds; {found.failed} failed\n{_table(header, rows)}"
    )


def describe_training(speed: "TrainSpeed", rounds: int) -> str:
    """Samples a second of each way of training, and how full the packs are."""
    lines = [
        f"samples/s on one thread, median of {rounds} rounds; {speed.tokens_per_row:.0f} tokens a"
        " sample",
        f"{speed.padded:8.2f}  padded",
        f"{speed.packed:8.2f}  packed: {speed.times_padded:.2f}x",
        f"{speed.fed:8.2f}  packed, fed by Ray Data: {speed.of_ready:.3f} of ready tensors",
    ]
    lines += [
        f"{each.num_workers} workers: {each.filled:.1%} of the token budget filled, work"
        f" {each.balance:.1%} balanced"
        for each in speed.packing
    ]
    return "\n".join(lines)


def describe_grpo(speed: "GrpoSpeed", rounds: int) -> str:
    """Completions a second of the rollouts, and the seconds of a step, beside TRL's."""
    rollouts, step = speed.rollouts, speed.step
    lines = [
        f"{speed.num_prompts} prompts of {rollouts.prompt_tokens:.0f} tokens, 24 completions each,"
        f" of {speed.max_completion_length} tokens at most; median of {rounds} rounds",
        f"completions/s: TRL {rollouts.trl:.1f} ({rollouts.trl_tokens:.1f} tokens each), the engine"
        f" {rollouts.flashvl:.1f} ({rollouts.flashvl_tokens:.1f}): {rollouts.times_trl:.1f}x",
    ]
    if step is not None:
        lines.append(
            f"a step: TRL {step.trl:.2f} s, flashvl {step.flashvl:.2f} s (rollout"
            f" {step.rollout:.2f} s, update {step.update:.2f} s): {step.times_trl:.1f}x"
        )
    return "\n".join(lines)


def describe_growth(found: Sequence["Growth"]) -> str:
    """A line for each number of rows."""
    header = ["rows", "order, MB", "bitmap, MB", "driver, MB", "task, MB"]
    rows = [
        [
            f"{each.num_rows}",
            f"{each.order_mb:.2f}",
            f"{each.bitmap_mb:.2f}",
            f"{each.driver_mb:.0f}",
            f"{each.worker_mb:.0f}",
        ]
        for each in found
    ]
    return _table(header, rows)


def _describe_machine(machine: "Machine") -> str:
    return (
        f"{machine.device}, {machine.threads} threads, {machine.dtype}:"
        f" {machine.gemm_tflops:.2f} TFLOP/s, {machine.read_gb_per_s:.1f} GB/s"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their cells; those with a name are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, *rows):
        cells = [
            cell.rjust(width) if name else cell.ljust(width)
            for cell, name, width in zip(row, header, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
