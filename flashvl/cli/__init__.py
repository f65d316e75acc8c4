"""The `flashvl` command: each subcommand parses, calls one library function and prints the result.

Heavy libraries are imported inside the commands, so that `flashvl --help` answers at once.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from flashvl import __version__
from flashvl.batch.config import CaptionJob
from flashvl.cli.bench import bench_app
from flashvl.cli.data import data_app
from flashvl.cli.evaluation import eval_app
from flashvl.cli.options import JsonOption, ModelOption, build, options_from, write_json
from flashvl.cli.plan import plan_app
from flashvl.entrypoint import allow_downloads, report_errors, show_progress, start_ray
from flashvl.serve.config import ServiceConfig

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # would eat square brackets and cut the options' names to fit a panel
    help="Train and run Flash-VL vision-language models on Ray.",
)
app.add_typer(eval_app, name="eval")
app.add_typer(bench_app, name="bench")
app.add_typer(data_app, name="data")
app.add_typer(plan_app, name="plan")


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"flashvl {__version__}")
        raise typer.Exit


@app.callback()
def flashvl(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None: ...


@app.command()
@options_from(
    CaptionJob,
    arguments=("input",),
    metavars={
        "input": "INPUT",
        "output": "FOLDER",
        "model": "NAME|FOLDER",
        "prompt": "TEXT",
        "prompt_column": "COLUMN",
        "image_column": "COLUMN",
        "id_column": "COLUMN",
        "media_hosts": "HOST",
        "keep": "COLUMN",
        "replicas": "N|MIN:MAX",
        "via_serve": "APP",
    },
)
def caption(
    json_schema: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File of a JSON schema under which every caption is valid unless it is cut at"
            " --max-new-tokens.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the job and print its plan, but start nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    **options: Any,
) -> None:
    """Caption the images of a table or a folder.

    The same command again resumes a job that was stopped or killed. After a trial with --max-rows,
    the same command without it captions the rest. With --append, it captions the files that were
    added to the input since.

    Captions are written to OUTPUT/captions, rows that could not be captioned to
    OUTPUT/dead_letters with the reason, pictures and totals to OUTPUT/report.html, and the closing
    audit to OUTPUT/_summary.json.

    Example: flashvl caption photos/ --output captions/

    Example: flashvl caption s3://bucket/table/ --output s3://bucket/captions/ --keep url
    --replicas 1:8

    Example: flashvl caption 'shards/{000..099}.tar' --output captions/ --prompt-column txt
    """
    if options["input"].startswith("hf://"):
        allow_downloads()
    with report_errors():
        if json_schema is not None:
            options["json_schema"] = _read(json_schema)
        job = build(CaptionJob, options, command="caption")
        from flashvl.batch.job import check_caption_job, run_plan
        from flashvl.model.parts.prepare import prepare_model

        job = job.model_copy(update={"model": str(prepare_model(job.model))})
        plan = check_caption_job(job)
        if dry_run:
            print(json.dumps(plan.describe(), indent=2) if as_json else plan)
            return
        summary = plan.finished_summary()
        if summary is None:
            start_ray(is_beside_service=job.via_serve is not None)
            with show_progress("captioning") as on_progress:
                summary = run_plan(plan, on_progress)
        if as_json:
            print(summary.model_dump_json(indent=2))
            return
        print(
            f"{plan.output}: {summary.input} images, {summary.written} captions,"
            f" {summary.dead} dead letters, {summary.seconds:.1f} s,"
            f" {summary.images_per_s:.1f} images/s"
        )
        if summary.duplicate_ids:
            print(
                f"{summary.duplicate_ids} rows have the id of an earlier row;"
                " the column row tells them apart"
            )
        print(f"Open {plan.output / 'report.html'} to see a sample.")


def _read(file: Path) -> str:
    """
    Raises:
        ConfigError: the file cannot be read as text.
    """
    from flashvl.errors import ConfigError

    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"cannot read {file}: {reason}; name a JSON schema's file") from None


@app.command()
def chat(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="Image file to talk about.")],
    model: ModelOption = "tiny",
    max_new_tokens: Annotated[
        int, typer.Option(metavar="INTEGER", min=1, help="Tokens of an answer at most.")
    ] = 256,
) -> None:
    """Talk about an image, one question a line.

    The conversation ends with the input (Ctrl-D).

    Example: flashvl chat scene.png

    Example: echo "How many shapes are there?" | flashvl chat scene.png
    """
    with report_errors():
        from flashvl.data.images import read_image
        from flashvl.engine import Engine
        from flashvl.engine.chat import ChatSession
        from flashvl.model.parts.prepare import prepare_model

        picture = read_image(image)
        engine = Engine.from_pretrained(prepare_model(model))
        conversation = ChatSession(engine, [picture], max_new_tokens)
        is_asked_by_hand = sys.stdin.isatty()
        while True:
            if is_asked_by_hand:
                print("> ", end="", flush=True)
            question = sys.stdin.readline()
            if not question:
                break
            if question.strip():
                for piece in conversation.ask(question.strip()):
                    print(piece, end="", flush=True)
                print()


@app.command()
@options_from(
    ServiceConfig,
    metavars={
        "model": "NAME|FOLDER",
        "replicas": "N|MIN:MAX",
        "media_hosts": "HOST",
        "api_keys_file": "FILE",
        "batch_roots": "FOLDER|URI",
        "cors_origins": "ORIGIN",
    },
)
def serve(
    host: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="Address to listen on; 0.0.0.0: every address."),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            metavar="INTEGER", min=0, max=65535, help="Port to listen on; 0: any free port."
        ),
    ] = 8000,
    **options: Any,
) -> None:
    """Answer OpenAI clients over HTTP until Ctrl-C.

    The printed address, opened in a browser, shows a page to try the model on.

    After Ctrl-C or SIGTERM, the service refuses new requests, finishes those under way and ends; a
    second Ctrl-C or SIGTERM ends it at once.

    Example: flashvl serve --model tiny

    Example: curl -F image=@photo.jpg http://127.0.0.1:8000/v1/captions
    """
    from flashvl.serve.stopping import until_stopped

    with report_errors(), until_stopped() as signals:
        config = build(ServiceConfig, options, command="serve")
        from flashvl.serve.listening import reserved_port

        is_ray_ours = not os.environ.get("RAY_ADDRESS")
        with reserved_port(host, port, is_held=is_ray_ours) as port:
            from flashvl.model.parts.prepare import prepare_model
            from flashvl.serve.admission import read_api_keys
            from flashvl.serve.run import serve_until_stopped

            if host not in ("127.0.0.1", "localhost", "::1") and not read_api_keys(
                config.api_keys_file
            ):
                print(f"Anyone who reaches {host}:{port} may use it: FLASHVL_API_KEYS is not set.")
            config = config.model_copy(update={"model": str(prepare_model(config.model))})
            start_ray(include_dashboard=True)
            serve_until_stopped(config, host, port, signals, tell=print, is_ray_ours=is_ray_ours)


@app.command()
def train(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="Recipe file, as in ray_jobs/configs/.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Values that replace the recipe's."),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            metavar="KEY=VALUE,VALUE,...",
            help="Field of the recipe and its values: the stage is run once for each, side by side"
            " on the cluster, in a folder of its own in output_dir.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train one stage from its recipe.

    The same command again resumes a stage that was stopped or killed, also with another num_workers
    or zero_stage. The next stage starts from the folder that is written.

    Example: flashvl train ray_jobs/configs/static/stage1.yaml init_from=/models/static

    Example: flashvl train ray_jobs/configs/static/stage5.yaml --sweep beta=0.05,0.1,0.2,0.5
    """
    with report_errors():
        if sweep is not None:
            _sweep(recipe, overrides or (), sweep, as_json)
            return
        from flashvl.train.recipe import load_recipe

        loaded = load_recipe(recipe, overrides or ())
        from flashvl.train.run.failures import RankError
        from flashvl.train.run.launch import run_stage
        from flashvl.train.run.stage import check_stage

        stage = check_stage(loaded)
        result = stage.finished()
        if result is None:
            print(stage, flush=True)
            start_ray(include_dashboard=True)
            try:
                with show_progress(loaded.stage) as on_progress:
                    result = run_stage(stage, on_progress)
            except RankError as error:
                sys.stderr.write(f"error: {error}\n")
                raise typer.Exit(1) from None
        print(json.dumps(dataclasses.asdict(result), indent=2) if as_json else result)


def _sweep(recipe: Path, overrides: Sequence[str], sweep: str, as_json: bool) -> None:
    """Run `train --sweep`, and print the table of its trials."""
    from flashvl.train.sweep import check_trials, load_trials, run_sweep

    field, trials = load_trials(recipe, overrides, sweep)
    stages = check_trials(trials)
    if any(stage.finished() is None for stage in stages.values()):
        start_ray(include_dashboard=True)
    with show_progress("trials") as on_progress:
        found = run_sweep(field, stages, on_progress)
    print(json.dumps(found.describe(), indent=2) if as_json else found)


@app.command()
def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Print the presets and their parameter counts.

    Each preset is built in full, on the meta device: no memory is needed for its weights.
    """
    with report_errors():
        from flashvl.model.presets import PRESETS, count_parameters

        counts = {preset: count_parameters(preset) for preset in PRESETS}
        if as_json:
            print(json.dumps(counts, indent=2))
            return
        for preset, parts in counts.items():
            print(preset)
            for part, count in parts.items():
                print(f"  {part:<20}{count:>15,}")


@app.command("import")
def import_(
    source: Annotated[
        str,
        typer.Argument(
            metavar="REPO|FOLDER", help="Published FlashVL/* model on the hub, or its folder here."
        ),
    ],
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="New folder for the model.")],
) -> None:
    """Turn a published FlashVL checkpoint into a folder for --model.

    Without a network, download the checkpoint elsewhere (hf download REPO --local-dir DIR) and give
    that folder.

    Example: flashvl import FlashVL/FlashVL-2B-Static --output static/
    """
    allow_downloads()
    with report_errors():
        from flashvl.model.parts.prepare import fetch_folder
        from flashvl.model.parts.released import import_released

        import_released(fetch_folder(source), output)
        print(f"{output}: {source} as stored; use it with --model {output}")


@app.command()
def assemble(
    vision: Annotated[
        str,
        typer.Option(
            metavar="REPO|FOLDER", help="Vision tower of the kind SigLIP, SigLIP2 or AIMv2."
        ),
    ],
    llm: Annotated[
        str,
        typer.Option(
            metavar="REPO|FOLDER", help="Language model of the kind Qwen2, Qwen2.5 or Llama 3.2."
        ),
    ],
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="New folder for the model.")],
    tiling: Annotated[
        Literal["static", "dynamic", "overlap", "iss"],
        typer.Option(help="Rule by which images are cut."),
    ] = "static",
    seed: Annotated[
        int, typer.Option(metavar="INTEGER", help="Random seed for the adapter's weights.")
    ] = 0,
) -> None:
    """Join a vision tower and a language model by a new adapter.

    Stage 1 of training starts from the result.

    Example: flashvl assemble --vision google/siglip2-so400m-patch16-512
    --llm Qwen/Qwen2.5-1.5B-Instruct --output start/
    """
    allow_downloads()
    with report_errors():
        from flashvl.model.parts.assembly import assemble
        from flashvl.model.parts.prepare import fetch_folder

        parts = fetch_folder(vision), fetch_folder(llm)
        assemble(*parts, output, tiling=tiling, seed=seed)
        print(f"{output}: {vision} and {llm}, adapter untrained; name it as a recipe's init_from")


@app.command()
def tiles(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="Image file to cut.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="PNG file for the drawing.")],
    tiling: Annotated[
        str,
        typer.Option(
            metavar="PRESET",
            help="Preset whose rule cuts it: static, dynamic, overlap, iss or another.",
        ),
    ] = "iss",
    json_file: JsonOption = None,
) -> None:
    """Draw how an image is cut into tiles.

    The drawing shows each tile, the patches that are kept of it, and the visual tokens it costs.

    Example: flashvl tiles photo.jpg --tiling iss --output tiles.png
    """
    with report_errors():
        from flashvl.demo.tiles import write_tiles
        from flashvl.model.presets import build_config

        if json_file is not None:
            write_json(json_file, {})
        config = build_config(tiling)
        numbers = write_tiles(image, output, config.tiling_rule, config.image_seq_length)
        if json_file is not None:
            write_json(json_file, numbers)
        print(f"{output}: {numbers['num_tiles']} tiles, {numbers['num_image_tokens']} image tokens")


@app.command()
def demo(
    output: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Folder for the table, its captions and the report."),
    ],
) -> None:
    """Caption 200 pictures with the shipped model.

    OUTPUT/report.html shows each picture beside its caption.

    Example: flashvl demo --output demo/
    """
    with report_errors():
        from rich.console import Console

        from flashvl.demo.run import render_demo, run_demo

        start_ray()
        with show_progress("captioning") as on_progress:
            made = run_demo(output, on_progress=on_progress)
        console = Console()
        console.print(render_demo(made))
        console.print(f"Open {made.report} to see each picture beside its caption.")


def main() -> None:
    """Run the command line."""
    app()
