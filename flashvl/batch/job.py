"""Offline captioning: an image table in, captions and dead letters out, in one pass over the data.

    read -> decode and tile (CPU tasks) -> caption (a pool of engines) -> Parquet

The entry point starts Ray, and the model is a path that every node sees.
"""

import hashlib
import json
import logging
import time
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
import ray

from flashvl import __version__
from flashvl.batch.apart import check_apart
from flashvl.batch.config import CaptionJob
from flashvl.batch.gate import Gate
from flashvl.batch.outputs import (
    SUMMARY,
    TABLES,
    OutputFolder,
    OutputTable,
    check_output,
    remove_rows,
)
from flashvl.batch.pipeline import captioned, check_pool
from flashvl.batch.progress import Meter
from flashvl.batch.report import build_report
from flashvl.batch.service import check_service
from flashvl.batch.stopping import stopped_by_sigterm
from flashvl.config import StrictModel
from flashvl.data.features import ask_about_image, encode_prompt
from flashvl.data.inputs.find import find_source
from flashvl.data.inputs.listing import ListedFile
from flashvl.data.inputs.source import Done, Source
from flashvl.data.ledger.lock import held
from flashvl.data.ledger.manifest import (
    GROWING,
    Fingerprint,
    check_files,
    check_same,
    claim,
    has_begun,
    hash_listed,
    read_files,
)
from flashvl.data.storage import Location, locate
from flashvl.engine.engine import longest_conversation
from flashvl.engine.grammar_check import GrammarError, checked
from flashvl.errors import ConfigError, FlashVLError
from flashvl.model import FlashVLConfig
from flashvl.model.loading import hash_folder, load_processor, resolve_checkpoint
from flashvl.progress import ShowProgress, ignore_progress

logger = logging.getLogger(__name__)

MIN_ROWS_OF_RATE = 1000
"""Rows of which the share of dead letters is taken at least, so that ten bad photographs in a small
folder do not stop the job."""


class Summary(StrictModel):
    """The closing audit, as written to `_summary.json`: `input == written + dead`."""

    input: int
    """Rows in the input, as counted before the job started, or `max_rows`."""
    written: int
    """Rows in the files of captions."""
    dead: int
    """Rows in the files of dead letters."""
    duplicate_ids: int
    """Rows with the id of an earlier row, by a hash of 64 bits; `row` tells them apart."""
    seconds: float
    """Seconds that the run that finished the job took until its last row was on disk."""
    images_per_s: float
    """Rows that this last run answered each second."""
    model: str
    prompt: str
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A captioning job whose input, model and output have been checked."""

    job: CaptionJob
    source: Source
    output: Location
    fingerprint: Fingerprint
    """Everything that decides the captions."""
    known: list[ListedFile]
    """The source's first files: those whose rows the output already covers."""

    @property
    def num_rows(self) -> int:
        """Number of rows to caption: all rows of the input, or its first `max_rows`."""
        return min(self.source.num_rows, self.job.max_rows or self.source.num_rows)

    def describe(self) -> dict[str, str | int]:
        """The plan for people: what is to be captioned, and how many rows are done."""
        num_done = 0
        if has_begun(self.output) and not self.job.restart:
            num_done = sum(OutputTable(self.output / name).count_rows() for name in TABLES)
        return {
            "input": self.job.input,
            "columns": self.source.describe(),
            "files": len(self.source.files),
            **({"new_files": len(self.source.files) - len(self.known)} if self.known else {}),
            "rows": self.num_rows,
            "done": num_done,
            "output": str(self.output),
            "kept_columns": ", ".join(self.job.keep) or "none",
            "model": self.job.model,
            "prompt": str(self.fingerprint["prompt"]),
            "max_new_tokens": self.job.max_new_tokens,
            "replicas": self.job.replicas,
        }

    def __str__(self) -> str:
        return "\n".join(f"{name:<16}{value}" for name, value in self.describe().items())

    def finished_summary(self) -> Summary | None:
        """The closing audit of a finished job; None where rows are left to caption."""
        file = self.output / SUMMARY
        if self.job.restart or not file.is_file():
            return None
        summary = Summary.model_validate_json(file.read())
        return summary if summary.input == self.num_rows else None


def check_caption_job(job: CaptionJob) -> Plan:
    """Check everything that can be checked without Ray, so that a wrong job does not start it.

    Raises:
        ConfigError: the input, the output or an option is wrong; nothing was started or created.
        CheckpointError: the model cannot be loaded.
    """
    check_apart(job.input, job.output)
    output = locate(job.output)
    check_output(output)
    goes_on = has_begun(output) and not job.restart
    known = read_files(output) if goes_on else []
    source = find_source(
        job.input,
        image_column=job.image_column,
        id_column=job.id_column,
        prompt_column=job.prompt_column,
        keep=job.keep,
        follow_paths=job.follow_paths,
        image_limits=job.image_limits,
        known=known,
    )
    _check_prompt(job)
    _check_schema(job)
    fingerprint: Fingerprint = {
        "version": __version__,
        "model": hash_folder(resolve_checkpoint(job.model)),
        "dtype": job.dtype,
        "prompt": job.prompt if job.prompt_column is None else f"column {job.prompt_column}",
        "json_schema": _hash_schema(job.json_schema),
        "max_new_tokens": job.max_new_tokens,
        "temperature": job.temperature,
        "top_p": job.top_p,
        "seed": job.seed,
        "limits": job.image_limits.model_dump_json(),
        "columns": source.describe(),
        "num_rows": source.num_rows,
        "input": hash_listed(source.files),
    }
    if goes_on:
        check_same(output, fingerprint, may_differ=GROWING)
        check_files(output, known, source.files, may_grow=job.append)
    return Plan(job=job, source=source, output=output, fingerprint=fingerprint, known=known)


def run_caption_job(job: CaptionJob, on_progress: ShowProgress = ignore_progress) -> Summary:
    """Caption every row of the input; a row that cannot be captioned becomes a dead letter.

    Where the output holds a part of the same job already, only the rest is captioned. After
    SIGTERM the job stops as soon as the rows that the engines have taken are on disk.

    Args:
        on_progress: called on the driver as captions arrive, with `progress.Rates` as its note.

    Raises:
        ConfigError: the input, the output or an option is wrong; nothing was started or created.
        CheckpointError: the model cannot be loaded.
        FlashVLError: too many rows are dead letters; the disk is full; the audit failed, so that
            rows are missing or doubled; or SIGTERM came.
    """
    return run_plan(check_caption_job(job), on_progress)


def run_plan(plan: Plan, on_progress: ShowProgress = ignore_progress) -> Summary:
    """Run a job that was checked; see `run_caption_job`."""
    started_s = time.monotonic()
    job = plan.job
    if (summary := plan.finished_summary()) is not None:
        return summary
    if job.via_serve is None:
        check_pool(job)
    else:
        check_service(job.via_serve, str(plan.fingerprint["model"]), job.dtype)
    with held(plan.output):
        if job.restart:
            remove_rows(plan.output)
        claim(plan.output, plan.fingerprint, plan.source.files, plan.known)
        (plan.output / SUMMARY).remove()  # written by a trial, about the first rows only
        output = OutputFolder(plan.output, plan.source.num_rows, plan.source.kept)
        num_found = output.num_done
        if num_found > plan.num_rows:
            raise ConfigError(
                f"output {plan.output} holds {num_found} rows, more than max_rows"
                f" ({plan.num_rows}); leave out max_rows, or name another output"
            )
        _caption_rest(plan, output, on_progress)
        output.finish_rows()
        if not output.is_done[: plan.num_rows].all() or output.num_done > plan.num_rows:
            raise FlashVLError(
                f"audit failed: input ({plan.num_rows}) must equal written"
                f" ({output.captions.num_rows}) + dead ({output.dead_letters.num_rows});"
                " did another program change the output? Run again with --restart"
            )
        _check_error_rate(plan, output)
        seconds = time.monotonic() - started_s
        summary = Summary(
            input=plan.num_rows,
            written=output.captions.num_rows,
            dead=output.dead_letters.num_rows,
            duplicate_ids=output.count_duplicate_ids(),
            seconds=round(seconds, 3),
            images_per_s=round((plan.num_rows - num_found) / seconds, 3),
            model=job.model,
            prompt=job.prompt,
            max_new_tokens=job.max_new_tokens,
        )
        report = build_report(plan.source, job, output, summary.model_dump())
        output.finish(report, summary.model_dump_json(indent=2) + "\n")
    return summary


def _caption_rest(plan: Plan, output: OutputFolder, on_progress: ShowProgress) -> None:
    """Caption the rows that `output` does not hold.

    Ray repeats what was lost with a machine, but sometimes misses rows; so this counts the rows and
    starts again with those that did not come.
    """
    meter = Meter()
    is_left_out = np.arange(len(output.is_done)) >= plan.num_rows
    while not (is_done := output.is_done | is_left_out).all():
        num_before = output.num_done
        logger.info("%d rows of %s -> %s", (~is_done).sum(), plan.job.input, plan.output)
        _caption_once(plan, output, is_done, meter, on_progress)
        if output.num_done == num_before:
            raise FlashVLError(
                f"audit failed: {(~is_done).sum()} rows of {plan.job.input} were read and did not"
                " come back; did the input change meanwhile? Run again with --restart"
            )


def _caption_once(
    plan: Plan, output: OutputFolder, is_done: Done, meter: Meter, on_progress: ShowProgress
) -> None:
    gate = ray.remote(num_cpus=0)(Gate).remote()
    num_answered = 0
    answers = captioned(plan.job, plan.source, is_done, gate)
    with stopped_by_sigterm(gate) as stop, closing(answers) as tables:
        for rows in tables:
            rows = rows.filter(pc.or_(pc.is_valid(rows["caption"]), pc.is_valid(rows["step"])))
            num_answered += rows.num_rows
            meter.add(output.write(rows))
            _check_error_rate(plan, output)
            rates = meter.read(num_dead=output.num_dead)
            on_progress(output.num_done, plan.num_rows, str(rates))
            if stop.is_asked:
                output.flush()  # the machine may be taken away at any moment
            if stop.is_over(num_answered):
                break
        if stop.is_asked and output.num_done < plan.num_rows:
            output.flush()
            raise FlashVLError(
                f"stopped by SIGTERM with {output.num_done} of {plan.num_rows} rows on disk;"
                " run the same command again for the rest"
            )
    ray.kill(gate)


def _check_error_rate(plan: Plan, output: OutputFolder) -> None:
    """
    Raises:
        FlashVLError: more than `max_error_rate` of the rows so far, or all, are dead letters.
    """
    rate, num_done = plan.job.max_error_rate, output.num_done
    is_all = output.num_dead == plan.num_rows > 0 and rate < 1
    if is_all or output.num_dead > rate * max(num_done, MIN_ROWS_OF_RATE):
        output.flush()
        raise FlashVLError(
            f"{output.num_dead} of {num_done} rows are dead letters, more than max_error_rate"
            f" ({rate:g}) allows: {_example(output)}; correct the input or the options and"
            " give --restart, or resume with a greater --max-error-rate"
        )


def _example(output: OutputFolder) -> str:
    for steps, reasons in output.dead_letters.columns("step", "reason"):
        if len(reasons):
            return f"{steps[-1]}: {reasons[-1]}"
    return "see dead_letters"


def _check_prompt(job: CaptionJob) -> None:
    """Check that a prompt and its caption fit into the model's longest conversation.

    Raises:
        ConfigError: the prompt and `max_new_tokens` are too long together.
        CheckpointError: the model's processor cannot be loaded.
    """
    processor = load_processor(job.model)
    config = FlashVLConfig.from_pretrained(resolve_checkpoint(job.model))
    longest = longest_conversation(config)
    prompt = job.prompt if job.prompt_column is None else ""
    num_tokens = len(encode_prompt(ask_about_image(prompt), [1], processor))
    if num_tokens + job.max_new_tokens > longest:
        raise ConfigError(
            f"prompt of {num_tokens} tokens and max_new_tokens={job.max_new_tokens} exceed"
            f" the model's {longest}; shorten the prompt or lower max_new_tokens"
        )


def _check_schema(job: CaptionJob) -> None:
    """
    Raises:
        ConfigError: no caption can be valid under the schema, or it is too large.
    """
    if job.json_schema is not None:
        try:
            checked("json", job.json_schema)
        except GrammarError as error:
            raise ConfigError(f"json_schema cannot be used: {error}") from None


def _hash_schema(schema: str | None) -> str:
    """A hash of the schema's content, whatever its white space."""
    if schema is None:
        return "none"
    return hashlib.blake2b(json.dumps(json.loads(schema)).encode(), digest_size=16).hexdigest()
