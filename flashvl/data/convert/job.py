"""Data sets as they are published -> the tables that training reads, in one pass.

    read -> convert and verify the images (CPU tasks) -> Parquet

The entry point starts Ray. An output has one of the tables `conversations`, `preferences` and
`prompts`, and beside it the dead letters: see `flashvl.data.ledger.outputs`.
"""

import functools
import math
import time
from collections.abc import Generator
from dataclasses import dataclass

import pyarrow as pa

from flashvl import __version__
from flashvl.data.convert.config import ConversionJob
from flashvl.data.convert.families import find_family
from flashvl.data.convert.family import Family
from flashvl.data.convert.rows import convert_rows
from flashvl.data.inputs.records import find_records
from flashvl.data.inputs.source import Done
from flashvl.data.ledger.apart import check_apart
from flashvl.data.ledger.manifest import Fingerprint, has_begun, hash_listed, read_files
from flashvl.data.ledger.outputs import check_output
from flashvl.data.ledger.rates import RateWindow
from flashvl.data.ledger.stopping import Drain, begin_nothing
from flashvl.data.ledger.streaming import stream_tables
from flashvl.data.ledger.work import Audit, Work
from flashvl.data.storage import Location, locate
from flashvl.errors import ConfigError
from flashvl.progress import ShowProgress, ignore_progress

MEGABYTE = 10**6


class Summary(Audit):
    """The closing audit, as written to `_summary.json`: `input == written + dead`."""

    rows_per_s: float
    """Rows that the run that finished the job converted each second."""
    family: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A conversion whose input and output have been checked."""

    job: ConversionJob
    family: Family
    images: Location
    """Folder of the images that rows name."""
    work: Work

    @property
    def table(self) -> Location:
        """The folder of the results, which a recipe or a mixture names."""
        return self.work.output / self.family.table.name

    def describe(self) -> dict[str, str | int]:
        """The plan for people: what is to be converted, and how many rows are done."""
        return {
            "family": self.job.family,
            "input": self.job.input,
            "read": self.work.source.describe(),
            "files": len(self.work.source.files),
            "rows": self.work.num_rows,
            "done": self.work.count_done(),
            "images": str(self.images),
            "output": str(self.work.output),
            "table": self.family.table.name,
        }

    def __str__(self) -> str:
        return "\n".join(f"{name:<16}{value}" for name, value in self.describe().items())

    def finished_summary(self) -> Summary | None:
        """The closing audit of a finished job; None where rows are left to convert."""
        return self.work.read_audit(Summary)


def check_conversion(job: ConversionJob) -> Plan:
    """Check everything that can be checked without Ray, so that a wrong job does not start it.

    Raises:
        ConfigError: the input, the output or an option is wrong; nothing was started or created.
    """
    family = find_family(job)
    check_apart(job.input, job.output, family.table.name)
    output = locate(job.output)
    check_output(output)
    known = read_files(output) if has_begun(output) and not job.restart else []
    source = find_records(
        job.input,
        kinds=family.kinds,
        needed=family.needed,
        used=family.used,
        image_limits=job.image_limits,
        known=known,
    )
    images = source.listing.root if job.images is None else locate(job.images)
    if job.images is not None and not images.is_folder():
        raise ConfigError(f"images {job.images!r} is not a folder; name the images' folder")
    fingerprint: Fingerprint = {
        "version": __version__,
        "family": job.family,
        "mapping": _read_text(job.mapping),
        "images": str(images),
        "limits": job.image_limits.model_dump_json(),
        "num_rows": source.num_rows,
        "input": hash_listed(source.files),
    }
    work = Work(
        input=job.input,
        source=source,
        output=output,
        results=family.table,
        kept=pa.schema([]),
        fingerprint=fingerprint,
        known=known,
        max_rows=job.max_rows,
        max_error_rate=job.max_error_rate,
        restart=job.restart,
    )
    work.check_resumes(may_grow=job.append)
    return Plan(job=job, family=family, images=images, work=work)


def _read_text(path: str | None) -> str:
    return "none" if path is None else locate(path).read().decode()


def convert(job: ConversionJob, on_progress: ShowProgress = ignore_progress) -> Summary:
    """Convert every row of the input; a row that cannot be used becomes a dead letter.

    Where the output holds a part of the same job already, only the rest is converted. After SIGTERM
    the job stops as soon as the rows that have arrived are on disk.

    Args:
        on_progress: called on the driver as rows arrive, with their rates as its note.

    Raises:
        ConfigError: the input, the output or an option is wrong; nothing was started or created.
        FlashVLError: too many rows are dead letters; the disk is full; the audit failed, so that
            rows are missing or doubled; or SIGTERM came.
    """
    return run_plan(check_conversion(job), on_progress)


def run_plan(plan: Plan, on_progress: ShowProgress = ignore_progress) -> Summary:
    """Run a conversion that was checked; see `convert`."""
    started_s = time.monotonic()
    if (summary := plan.finished_summary()) is not None:
        return summary
    work = plan.work
    with work.begun() as output:
        num_found = output.num_done
        work.finish_rows(output, functools.partial(_answer, plan), Meter(), on_progress)
        seconds = time.monotonic() - started_s
        summary = Summary(
            input=work.num_rows,
            written=output.results.num_rows,
            dead=output.dead_letters.num_rows,
            duplicate_ids=output.count_duplicate_ids(),
            seconds=round(seconds, 3),
            rows_per_s=round((work.num_rows - num_found) / seconds, 3),
            family=plan.job.family,
        )
        output.finish(summary.model_dump_json(indent=2) + "\n")
    return summary


def _answer(plan: Plan, is_done: Done) -> tuple[Generator[pa.Table, None, None], Drain]:
    """Begin to convert the rows that are not done; see `flashvl.data.ledger.work.Answer`."""
    return _converted(plan, is_done), begin_nothing


def _converted(plan: Plan, is_done: Done) -> Generator[pa.Table, None, None]:
    rows = plan.work.source.read(is_done).map_batches(
        convert_rows,
        fn_kwargs={
            "family": plan.family,
            "folder": plan.images,
            "is_elsewhere": plan.job.images is not None,
            "image_limits": plan.job.image_limits,
            "media_hosts": plan.job.media_hosts,
        },
        batch_size=None,
        batch_format="pyarrow",
    )
    yield from stream_tables(rows)


class Meter:
    """Measures rates of converted rows."""

    def __init__(self) -> None:
        self._window = RateWindow()

    def add(self, rows: pa.Table) -> None:
        """Count converted rows."""
        self._window.add(rows.num_rows, rows.nbytes)

    def read(self, *, num_dead: int) -> str:
        """The rates at the moment, as text."""
        rows_per_s, bytes_per_s = self._window.read()
        if math.isnan(rows_per_s):
            return f"{num_dead} dead"
        megabytes_per_s = bytes_per_s / MEGABYTE
        return f"{rows_per_s:.0f} rows/s, {num_dead} dead, {megabytes_per_s:.1f} MB/s"
