"""Benchmarks: questions in, answers, verdicts and scores out, each question answered once.

The questions are answered as a captioning job answers rows: it resumes, and accounts for each row.
The answers are marked at the end, in the driver; a finished evaluation is only marked again, so
that another judge needs no other answers.

answers/part-*.parquet    schema ANSWERS, and the question's benchmark and cells
dead_letters/             questions that could not be asked or answered, which count as wrong
verdicts.parquet          schema VERDICTS: each answer beside its verdict
scores.json               the figures, their intervals, and how answers were marked
report.html               the table of the paper, and wrong answers with their pictures
"""

import asyncio
import functools
import json
import time
from collections.abc import Generator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flashvl import __version__
from flashvl.batch.job import answer_rows
from flashvl.batch.pipeline import check_pool
from flashvl.batch.progress import Meter
from flashvl.batch.service import check_service
from flashvl.data.inputs.source import Done
from flashvl.data.ledger.apart import check_apart
from flashvl.data.ledger.manifest import Fingerprint, hash_listed
from flashvl.data.ledger.outputs import check_output
from flashvl.data.ledger.stopping import Drain
from flashvl.data.ledger.tables import DEAD_LETTERS_TABLE, OutputTable, TableSpec
from flashvl.data.ledger.work import Audit, Work
from flashvl.data.schema import CAPTIONS
from flashvl.data.storage import Location, locate
from flashvl.eval.config import EvaluationJob
from flashvl.eval.questions import Questions, find_questions
from flashvl.eval.report import build_page
from flashvl.eval.tasks.catalogue import (
    GENERAL,
    REASONING,
    TASKS,
    general_average,
    reasoning_average,
)
from flashvl.eval.tasks.judge import Judge, mark_answers
from flashvl.eval.tasks.score import Score, score
from flashvl.eval.tasks.task import Marked
from flashvl.eval.tasks.tsv import Fields
from flashvl.model.loading import hash_folder, resolve_checkpoint
from flashvl.progress import ShowProgress, ignore_progress

ANSWERS = pa.schema(
    [field.with_name("answer") if field.name == "caption" else field for field in CAPTIONS]
)
"""Output of an evaluation: a row for each question that was answered."""
RESULTS = TableSpec(name="answers", schema=ANSWERS)
VERDICTS = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("task", pa.string()),
        ("question", pa.string()),
        ("reference", pa.string()),
        ("answer", pa.string()),
        ("mark", pa.float64()),
        ("extracted", pa.string()),
        ("by", pa.string()),
        ("fields", pa.string()),
    ]
)
"""A row for each question that counts: `answer` is null where the question is a dead letter, `mark`
is 1 for right and 0 for wrong, `extracted` is what the answer was taken to say, and `by` says who
decided (rule, judge, nobody); `fields` are the question's cells as JSON."""


KEYS = ("row", "id", "task", "fields")
"""Columns that answers and dead letters share."""


class Summary(Audit):
    """The closing audit, as written to `_summary.json`: `input == written + dead`."""

    items_per_s: float
    """Questions that the run that finished the job answered each second."""
    model: str
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """An evaluation whose benchmarks, model and output have been checked."""

    job: EvaluationJob
    work: Work
    questions: Questions

    @property
    def output(self) -> Location:
        return self.work.output

    def is_answered(self) -> bool:
        """Whether all questions are answered, so that they are only to be marked."""
        return self.work.read_audit(Summary) is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The outcome of an evaluation."""

    model: str
    scores: dict[str, Score]
    """Scores by benchmark, in the order of the paper's tables."""
    averages: dict[str, float]
    """The paper's averages, `general` and `reasoning`, of which all benchmarks are there."""

    def as_dict(self) -> dict[str, Any]:
        scores = {name: asdict(each) for name, each in self.scores.items()}
        return {"model": self.model, "scores": scores, "averages": self.averages}

    def __str__(self) -> str:
        lines = []
        for name, each in self.scores.items():
            span = f"{each.low:.1f} to {each.high:.1f}"
            lost = f", {each.num_lost} lost" if each.num_lost else ""
            lines.append(
                f"{TASKS[name].title:<16}{each.figure:8.1f}  {span:<18}"
                f"{each.items} items{lost}; {each.rule}"
            )
        lines += [f"{name + ' average':<16}{mean:8.1f}" for name, mean in self.averages.items()]
        return "\n".join(lines)


def check_evaluation(job: EvaluationJob) -> Plan:
    """Check everything that can be checked without Ray, so that a wrong job does not start it.

    Raises:
        ConfigError: a benchmark, the output or an option is wrong; nothing was started or created.
        CheckpointError: the model cannot be loaded.
    """
    check_apart(job.data, job.output, RESULTS.name)
    output = locate(job.output)
    check_output(output)
    questions = find_questions(job.data, job.tasks, job.max_images, job.image_limits)
    fingerprint: Fingerprint = {
        "version": __version__,
        "model": hash_folder(resolve_checkpoint(job.model)),
        "dtype": job.dtype,
        "max_new_tokens": job.max_new_tokens,
        "limits": job.image_limits.model_dump_json(),
        "benchmarks": questions.describe(),
        "num_rows": questions.num_rows,
        "input": hash_listed(questions.files),
    }
    work = Work(
        input=job.data,
        source=questions,
        output=output,
        results=RESULTS,
        kept=questions.kept,
        fingerprint=fingerprint,
        known=questions.files,
        max_rows=None,
        max_error_rate=job.max_error_rate,
        restart=job.restart,
    )
    work.check_resumes(may_grow=False)
    return Plan(job=job, work=work, questions=questions)


def answer_questions(plan: Plan, on_progress: ShowProgress = ignore_progress) -> None:
    """Answer the questions that the output does not hold yet; Ray must be started.

    Raises:
        ConfigError: the output or an option is wrong.
        CheckpointError: the model cannot be loaded.
        FlashVLError: too many questions are dead letters; the disk is full; the audit failed; or
            SIGTERM came.
    """
    started_s = time.monotonic()
    job, work = plan.job, plan.work
    if plan.is_answered():
        return
    if job.via_serve is None:
        check_pool(job.as_caption_job())
    else:
        check_service(job.via_serve, str(work.fingerprint["model"]), job.dtype)
    with work.begun() as output:
        num_found = output.num_done
        meter = Meter(str(work.output), work.num_rows - num_found)
        work.finish_rows(output, functools.partial(_answer, plan), meter, on_progress)
        seconds = time.monotonic() - started_s
        summary = Summary(
            input=work.num_rows,
            written=output.results.num_rows,
            dead=output.dead_letters.num_rows,
            duplicate_ids=output.count_duplicate_ids(),
            seconds=round(seconds, 3),
            items_per_s=round((work.num_rows - num_found) / seconds, 3),
            model=job.model,
            max_new_tokens=job.max_new_tokens,
        )
        output.finish(summary.model_dump_json(indent=2) + "\n")


def _answer(plan: Plan, is_done: Done) -> tuple[Generator[pa.Table, None, None], Drain]:
    tables, drain = answer_rows(plan.job.as_caption_job(), plan.questions, is_done)
    return (_as_answers(tables), drain)


def _as_answers(tables: Generator[pa.Table, None, None]) -> Generator[pa.Table, None, None]:
    try:
        for rows in tables:
            names = ["answer" if name == "caption" else name for name in rows.column_names]
            yield rows.rename_columns(names)
    finally:
        tables.close()


def mark_questions(plan: Plan, on_progress: ShowProgress = ignore_progress) -> Evaluation:
    """Mark the answers, and write the verdicts, the scores and the page.

    Raises:
        FlashVLError: the judge does not reply.
    """
    job, rows = plan.job, _read_rows(plan)
    marked = asyncio.run(_mark(job, rows, on_progress))
    scores = {}
    verdicts: list[dict[str, Any]] = []
    for benchmark in plan.questions.benchmarks:
        if not marked[benchmark.name]:
            continue
        scores[benchmark.name] = score(
            benchmark.task,
            marked[benchmark.name],
            num_lost=len(benchmark.table.asked) - len(marked[benchmark.name]),
            num_left_out=benchmark.table.num_left_out,
            judge=job.judge_model,
        )
        pairs = zip(rows[benchmark.name], marked[benchmark.name], strict=True)
        verdicts += [_as_verdict(row, each) for row, each in pairs]
    figures = {name: each.figure for name, each in scores.items()}
    averages = {
        kind: average(figures)
        for kind, average, tasks in (
            ("general", general_average, GENERAL),
            ("reasoning", reasoning_average, REASONING),
        )
        if all(task.name in figures for task in tasks)
    }
    evaluation = Evaluation(model=job.model, scores=scores, averages=averages)
    file = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(verdicts, schema=VERDICTS), file)
    (plan.output / "verdicts.parquet").write(file.getvalue().to_pybytes())
    text = json.dumps(evaluation.as_dict(), indent=2) + "\n"
    (plan.output / "scores.json").write(text.encode())
    page = build_page(plan.questions, job.model, scores, averages, verdicts)
    (plan.output / "report.html").write(page.encode())
    return evaluation


def _read_rows(plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """Answers, and dead letters whose cells are known, by benchmark, in the questions' order."""
    found: dict[int, dict[str, Any]] = {}
    for name, columns in ((RESULTS.name, (*KEYS, "answer")), (DEAD_LETTERS_TABLE.name, KEYS)):
        for values in OutputTable(plan.output / name).columns(*columns):
            for row in zip(*values, strict=True):
                found[int(row[0])] = {"answer": None} | dict(zip(columns, row, strict=True))
    rows: dict[str, list[dict[str, Any]]] = {each.name: [] for each in plan.questions.benchmarks}
    for number in sorted(found):
        if found[number]["fields"] is not None:
            rows[found[number]["task"]].append(found[number] | {"row": number})
    return rows


async def _mark(
    job: EvaluationJob, rows: dict[str, list[dict[str, Any]]], on_progress: ShowProgress
) -> dict[str, list[Marked]]:
    async with _judge(job) as judge:
        marked = {}
        for name, those in rows.items():
            answers: Sequence[tuple[Fields, str | None]] = [
                (json.loads(row["fields"]), row["answer"]) for row in those
            ]
            marked[name] = await mark_answers(TASKS[name], answers, judge, on_progress)
        return marked


def _judge(job: EvaluationJob) -> Any:
    if job.judge_url is None or job.judge_model is None:
        return nullcontext()
    return Judge(job.judge_url, job.judge_model, job.judge_replies)


def _as_verdict(row: dict[str, Any], marked: Marked) -> dict[str, Any]:
    return row | {
        "question": marked.fields["question"],
        "reference": marked.fields["answer"],
        "mark": float(marked.verdict.mark),
        "extracted": marked.verdict.extracted,
        "by": marked.verdict.by,
    }
