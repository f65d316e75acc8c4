"""Questions of benchmarks that are in tables for training, by their pictures or by their texts.

    questions and pictures of the benchmarks -> an index, which every worker gets
    rows of the tables -> decode, look up (CPU tasks) -> Parquet

Each row of a table is answered once, with the questions that it holds: the job resumes, and
accounts for each row.

rows/part-*.parquet       schema FOUND: a row for each of the tables', mostly with no match
dead_letters/             rows that could not be read or decoded, which training leaves out as well
matches.parquet           schema MATCHES: a row for each question that a table's row holds
items.parquet             schema ITEMS: each question of the benchmarks, and whether it was found
contamination.json        the counts of each benchmark
report.html               the counts, and pictures that were found side by side
"""

import functools
import io
import json
import math
import time
from collections import defaultdict
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from flashvl import __version__
from flashvl.data.inputs.image_reader import failure
from flashvl.data.inputs.source import FAILURE, KEYS, Done
from flashvl.data.ledger.apart import check_apart
from flashvl.data.ledger.manifest import Fingerprint, hash_listed
from flashvl.data.ledger.outputs import OutputFolder, check_output
from flashvl.data.ledger.rates import RateWindow
from flashvl.data.ledger.stopping import Drain, begin_nothing
from flashvl.data.ledger.streaming import stream_tables
from flashvl.data.ledger.tables import OutputTable, TableSpec
from flashvl.data.ledger.work import Audit, Work
from flashvl.data.limits import ImageLimits
from flashvl.data.storage import Location, locate
from flashvl.errors import DataError
from flashvl.eval.contamination.benchmarks import MANY_IMAGES, Benchmarks, read_benchmarks
from flashvl.eval.contamination.config import ContaminationJob
from flashvl.eval.contamination.outcome import Contamination, Counts
from flashvl.eval.contamination.pictures import Fingerprints, read_fingerprints
from flashvl.eval.contamination.report import build_page
from flashvl.eval.contamination.tables import TrainingTables, find_tables
from flashvl.eval.questions import Questions, find_questions
from flashvl.progress import ShowProgress, ignore_progress

_MATCH = pa.struct(
    [
        ("item", pa.int32()),
        ("item_image", pa.int32()),
        ("image", pa.int32()),
        ("distance", pa.int32()),
        ("overlap", pa.float32()),
    ]
)
FOUND = pa.schema(
    [*KEYS, ("table_row", pa.int64()), ("matches", pa.list_(_MATCH))],
)
"""What a row of the tables holds; the columns of a match are as in `MATCHES`, where `item` is the
number of a question. The columns of images are null for a question's text, and the other way."""
RESULTS = TableSpec(name="rows", schema=FOUND)
MATCHES = pa.schema(
    [
        ("item", pa.string()),
        ("task", pa.string()),
        ("kind", pa.string()),
        ("table", pa.string()),
        ("table_row", pa.int64()),
        ("id", pa.string()),
        ("item_image", pa.int32()),
        ("image", pa.int32()),
        ("distance", pa.int32()),
        ("overlap", pa.float32()),
        ("row", pa.int64()),
    ]
)
"""A question that a row holds. `kind`: image or text. `table_row` is in the table's column `row`,
and `id` is the row's file, row group and place in it. `item_image` and `image` are the numbers of
the pictures in the question and in the row, and `distance` is the number of bits in which their
hashes differ; `overlap` is the share of the question's n-grams that the row holds. `row` counts
through all tables."""
ITEMS = pa.schema(
    [
        ("item", pa.string()),
        ("task", pa.string()),
        ("is_picture_found", pa.bool_()),
        ("is_question_found", pa.bool_()),
        ("are_found_together", pa.bool_()),
        ("num_pictures_compared", pa.int32()),
        ("is_question_compared", pa.bool_()),
        ("problem", pa.string()),
    ]
)
"""A question of the benchmarks. `are_found_together`: one row holds its picture and its text."""


class Summary(Audit):
    """The closing audit, as written to `_summary.json`: `input == written + dead`."""

    rows_per_s: float
    """Rows that the run that finished the job compared each second."""


class Meter:
    """Measures the rate of compared rows."""

    def __init__(self) -> None:
        self._window = RateWindow()

    def add(self, rows: pa.Table) -> None:
        """Count compared rows."""
        self._window.add(rows.num_rows)

    def read(self, *, num_dead: int) -> str:
        """The rate at the moment, as text."""
        (rows_per_s,) = self._window.read()
        return f"{num_dead} dead" if math.isnan(rows_per_s) else f"{rows_per_s:.0f} rows/s"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A comparison whose tables, benchmarks and output have been checked."""

    job: ContaminationJob
    tables: TrainingTables
    questions: Questions
    work: Work

    @property
    def output(self) -> Location:
        return self.work.output

    def finished(self) -> Contamination | None:
        """The outcome of a finished job; None where rows are left to compare."""
        if self.work.read_audit(Summary) is None:
            return None
        found = json.loads((self.output / "contamination.json").read())
        counts = {name: Counts(**each) for name, each in found["benchmarks"].items()}
        return Contamination(**(found | {"benchmarks": counts}))


def check_contamination(job: ContaminationJob) -> Plan:
    """Check everything that can be checked without Ray, so that a wrong job does not start it.

    Raises:
        ConfigError: a table, a benchmark or the output is wrong; nothing was started or created.
    """
    for name in (*job.tables, job.benchmarks):
        check_apart(name, job.output, RESULTS.name)
    output = locate(job.output)
    check_output(output)
    questions = find_questions(job.benchmarks, job.tasks, MANY_IMAGES, job.image_limits)
    tables = find_tables(job.tables, job.image_limits)
    fingerprint: Fingerprint = {
        "version": __version__,
        "limits": job.image_limits.model_dump_json(),
        "benchmarks": hash_listed(questions.files),
        "tables": tables.describe(),
        "num_rows": tables.num_rows,
        "input": hash_listed(tables.files),
    }
    work = Work(
        input=", ".join(job.tables),
        source=tables,
        output=output,
        results=RESULTS,
        kept=tables.kept,
        fingerprint=fingerprint,
        known=tables.files,
        max_rows=None,
        max_error_rate=job.max_error_rate,
        restart=job.restart,
    )
    work.check_resumes(may_grow=False)
    return Plan(job=job, tables=tables, questions=questions, work=work)


def read_questions(plan: Plan, on_progress: ShowProgress = ignore_progress) -> Benchmarks:
    """Read the benchmarks; Ray must be started."""
    return read_benchmarks(plan.questions, plan.job.image_limits, on_progress)


def compare_tables(
    plan: Plan, benchmarks: Benchmarks, on_progress: ShowProgress = ignore_progress
) -> Contamination:
    """Compare the rows that the output does not hold yet, and write what was found; Ray must be
    started.

    Raises:
        ConfigError: the output is another job's.
        FlashVLError: too many rows are dead letters; the disk is full; the audit failed; or
            SIGTERM came.
    """
    started_s = time.monotonic()
    work = plan.work
    index = ray.put(benchmarks)
    with work.begun() as output:
        num_found = output.num_done
        work.finish_rows(output, functools.partial(_answer, plan, index), Meter(), on_progress)
        contamination = _write(plan, benchmarks, output)
        seconds = time.monotonic() - started_s
        summary = Summary(
            input=work.num_rows,
            written=output.results.num_rows,
            dead=output.dead_letters.num_rows,
            duplicate_ids=output.count_duplicate_ids(),
            seconds=round(seconds, 3),
            rows_per_s=round((work.num_rows - num_found) / seconds, 3),
        )
        output.finish(summary.model_dump_json(indent=2) + "\n")
    return contamination


def _answer(
    plan: Plan, index: ray.ObjectRef, is_done: Done
) -> tuple[Generator[pa.Table, None, None], Drain]:
    """Begin to compare the rows that are not done; see `flashvl.data.ledger.work.Answer`."""
    rows = plan.tables.read(is_done).map_batches(
        _compare,
        fn_kwargs={"index": [index], "image_limits": plan.job.image_limits},
        batch_size=None,
        batch_format="pyarrow",
    )
    return stream_tables(rows), begin_nothing


def _compare(
    rows: pa.Table, *, index: list[ray.ObjectRef], image_limits: ImageLimits
) -> Iterator[pa.Table]:
    """The rows with what they hold; `index` is a list, since Ray would copy what it refers to."""
    yield compare_rows(rows, ray.get(index[0]), image_limits)


def compare_rows(rows: pa.Table, benchmarks: Benchmarks, image_limits: ImageLimits) -> pa.Table:
    """Rows of `tables.ROWS` as rows of `FOUND` with `FAILURE`."""
    found: list[dict[str, Any]] = []
    prints: list[Fingerprints] = []
    origins: list[tuple[int, int]] = []
    texts: list[list[str]] = []
    for place, row in enumerate(rows.to_pylist()):
        values = {name: row[name] for name in ("id", "row", "table_row", "step", "error", "reason")}
        found.append(values | {"matches": []})
        texts.append(row["texts"] or [])
        try:
            mine = [read_fingerprints(image, image_limits) for image in row["images"] or ()]
        except DataError as error:
            found[-1] |= failure("decode", error)
            continue
        prints += mine
        origins += [(place, number) for number in range(len(mine))]
    if prints:
        for n, picture, distance in benchmarks.pictures.search(Fingerprints.join(prints)):
            place, number = origins[n]
            item, item_image = benchmarks.places[picture]
            match = {"item": item, "item_image": item_image, "image": number, "distance": distance}
            found[place]["matches"].append(match)
    for place, item, overlap in benchmarks.questions.search(texts):
        found[place]["matches"].append({"item": item, "overlap": overlap})
    return pa.Table.from_pylist(found, schema=pa.schema([*FOUND, *FAILURE]))


def _write(plan: Plan, benchmarks: Benchmarks, output: OutputFolder) -> Contamination:
    """Write the matches, the questions, the counts and the page."""
    matches = _read_matches(plan, benchmarks)
    rows_of: dict[str, dict[int, set[int]]] = {"image": defaultdict(set), "text": defaultdict(set)}
    for match in matches:
        rows_of[match["kind"]][match["number"]].add(match["row"])
    items = []
    counts = {benchmark.name: Counts() for benchmark in plan.questions.benchmarks}
    for number, item in enumerate(benchmarks.items):
        pictures, texts = (rows_of[kind].get(number, set()) for kind in ("image", "text"))
        is_compared = benchmarks.is_question_compared(number)
        items.append(
            {
                "item": item.id,
                "task": item.task,
                "is_picture_found": bool(pictures),
                "is_question_found": bool(texts),
                "are_found_together": bool(pictures & texts),
                "num_pictures_compared": len(item.compared),
                "is_question_compared": is_compared,
                "problem": item.problem,
            }
        )
        each = counts[item.task]
        each.items += 1
        each.pictures_found += bool(pictures)
        each.questions_found += bool(texts)
        each.found_together += bool(pictures & texts)
        each.pictures_not_compared += not item.compared
        each.questions_not_compared += not is_compared
        each.unreadable += item.problem is not None
    contamination = Contamination(
        rows=output.results.num_rows, dead=output.dead_letters.num_rows, benchmarks=counts
    )
    _write_table(plan.output / "matches.parquet", matches, MATCHES)
    _write_table(plan.output / "items.parquet", items, ITEMS)
    text = json.dumps(contamination.as_dict(), indent=2) + "\n"
    (plan.output / "contamination.json").write(text.encode())
    page = build_page(plan.tables, plan.questions, contamination, matches, plan.job.image_limits)
    (plan.output / "report.html").write(page.encode())
    return contamination


def _read_matches(plan: Plan, benchmarks: Benchmarks) -> list[dict[str, Any]]:
    """Rows of `MATCHES` with the questions' numbers, in the order of the tables' rows."""
    matches = []
    table = OutputTable(plan.output / RESULTS.name)
    for name in table.names():
        with (table.folder / name).open() as file:
            rows = pq.read_table(file)
        for row in rows.filter(pc.greater(pc.list_value_length(rows["matches"]), 0)).to_pylist():
            for match in row["matches"]:
                item = benchmarks.items[match["item"]]
                matches.append(
                    match
                    | {name: row[name] for name in ("id", "row", "table_row")}
                    | {
                        "number": match["item"],
                        "item": item.id,
                        "task": item.task,
                        "kind": "text" if match["distance"] is None else "image",
                        "table": plan.tables.name_of(row["row"]),
                    }
                )
    return sorted(matches, key=lambda match: match["row"])


def _write_table(location: Location, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)
    location.write(file.getvalue())
