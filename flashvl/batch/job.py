"""Offline captioning: an image table in, captions and dead letters out, in one pass over the data.

    read -> decode and tile (CPU tasks) -> caption (a pool of engines) -> Parquet

The entry point starts Ray, and the model is a path that every node sees.
"""

import functools
import hashlib
import json
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.actor import ActorHandle

from flashvl import __version__
from flashvl.batch.config import CaptionJob
from flashvl.batch.gate import Gate, close
from flashvl.batch.outputs import RESULTS
from flashvl.batch.pipeline import captioned, check_pool
from flashvl.batch.progress import Meter
from flashvl.batch.report import build_report
from flashvl.batch.service import check_service
from flashvl.data.features import ask_about_image, encode_prompt
from flashvl.data.inputs.find import find_source
from flashvl.data.inputs.listing import ListedFile
from flashvl.data.inputs.source import Done, Source
from flashvl.data.ledger.apart import check_apart
from flashvl.data.ledger.manifest import Fingerprint, has_begun, hash_listed, read_files
from flashvl.data.ledger.outputs import check_output
from flashvl.data.ledger.stopping import Drain
from flashvl.data.ledger.work import Audit, Work
from flashvl.data.storage import Location, locate
from flashvl.engine.engine import longest_conversation
from flashvl.engine.grammar_check import GrammarError, checked
from flashvl.errors import ConfigError
from flashvl.model import FlashVLConfig
from flashvl.model.loading import hash_folder, load_processor, resolve_checkpoint
from flashvl.progress import ShowProgress, ignore_progress


class Summary(Audit):
    """The closing audit, as written to `_summary.json`: `input == written + dead`."""

    images_per_s: float
    """Rows that the run that finished the job answered each second."""
    model: str
    prompt: str
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A captioning job whose input, model and output have been checked."""

    job: CaptionJob
    work: Work

    @property
    def source(self) -> Source:
        return self.work.source

    @property
    def output(self) -> Location:
        return self.work.output

    @property
    def fingerprint(self) -> Fingerprint:
        """Everything that decides the captions."""
        return self.work.fingerprint

    @property
    def known(self) -> list[ListedFile]:
        """The source's first files: those whose rows the output already covers."""
        return self.work.known

    @property
    def num_rows(self) -> int:
        """Number of rows to caption: all rows of the input, or its first `max_rows`."""
        return self.work.num_rows

    def describe(self) -> dict[str, str | int]:
        """The plan for people: what is to be captioned, and how many rows are done."""
        return {
            "input": self.job.input,
            "columns": self.source.describe(),
            "files": len(self.source.files),
            **({"new_files": len(self.source.files) - len(self.known)} if self.known else {}),
            "rows": self.num_rows,
            "done": self.work.count_done(),
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
        return self.work.read_audit(Summary)


def check_caption_job(job: CaptionJob) -> Plan:
    """Check everything that can be checked without Ray, so that a wrong job does not start it.

    Raises:
        ConfigError: the input, the output or an option is wrong; nothing was started or created.
        CheckpointError: the model cannot be loaded.
    """
    check_apart(job.input, job.output, RESULTS.name)
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
    work = Work(
        input=job.input,
        source=source,
        output=output,
        results=RESULTS,
        kept=source.kept,
        fingerprint=fingerprint,
        known=known,
        max_rows=job.max_rows,
        max_error_rate=job.max_error_rate,
        restart=job.restart,
    )
    work.check_resumes(may_grow=job.append)
    return Plan(job=job, work=work)


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
    with plan.work.begun() as output:
        num_found = output.num_done
        plan.work.finish_rows(
            output,
            functools.partial(answer_rows, job, plan.source),
            Meter(str(plan.output), plan.num_rows - num_found),
            on_progress,
        )
        seconds = time.monotonic() - started_s
        summary = Summary(
            input=plan.num_rows,
            written=output.results.num_rows,
            dead=output.dead_letters.num_rows,
            duplicate_ids=output.count_duplicate_ids(),
            seconds=round(seconds, 3),
            images_per_s=round((plan.num_rows - num_found) / seconds, 3),
            model=job.model,
            prompt=job.prompt,
            max_new_tokens=job.max_new_tokens,
        )
        report = build_report(plan.source, job, output, summary.model_dump())
        output.finish(summary.model_dump_json(indent=2) + "\n", report)
    return summary


def answer_rows(
    job: CaptionJob, source: Source, is_done: Done
) -> tuple[Generator[pa.Table, None, None], Drain]:
    """Begin to caption the rows that are not done; see `flashvl.data.ledger.work.Answer`."""
    gate = ray.remote(num_cpus=0)(Gate).remote()
    return _captions(job, source, is_done, gate), functools.partial(close, gate)


def _captions(
    job: CaptionJob, source: Source, is_done: Done, gate: ActorHandle
) -> Generator[pa.Table, None, None]:
    """The answered rows, without those that the engines did not take."""
    with closing(captioned(job, source, is_done, gate)) as tables:
        for rows in tables:
            yield rows.filter(pc.or_(pc.is_valid(rows["caption"]), pc.is_valid(rows["step"])))
    ray.kill(gate)


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
