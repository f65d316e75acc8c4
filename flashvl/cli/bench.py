"""`flashvl bench`: speed, beside that of peers and the machine's own limits."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from flashvl.cli.options import JsonOption, ModelOption, write_json
from flashvl.entrypoint import report_errors, show_progress, start_ray

bench_app = typer.Typer(
    no_args_is_help=True, help="Measure speed, beside that of peers and the machine's limits."
)

PresetOption = Annotated[
    str | None,
    typer.Option(
        metavar="PRESET", help="Preset to build in place of a model; needs --random-weights."
    ),
]
RandomOption = Annotated[
    bool,
    typer.Option(
        "--random-weights",
        help="Use random weights, which take as long as trained ones.",
    ),
]
TokensOption = Annotated[int, typer.Option(metavar="INTEGER", min=2, help="Tokens of each answer.")]
RoundsOption = Annotated[
    int,
    typer.Option(
        metavar="INTEGER",
        min=1,
        help="Times that each contender is measured, in turn with the others.",
    ),
]
PortOption = Annotated[
    int,
    typer.Option(
        metavar="INTEGER", help="Port of the service while it is measured; 0: any free one."
    ),
]
PlotOption = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Draw the figures into this PNG file.")
]


@bench_app.command()
def images(rounds: RoundsOption = 20, json_file: JsonOption = None) -> None:
    """Measure image processing on one core.

    The figures are JPEGs a second, from bytes to the tower's pixels: by flashvl, and by
    transformers' own processor.

    Example: flashvl bench images
    """
    with report_errors():
        _check_writable(json_file)
        from flashvl.bench.contenders import HEIGHT, WIDTH
        from flashvl.bench.images import compare_image_processing
        from flashvl.bench.report import describe_images

        with show_progress("measuring") as on_progress:
            speeds = compare_image_processing(rounds, on_progress)
        _write(json_file, {"contenders": [asdict(each) for each in speeds]})
        print(describe_images(speeds, (WIDTH, HEIGHT), rounds))


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
    """Measure one request alone, beside `generate`.

    The figures are the time to the first token and the time between tokens.

    Example: flashvl bench latency --preset static --random-weights
    """
    with report_errors():
        _check_writable(json_file, plot)
        from flashvl.bench.latency import compare_with_generate
        from flashvl.bench.report import describe_latencies
        from flashvl.model.parts.prepare import prepare_model

        with show_progress("measuring") as on_progress:
            report = compare_with_generate(
                str(prepare_model(model)),
                preset,
                random_weights,
                num_tokens=tokens,
                rounds=rounds,
                on_progress=on_progress,
            )
        _write(json_file, asdict(report))
        if plot is not None:
            from flashvl.bench.figures import plot_latencies

            plot_latencies(report.contenders, report.machine, plot)
        print(describe_latencies(report.contenders, report.machine))


@bench_app.command()
def peers(
    preset: Annotated[str, typer.Option(metavar="PRESET", help="Preset of Flash-VL.")] = "static",
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Measure only this contender of the table; may be repeated."
        ),
    ] = None,
    vllm: Annotated[
        Path | None,
        typer.Option(
            metavar="PYTHON", help="Python of an environment with vLLM, which then runs, too."
        ),
    ] = None,
    tokens: TokensOption = 128,
    rounds: RoundsOption = 3,
    json_file: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Measure one request alone, beside the paper's other models.

    All models have their true sizes and random weights, and get one JPEG of 1024x768. The peers run
    by transformers' `generate` with their own image processors of Pillow. Compare them with
    `flashvl (generate)` to see the models, and with `flashvl` to see what the engine adds. A round
    takes about seven minutes on two cores.

    With --vllm, vLLM's Transformers backend runs Flash-VL, too, in a process of its own with the
    settings that vLLM's guide advises for CPUs. The engine and vLLM then answer 16 requests at
    once as well.

    Example: flashvl bench peers --plot peers.png

    Example: flashvl bench peers --only flashvl --vllm vllm/bin/python
    """
    with report_errors():
        _check_writable(json_file, plot)
        from flashvl.bench.peers import measure_peers, paper_scores
        from flashvl.bench.report import describe_latencies, describe_throughputs

        with show_progress("measuring") as on_progress:
            report = measure_peers(
                preset, only, vllm, num_tokens=tokens, rounds=rounds, on_progress=on_progress
            )
        figures = asdict(report)
        if report.vllm is None:
            del figures["at_once"], figures["vllm"]
        _write(json_file, figures)
        if plot is not None:
            from flashvl.bench.figures import plot_latencies

            scores = paper_scores(preset)
            plot_latencies(report.contenders, report.machine, plot, scores, report.at_once)
        print(describe_latencies(report.contenders, report.machine))
        if report.vllm is not None:
            print(report.vllm)
            print(describe_throughputs(report.at_once))


@bench_app.command()
def throughput(
    model: ModelOption = "tiny",
    preset: PresetOption = None,
    random_weights: RandomOption = False,
    width: Annotated[
        list[int] | None,
        typer.Option(
            metavar="INTEGER",
            min=1,
            max=64,
            help="Requests at once; may be repeated; by default 1, 4, 16 and 64.",
        ),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(
            metavar="INTEGER", min=1, help="Requests at each width; by default 4 times the width."
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            metavar="INTEGER",
            min=2,
            help="Tokens of each answer; by default random lengths of mean 64.",
        ),
    ] = None,
    rounds: RoundsOption = 3,
    json_file: JsonOption = None,
) -> None:
    """Measure several requests at once, beside `generate`.

    The engine takes a request as soon as a slot is free; `generate` takes them in batches.

    Example: flashvl bench throughput --width 1 --width 8 --width 64

    Example: flashvl bench throughput --preset static --random-weights --width 16 --requests 16
    --tokens 128 --rounds 1
    """
    with report_errors():
        _check_writable(json_file)
        from flashvl.bench.report import describe_throughputs
        from flashvl.bench.throughput import WIDTHS, measure_widths
        from flashvl.model.parts.prepare import prepare_model

        with show_progress("measuring") as on_progress:
            report = measure_widths(
                str(prepare_model(model)),
                preset,
                random_weights,
                widths=width or WIDTHS,
                num_requests=requests,
                num_tokens=tokens,
                rounds=rounds,
                on_progress=on_progress,
            )
        _write(json_file, asdict(report))
        print(describe_throughputs(report.contenders, report.machine))


@bench_app.command()
def caption(
    model: ModelOption = "tiny",
    images: Annotated[
        int, typer.Option(metavar="INTEGER", min=256, help="Different JPEGs in the table.")
    ] = 1024,
    rounds: RoundsOption = 3,
    json_file: JsonOption = None,
) -> None:
    """Measure the images a second of `flashvl caption`.

    The comparison is with the engine alone, and with a plain `map_batches`.

    Example: flashvl bench caption
    """
    with report_errors():
        _check_writable(json_file)
        from flashvl.bench.caption import measure_captioning
        from flashvl.bench.report import describe_captioning
        from flashvl.model.parts.prepare import prepare_model

        start_ray()
        with show_progress("measuring") as on_progress:
            speed = measure_captioning(str(prepare_model(model)), images, rounds, on_progress)
        _write(json_file, asdict(speed))
        print(describe_captioning(speed, rounds))


@bench_app.command()
def serve(
    model: ModelOption = "tiny",
    preset: PresetOption = None,
    random_weights: RandomOption = False,
    tokens: TokensOption = 64,
    requests: Annotated[
        int, typer.Option(metavar="INTEGER", min=1, help="Requests of each client in each round.")
    ] = 8,
    rounds: RoundsOption = 3,
    slots: Annotated[
        int,
        typer.Option(
            metavar="INTEGER",
            min=16,
            help="Requests that the service answers at once; half as many may wait.",
        ),
    ] = 16,
    times: Annotated[
        float,
        typer.Option(metavar="NUMBER", help="Overload as a multiple of the service's capacity."),
    ] = 4.0,
    seconds: Annotated[
        float, typer.Option(metavar="NUMBER", help="Seconds of overload; 0 leaves it out.")
    ] = 120.0,
    port: PortOption = 8765,
    json_file: JsonOption = None,
) -> None:
    """Measure the service beside its own engine.

    Both answer 1 and 16 clients; then the service alone is overloaded.

    Example: flashvl bench serve

    Example: flashvl bench serve --preset static --random-weights --requests 1 --seconds 0
    """
    with report_errors():
        _check_writable(json_file)
        from flashvl.bench.report import describe_service
        from flashvl.bench.serve import measure_service

        with (
            _model_to_serve(model, preset, random_weights, port) as (served, port),
            show_progress("measuring") as on_progress,
        ):
            found = measure_service(
                served,
                port,
                slots=slots,
                tokens=tokens,
                requests=requests,
                rounds=rounds,
                times=times,
                seconds=seconds,
                on_progress=on_progress,
            )
        _write(json_file, asdict(found))
        print(describe_service(found))


@contextmanager
def _model_to_serve(
    model: str, preset: str | None, random_weights: bool, port: int
) -> Iterator[tuple[str, int]]:
    """The model and the port of a service that is to be measured; Ray is started for it."""
    from flashvl.bench.serve import HOST, served_model
    from flashvl.model.parts.prepare import prepare_model
    from flashvl.serve.listening import reserved_port

    with (
        reserved_port(HOST, port, is_held=not os.environ.get("RAY_ADDRESS")) as reserved,
        served_model(str(prepare_model(model)), preset, random_weights) as served,
    ):
        start_ray()
        yield served, reserved


@bench_app.command()
def together(
    model: ModelOption = "tiny",
    preset: PresetOption = None,
    random_weights: RandomOption = False,
    tokens: TokensOption = 16,
    requests: Annotated[
        int,
        typer.Option(
            metavar="INTEGER", min=100, help="Requests alone, and as many beside the job, in all."
        ),
    ] = 320,
    rounds: Annotated[
        int,
        typer.Option(
            metavar="INTEGER",
            min=1,
            help="Times that the requests, the job, and both are measured in turn.",
        ),
    ] = 4,
    rate: Annotated[
        float, typer.Option(metavar="NUMBER", min=0.001, help="Requests a second.")
    ] = 4.0,
    slots: Annotated[
        int,
        typer.Option(metavar="INTEGER", min=2, help="Requests that the service answers at once."),
    ] = 64,
    port: PortOption = 8765,
    json_file: JsonOption = None,
) -> None:
    """Measure online requests beside an offline job on one service.

    Requests come at random times, alone and beside a captioning job with --via-serve that always
    has more rows. The figures are the times to the first token, and the rows a second of the job.

    Example: flashvl bench together
    """
    with report_errors():
        _check_writable(json_file)
        from flashvl.bench.report import describe_together
        from flashvl.bench.together import measure_together

        with (
            _model_to_serve(model, preset, random_weights, port) as (served, port),
            show_progress("measuring") as on_progress,
        ):
            found = measure_together(
                served,
                port,
                slots=slots,
                tokens=tokens,
                num_requests=requests,
                rounds=rounds,
                rate=rate,
                on_progress=on_progress,
            )
        _write(json_file, asdict(found))
        print(describe_together(found, rounds))


@bench_app.command()
def train(
    model: ModelOption = "tiny",
    steps: Annotated[
        int, typer.Option(metavar="INTEGER", min=8, help="Steps of 128 samples in each round.")
    ] = 8,
    rounds: RoundsOption = 3,
    json_file: JsonOption = None,
) -> None:
    """Measure the samples a second of training.

    Packed micro-batches are compared with padded ones, and a feed by Ray Data with ready tensors.

    Example: flashvl bench train
    """
    with report_errors():
        _check_writable(json_file)
        from flashvl.bench.report import describe_training
        from flashvl.bench.train import measure_training
        from flashvl.model.parts.prepare import prepare_model

        start_ray()
        with show_progress("measuring") as on_progress:
            speed = measure_training(str(prepare_model(model)), steps, rounds, on_progress)
        _write(json_file, asdict(speed))
        print(describe_training(speed, rounds))


@bench_app.command()
def grpo(
    model: ModelOption = "tiny",
    preset: PresetOption = None,
    random_weights: RandomOption = False,
    layers: Annotated[
        int | None,
        typer.Option(
            metavar="INTEGER", min=1, help="Layers of a preset's tower and LLM; by default all."
        ),
    ] = None,
    prompts: Annotated[
        int, typer.Option(metavar="INTEGER", min=1, help="Prompts in a step; each has a group.")
    ] = 4,
    tokens: Annotated[
        int, typer.Option(metavar="INTEGER", min=2, help="Tokens of a completion at most.")
    ] = 64,
    rounds: RoundsOption = 3,
    json_file: JsonOption = None,
) -> None:
    """Measure GRPO beside TRL's trainer.

    The figures are the completions a second of rollouts, in groups of 24, and the seconds of a
    whole step; steps are not measured with random weights.

    Example: flashvl bench grpo --model tiny-iss

    Example: flashvl bench grpo --preset static --random-weights --layers 4 --prompts 1 --tokens 32
    --rounds 1
    """
    with report_errors():
        _check_writable(json_file)
        from flashvl.bench.grpo import measure_grpo
        from flashvl.bench.report import describe_grpo
        from flashvl.model.parts.prepare import prepare_model

        with show_progress("measuring") as on_progress:
            speed = measure_grpo(
                str(prepare_model(model)),
                preset,
                random_weights,
                num_layers=layers,
                num_prompts=prompts,
                num_tokens=tokens,
                rounds=rounds,
                on_progress=on_progress,
            )
        _write(json_file, asdict(speed))
        print(describe_grpo(speed, rounds))


@bench_app.command()
def feed(
    model: ModelOption = "tiny",
    rows: Annotated[
        list[int] | None,
        typer.Option(
            metavar="INTEGER",
            min=1000,
            help="Rows of a stage; may be repeated; by default 10^4, 10^6 and 10^7.",
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Measure the memory of the training feed.

    It is that of the driver and of the tasks, for several numbers of rows.

    Example: flashvl bench feed
    """
    with report_errors():
        _check_writable(json_file)
        from flashvl.bench.feed import measure_growth
        from flashvl.bench.report import describe_growth
        from flashvl.model.parts.prepare import prepare_model

        with show_progress("measuring") as on_progress:
            found = measure_growth(
                str(prepare_model(model)), rows or (10**4, 10**6, 10**7), on_progress
            )
        _write(json_file, {"sizes": [asdict(each) for each in found]})
        print(describe_growth(found))


def _check_writable(json_file: Path | None, plot: Path | None = None) -> None:
    """Refuse a bad path, or a missing library, before a long run.

    Raises:
        ConfigError: a file cannot be written, or `plot` is not a PNG file.
    """
    from flashvl.errors import ConfigError

    _write(json_file, {})
    if plot is not None:
        import flashvl.bench.figures  # noqa: F401 - where matplotlib is missing, this tells so now
    if plot is not None and (plot.suffix != ".png" or not plot.parent.is_dir()):
        raise ConfigError(f"--plot {plot} must be a .png file in a folder that exists")


def _write(json_file: Path | None, figures: Mapping[str, Any]) -> None:
    if json_file is not None:
        write_json(json_file, figures)
