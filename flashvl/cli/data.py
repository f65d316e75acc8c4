"""`flashvl data`: make the tables that training reads, and look at them."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from flashvl.cli.options import ModelOption, build, options_from
from flashvl.data.convert.config import ConversionJob
from flashvl.entrypoint import allow_downloads, report_errors, show_progress, start_ray

data_app = typer.Typer(no_args_is_help=True, help="Make tables for training, and look at them.")

AsJsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@data_app.command()
@options_from(
    ConversionJob,
    arguments=("family", "input"),
    metavars={
        "family": "FAMILY",
        "input": "INPUT",
        "output": "FOLDER",
        "images": "FOLDER",
        "mapping": "FILE",
        "media_hosts": "HOST",
    },
)
def convert(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the job and print its plan, but start nothing.")
    ] = False,
    as_json: AsJsonOption = False,
    **options: Any,
) -> None:
    """Turn a published data set into a table for training.

    The same command again resumes a job that was stopped or killed. After a trial with --max-rows,
    the same command without it converts the rest. With --append, it converts the files that were
    added to the input since.

    Rows are written to OUTPUT/conversations, OUTPUT/preferences or OUTPUT/prompts, by the family;
    rows that cannot be used, to OUTPUT/dead_letters with the reason; and the closing audit to
    OUTPUT/_summary.json.

    Example: flashvl data convert webdataset Infinity-MM/stage2/ --output tables/stage2/

    Example: flashvl data convert llava llava_v1_5_mix665k.json --images images/ --output llava/

    Example: flashvl data convert tables 'ChartQA/data/train-*' --mapping
    ray_jobs/mappings/chartqa.yaml --output chartqa/
    """
    if any((options[name] or "").startswith("hf://") for name in ("input", "images")):
        allow_downloads()
    with report_errors():
        job = build(ConversionJob, options, command="data convert")
        from flashvl.data.convert.job import check_conversion, run_plan

        plan = check_conversion(job)
        if dry_run:
            print(json.dumps(plan.describe(), indent=2) if as_json else plan)
            return
        summary = plan.finished_summary()
        if summary is None:
            start_ray()
            with show_progress("converting") as on_progress:
                summary = run_plan(plan, on_progress)
        if as_json:
            print(summary.model_dump_json(indent=2))
            return
        print(
            f"{plan.table}: {summary.input} rows, {summary.written} {plan.family.table.name},"
            f" {summary.dead} dead letters, {summary.seconds:.1f} s,"
            f" {summary.rows_per_s:.1f} rows/s"
        )
        if summary.duplicate_ids:
            print(
                f"{summary.duplicate_ids} rows have the id of an earlier row;"
                " the column row tells them apart"
            )
        print(f"Look at it with flashvl data inspect {plan.table} --output sheet.png")


@data_app.command("inspect")
def inspect_(
    table: Annotated[
        str,
        typer.Argument(metavar="TABLE", help="Table's folder, file or URI, or a job's OUTPUT."),
    ],
    model: ModelOption = "tiny",
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="PNG file for pictures with their question and answer."),
    ] = None,
    rows: Annotated[
        int, typer.Option(metavar="INTEGER", min=1, help="Rows to measure, at even distances.")
    ] = 1024,
    as_json: AsJsonOption = False,
) -> None:
    """Print what a table for training holds.

    Counts, sizes, turns, images and token lengths with the model's processor.

    Example: flashvl data inspect tables/stage2/ --output sheet.png
    """
    if table.startswith("hf://"):
        allow_downloads()
    with report_errors():
        from flashvl.data.inspection import describe, inspect_table, open_table, sample_rows
        from flashvl.model.loading import load_processor
        from flashvl.model.parts.prepare import prepare_model

        opened = open_table(table)
        sampled = list(sample_rows(opened, rows))
        if output is not None:
            from flashvl.data.sheet import write_sheet

            write_sheet(sampled, output)
        inspection = inspect_table(opened, sampled, load_processor(prepare_model(model)))
        print(inspection.model_dump_json(indent=2) if as_json else describe(inspection))
