"""The demo from start to end: table, captions, comparison with the true captions, report."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flashvl.batch.config import CaptionJob
from flashvl.batch.job import Summary, run_caption_job
from flashvl.data.ledger.manifest import has_begun
from flashvl.data.ledger.outputs import check_output
from flashvl.data.storage import locate
from flashvl.demo.report import write_report
from flashvl.demo.results import DeadLetter, Result, read_dead_letters, read_results
from flashvl.demo.table import write_demo_table
from flashvl.errors import ConfigError
from flashvl.progress import ShowProgress, ignore_progress

SHOWN_ROWS = 12
"""Captions that the console's table shows; the report has all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Demo:
    """The files that a demo has written, and its results."""

    table: Path
    """The Parquet file of pictures."""
    report: Path
    """The HTML file of the report."""
    summary: Summary
    results: list[Result]
    dead_letters: list[DeadLetter]


def run_demo(
    output: Path, model: str = "tiny", on_progress: ShowProgress = ignore_progress
) -> Demo:
    """Caption the demo's table with `model`; Ray must be started already.

    Args:
        output: folder for `demo.parquet`, `captions/` (see `flashvl.batch.outputs`) and
            `report.html`. Those of an earlier demo are replaced; other files stay as they are.

    Raises:
        ConfigError: `output` cannot be written, or holds captions that no demo made.
        CheckpointError: `model` cannot be loaded.
    """
    table, captions, report = (
        output / name for name in ("demo.parquet", "captions", "report.html")
    )
    try:
        output.mkdir(parents=True, exist_ok=True)
        check_output(locate(captions))
        # Checked before the table is written, by which the captions would count as a demo's.
        if has_begun(locate(captions)) and not table.exists():
            raise ConfigError(f"{captions} holds captions that no demo made; name another folder")
        write_demo_table(table)
    except OSError as error:
        raise ConfigError(
            f"output {output} cannot be written ({error.strerror}); name another folder"
        ) from None

    job = CaptionJob(input=str(table), output=str(captions), model=model, restart=True)
    summary = run_caption_job(job, on_progress)
    demo = Demo(
        table=table,
        report=report,
        summary=summary,
        results=read_results(table, captions),
        dead_letters=read_dead_letters(captions),
    )
    write_report(report, summary, demo.results, demo.dead_letters)
    return demo


def render_demo(demo: Demo) -> RenderableType:
    """A summary for the console: some captions beside the true ones, dead letters and totals."""
    captions = Table(title="Captions", title_justify="left", expand=False)
    for name in ("image", "caption", "true answer", "right"):
        captions.add_column(name, overflow="fold")
    for result in demo.results[:SHOWN_ROWS]:
        mark = Text("yes", "green") if result.is_right else Text("no", "red")
        captions.add_row(Text(result.id), Text(result.caption), Text(result.answer), mark)
    if len(demo.results) > SHOWN_ROWS:
        captions.caption = f"and {len(demo.results) - SHOWN_ROWS} more in the report"

    dead = Table(title="Dead letters", title_justify="left", expand=False)
    for name in ("image", "step", "reason"):
        dead.add_column(name, overflow="fold")
    for letter in demo.dead_letters:
        dead.add_row(Text(letter.id), Text(letter.step), Text(letter.reason))

    summary = demo.summary
    num_right = sum(result.is_right for result in demo.results)
    totals = (
        f"{summary.input} images: {summary.written} captioned, {summary.dead} dead letters; "
        f"{num_right} captions exactly right; "
        f"{summary.seconds:.1f} s, {summary.images_per_s:.1f} images/s"
    )
    return Group(captions, dead, Text(totals))
