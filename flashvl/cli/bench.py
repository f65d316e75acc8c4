"""`flashvl bench`: how fast it is, beside its peers and the machine's own limits."""

import asyncio
import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashvl.cli.options import JsonOption, ModelOption, write_json
from flashvl.entrypoint import report_errors, show_progress, start_ray

if TYPE_CHECKING:
    from flashvl.bench.contenders import Contender
    from flashvl.bench.latency import Latency
    from flashvl.bench.machine import Machine
    from flashvl.bench.throughput import Throughput

bench_app = typer.Typer(no_args_is_help=True, help="Measure how fast it is, beside its peers.")

PresetOption = Annotated[
    str | None, typer.Option(help="Instead of a model: a preset, with --random-weights.")
]
RandomOption = Annotated[
    bool, typer.Option("--random-weights", help="Timing does not depend on the weights.")
]
TokensOption = Annotated[int, typer.Option(min=2, help="Tokens of the answer.")]
RoundsOption = Annotated[int, typer.Option(min=1, help="Times that each is measured, in turn.")]
PlotOption = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Draw the figures here as PNG.")
]


@bench_app.command()
def images(rounds: RoundsOption = 20, json_file: JsonOption = None) -> None:
    """From JPEG bytes to the tower's pixels, on one core: ours against transformers' own.

    Example: flashvl bench images
    """
    with report_errors():
        from flashvl.bench.contenders import HEIGHT, WIDTH
        from flashvl.bench.images import compare_image_processing

        if json_file is not None:
            write_json(json_file, {})
        with show_progress("measuring") as on_progress:
            contenders = compare_image_processing(rounds, on_progress)
        if json_file is not None:
            write_json(json_file, {"contenders": [asdict(each) for each in contenders]})
        print(f"JPEGs of {WIDTH}x{HEIGHT} a second, one core, median of {rounds} rounds")
        for each in contenders:
            print(f"{each.name:<40}{each.images_per_s:8.1f}{each.relative:8.2f}x")


@bench_app.command()
def latency(
    model: ModelOption = "tiny",
    preset: PresetOption = None,
    random_weights: RandomOption = False,
    tokens: TokensOption = 128,
    rounds: RoundsOption = 5,
    json_file: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """One request alone: time to its first token and from token to token, beside `generate`.

    Example: flashvl bench latency --preset static --random-weights
    """
    with report_errors():
        from flashvl.bench.contenders import build_flashvl
        from flashvl.bench.machine import measure_machine
        from flashvl.bench.models import load_twins
        from flashvl.model.parts.prepare import prepare_model

        _check_writable(json_file, plot)
        twins = load_twins(str(prepare_model(model)), preset, random_weights)
        machine = measure_machine(twins.model.dtype, twins.model.device)
        contenders = build_flashvl(twins)
        latencies = _measure_latencies(contenders, machine, tokens, rounds)
        _write_latencies(latencies, machine, json_file)
        if plot is not None:
            from flashvl.bench.figures import plot_latencies

            plot_latencies(latencies, machine, plot)
        _print_latencies(latencies, machine)


@bench_app.command()
def peers(
    preset: Annotated[str, typer.Option(help="Flash-VL as this preset has it.")] = "static",
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Leave out the others of the table; may be given several times."
        ),
    ] = None,
    vllm: Annotated[
        Path | None,
        typer.Option(metavar="PYTHON", help="Python of an environment with vLLM: run it, too."),
    ] = None,
    tokens: TokensOption = 128,
    rounds: RoundsOption = 3,
    json_file: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """One request alone: Flash-VL beside the models that the paper compares, at their true sizes.

    Random weights, one JPEG of 1024x768. The peers run by plain `generate`, with their own image
    processors of Pillow; compare them with `flashvl (generate)` to see the models, with `flashvl`
    to see what the engine adds. A round takes about seven minutes on two cores.

    With --vllm, Flash-VL is run by vLLM's Transformers backend, too, in a process of its own, with
    what vLLM's guide advises for CPUs; and then 16 requests at once, by the engine and by vLLM.

    Example: flashvl bench peers --plot peers.png

    Example: flashvl bench peers --only flashvl --vllm vllm/bin/python
    """
    with report_errors():
        from flashvl.bench.contenders import build_flashvl
        from flashvl.bench.machine import measure_machine
        from flashvl.bench.models import RandomWeights, build_twins
        from flashvl.bench.peers import build_peers, choose_names, paper_scores
        from flashvl.bench.throughput import compare_at_once
        from flashvl.bench.vllm import check_vllm, run_vllm

        _check_writable(json_file, plot)
        names = choose_names(only)
        if vllm is not None:
            check_vllm(vllm)
        weights = RandomWeights.for_this_machine()
        twins = build_twins(preset, weights)
        engine, plain = build_flashvl(twins)
        with contextlib.ExitStack() as stack:
            contenders: list[Contender] = [each for each in (engine, plain) if each.name in names]
            other = None
            if vllm is not None:
                sys.stderr.write("starting vLLM, which compiles for some minutes\n")
                other = stack.enter_context(run_vllm(vllm, plain, twins.processor))
                contenders.append(other)
            contenders += build_peers(weights, names)
            machine = measure_machine(twins.model.dtype, twins.model.device)
            latencies = _measure_latencies(contenders, machine, tokens, rounds)
            at_once: list[Throughput] = []
            if other is not None:
                with show_progress("16 at once") as on_progress:
                    at_once = compare_at_once(
                        engine,
                        other,
                        machine,
                        width=16,
                        num_tokens=tokens,
                        rounds=rounds,
                        on_progress=on_progress,
                    )
        more = {}
        if other is not None:
            more = {"at_once": [asdict(each) for each in at_once], "vllm": str(other)}
        _write_latencies(latencies, machine, json_file, more)
        if plot is not None:
            from flashvl.bench.figures import plot_latencies

            plot_latencies(latencies, machine, plot, paper_scores(preset), at_once)
        _print_latencies(latencies, machine)
        if other is not None:
            print(other)
            _print_throughputs(at_once)


@bench_app.command()
def throughput(
    model: ModelOption = "tiny",
    preset: PresetOption = None,
    random_weights: RandomOption = False,
    width: Annotated[
        list[int] | None,
        typer.Option(min=1, max=64, help="Requests at once; may be given several times."),
    ] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, help="In all, at each width; by default four times it.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Of every answer; by default ragged, mean 64.")
    ] = None,
    rounds: RoundsOption = 3,
    json_file: JsonOption = None,
) -> None:
    """Several requests at once: the engine beside batches of plain `generate`.

    Example: flashvl bench throughput --width 1 --width 8 --width 64

    Example: flashvl bench throughput --preset static --random-weights --width 16 --requests 16
    --tokens 128 --rounds 1
    """
    with report_errors():
        from flashvl.bench.contenders import build_flashvl
        from flashvl.bench.machine import measure_machine
        from flashvl.bench.models import load_twins
        from flashvl.bench.throughput import measure_throughput, ragged_lengths
        from flashvl.model.parts.prepare import prepare_model

        _check_writable(json_file)
        twins = load_twins(str(prepare_model(model)), preset, random_weights)
        machine = measure_machine(twins.model.dtype, twins.model.device)
        contenders = build_flashvl(twins)
        found = []
        for number in width or (1, 4, 16, 64):
            count = requests or 4 * number
            lengths = ragged_lengths(count) if tokens is None else [tokens] * count
            with show_progress(f"{number} at once") as on_progress:
                found += measure_throughput(
                    *contenders,
                    machine,
                    lengths,
                    width=number,
                    rounds=rounds,
                    on_progress=on_progress,
                )
        if json_file is not None:
            contenders_json = [asdict(each) for each in found]
            write_json(json_file, {"machine": asdict(machine), "contenders": contenders_json})
        _print_machine(machine)
        _print_throughputs(found)


@bench_app.command()
def caption(
    model: ModelOption = "tiny",
    images: Annotated[int, typer.Option(min=256, help="Different JPEGs in the table.")] = 1024,
    rounds: RoundsOption = 3,
    json_file: JsonOption = None,
) -> None:
    """Images a second of `flashvl caption`, beside the engine alone and a plain `map_batches`.

    Example: flashvl bench caption
    """
    with report_errors():
        from flashvl.bench.caption import measure_captioning
        from flashvl.model.parts.prepare import prepare_model

        _check_writable(json_file)
        start_ray()
        with show_progress("measuring") as on_progress:
            speed = measure_captioning(str(prepare_model(model)), images, rounds, on_progress)
        if json_file is not None:
            write_json(json_file, asdict(speed))
        print(f"images/s, median of {rounds} rounds, {speed.cores} cores")
        print(f"{speed.engine:8.1f}  engine alone, from tiles")
        print(f"{speed.decoding:8.1f}  decoding alone, one core")
        print(
            f"{speed.limit:8.1f}  both on the same cores:"
            f" 1 / (1 / {speed.engine:.1f} + 1 / ({speed.cores} x {speed.decoding:.1f}))"
        )
        print(f"{speed.job:8.1f}  flashvl caption: {speed.of_limit:.2f} of that")
        print(
            f"{speed.naive:8.1f}  map_batches over generate;"
            f" the job is {speed.times_naive:.2f} times as fast"
        )


@bench_app.command()
def serve(
    model: ModelOption = "tiny",
    preset: PresetOption = None,
    random_weights: RandomOption = False,
    tokens: TokensOption = 64,
    requests: Annotated[int, typer.Option(min=1, help="Of each client, in a round.")] = 8,
    rounds: RoundsOption = 3,
    slots: Annotated[int, typer.Option(min=16, help="max_num_seqs, and half of it waiting.")] = 16,
    times: Annotated[float, typer.Option(help="Overload: times the capacity.")] = 4.0,
    seconds: Annotated[float, typer.Option(help="Of overload; 0 leaves it out.")] = 120.0,
    port: Annotated[int, typer.Option(help="Of the service while it is measured.")] = 8765,
    json_file: JsonOption = None,
) -> None:
    """The service beside its own engine, with 1 and 16 clients; and under several times its load.

    Example: flashvl bench serve

    Example: flashvl bench serve --preset static --random-weights --requests 1 --seconds 0
    """
    with report_errors():
        from flashvl.bench.models import check_preset
        from flashvl.bench.serve import (
            compare_with_engine,
            measure_overload,
            served_model,
        )
        from flashvl.model.parts.prepare import prepare_model
        from flashvl.serve.config import ServiceConfig
        from flashvl.serve.listening import reserved_port
        from flashvl.serve.run import deployed

        _check_writable(json_file)
        check_preset(preset, random_weights)
        with (
            reserved_port("127.0.0.1", port, is_held=not os.environ.get("RAY_ADDRESS")) as port,
            served_model(str(prepare_model(model)), preset) as folder,
        ):
            start_ray()
            config = ServiceConfig(model=folder, max_num_seqs=slots, max_waiting=slots // 2)
            overload = None
            with deployed(config, "127.0.0.1", port) as url:
                with show_progress("measuring") as on_progress:
                    speeds = compare_with_engine(
                        config,
                        url,
                        widths=(1, 16),
                        tokens=tokens,
                        requests=requests,
                        rounds=rounds,
                        on_progress=on_progress,
                    )
                if seconds:
                    with show_progress("overloading") as on_progress:
                        measured = measure_overload(
                            config,
                            url,
                            times=times,
                            tokens=tokens,
                            requests=requests,
                            seconds=seconds,
                            on_progress=on_progress,
                        )
                        overload = asyncio.run(measured)
        if json_file is not None:
            figures = {"speeds": [asdict(each) for each in speeds]}
            write_json(json_file, figures | {"overload": overload and asdict(overload)})
        _print_table(
            ["", "clients", "TTFT ms", "tokens/s", "largest gap ms"],
            [
                [
                    each.name,
                    str(each.width),
                    f"{each.ttft_ms:.1f}",
                    f"{each.tokens_per_s:.1f}",
                    f"{each.largest_gap_ms:.1f}",
                ]
                for each in speeds
            ],
        )
        for engine, service in zip(speeds[::2], speeds[1::2], strict=True):
            print(
                f"{engine.width} clients: TTFT {service.ttft_ms - engine.ttft_ms:+.1f} ms,"
                f" {service.tokens_per_s / engine.tokens_per_s:.2f} of the engine's tokens/s"
            )
        if overload is not None:
            share = overload.answered_per_s / overload.capacity_per_s
            print(
                f"{overload.offered_per_s:.1f} requests/s offered to a capacity of"
                f" {overload.capacity_per_s:.1f}: {overload.answered_per_s:.1f} answered/s"
                f" ({share:.2f} of capacity), {overload.refused} refused, {overload.failed} failed"
            )
            print(
                f"TTFT of the answered: p50 {overload.ttft_p50_ms:.0f} ms, p99"
                f" {overload.ttft_p99_ms:.0f} ms, bound {overload.ttft_bound_ms:.0f} ms;"
                f" memory {overload.memory_start_mb:.0f} -> {overload.memory_end_mb:.0f} MB"
            )


def _check_writable(json_file: Path | None, plot: Path | None = None) -> None:
    """Before a long run, not behind it."""
    from flashvl.errors import ConfigError

    if json_file is not None:
        write_json(json_file, {})
    if plot is not None:
        import flashvl.bench.figures  # noqa: F401 - a missing library is told now, not in an hour
    if plot is not None and (plot.suffix != ".png" or not plot.parent.is_dir()):
        raise ConfigError(f"--plot {plot} must be a .png file in a folder that exists")


def _measure_latencies(
    contenders: Sequence["Contender"], machine: "Machine", tokens: int, rounds: int
) -> list["Latency"]:
    from flashvl.bench.latency import measure_latency

    with show_progress("measuring") as on_progress:
        return measure_latency(
            contenders, machine, num_tokens=tokens, rounds=rounds, on_progress=on_progress
        )


def _write_latencies(
    latencies: Sequence["Latency"],
    machine: "Machine",
    json_file: Path | None,
    more: Mapping[str, Any] = {},
) -> None:
    """Where a file is asked for: the figures, and `more` beside them."""
    if json_file is not None:
        figures = {"machine": asdict(machine), "contenders": [asdict(each) for each in latencies]}
        write_json(json_file, figures | dict(more))


def _print_throughputs(found: Sequence["Throughput"]) -> None:
    rows = [
        [
            str(each.width),
            each.name,
            f"{each.tokens_per_s:.1f}",
            f"{each.decode_tokens_per_s:.1f}",
            f"{each.ttft_ms:.0f}",
            f"{each.tpot_ms:.1f}",
            f"{each.roofline_fraction:.0%}",
            *([] if each.times_batches is None else [f"{each.times_batches:.2f}x"]),
        ]
        for each in found
    ]
    header = ["width", "", "tokens/s", "decoding", "TTFT ms", "TPOT ms", "roofline", "batches"]
    _print_table(header[: len(rows[0])], rows)


def _print_latencies(latencies: Sequence["Latency"], machine: "Machine") -> None:
    _print_machine(machine)
    _print_table(
        [
            "",
            "prompt",
            "TTFT ms",
            "TPOT ms",
            "tokens/s",
            "TTFT from JPEG",
            "tokens/s from JPEG",
            "prefill",
            "decode",
            "roofline",
        ],
        [
            [
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
            ]
            for each in latencies
        ],
    )


def _print_machine(machine: "Machine") -> None:
    print(
        f"{machine.device}, {machine.threads} threads, {machine.dtype}:"
        f" {machine.gemm_tflops:.2f} TFLOP/s, {machine.read_gb_per_s:.1f} GB/s"
    )


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need, those with a name to the right; nothing is cut in a log."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [
            cell.rjust(width) if name else cell.ljust(width)
            for cell, name, width in zip(row, header, widths, strict=True)
        ]
        print("  ".join(cells).rstrip())
