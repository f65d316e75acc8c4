"""Offline captioning: an image table in, captions and dead letters out, in one pass over the data.

    read -> decode and tile (CPU tasks) -> caption (a pool of engines) -> Parquet

It does not start Ray: the entry point does. Model, input and output are paths that every node of
the cluster sees (the output only the driver's).
"""

import functools
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import ray
import ray.data
from pydantic import PositiveInt, field_validator
from ray.exceptions import RayTaskError

from flashvl import __version__
from flashvl.batch.inputs import Done, Source, find_source
from flashvl.batch.manifest import (
    Fingerprint,
    check_same,
    claim,
    has_begun,
    hash_folder,
    hash_stats,
    held,
    unclaim,
)
from flashvl.batch.outputs import SUMMARY, OutputFolder, check_output, remove_rows
from flashvl.batch.stages import Captioner, tile_images
from flashvl.config import StrictModel
from flashvl.data.images import ImageLimits
from flashvl.data.schema import IMAGE_MARKER
from flashvl.errors import ConfigError, FlashVLError
from flashvl.model.loading import SHIPPED, load_processor, resolve_checkpoint

logger = logging.getLogger(__name__)

ROWS_PER_TASK = 256
"""Rows that one CPU task decodes and tiles: seconds of work, and what a lost worker costs."""

Progress = Callable[[int, int], None]
"""Called with the rows done and the rows in all."""


class CaptionJob(StrictModel):
    """What to caption, with what, and where to."""

    input: str
    """Parquet file, folder or glob of Parquet, or a folder of images (id: path in the folder)."""
    output: Path
    """Folder that is new or empty, or holds a part of the same job; see `flashvl.batch.outputs`."""
    model: str = "tiny"
    """Shipped model's name, or a Flash-VL folder."""
    prompt: str = "Describe the image."
    """Asked about every image."""
    max_new_tokens: PositiveInt = 64
    """Longer captions end here, with finish reason `length`."""
    batch_size: PositiveInt = 32
    """Images that an engine captions together."""
    num_engines: PositiveInt = 1
    """Engines in the pool; each takes a GPU where the cluster has any."""
    limits: ImageLimits = ImageLimits()
    """Images outside these become dead letters."""
    restart: bool = False
    """Throw away what the output holds of an earlier job; else that is gone on with."""

    @field_validator("prompt")
    @classmethod
    def _has_no_marker(cls, prompt: str) -> str:
        if IMAGE_MARKER in prompt:
            raise ValueError(f"must not hold {IMAGE_MARKER}, which is put before it; leave it out")
        return prompt


class Summary(StrictModel):
    """The closing audit, as in `_summary.json`: `input == written + dead`."""

    input: int
    """Rows in the input, by its Parquet footers or its list of files."""
    written: int
    """Rows in the files of captions."""
    dead: int
    """Rows in the files of dead letters."""
    seconds: float
    """From the call to the last row on disk; of the run that finished the job."""
    images_per_s: float
    """Rows a second, those left out that an earlier run had done."""
    model: str
    prompt: str
    max_new_tokens: int


def run_caption_job(job: CaptionJob, on_progress: Progress | None = None) -> Summary:
    """Caption every row of the input; a row that cannot be captioned becomes a dead letter.

    Where the output holds a part of the same job already, only the rest is captioned. SIGTERM stops
    the job as soon as the captions that are done are on disk.

    Args:
        on_progress: called on the driver as captions arrive.

    Raises:
        ConfigError: input or output will not do; nothing was started or created.
        CheckpointError: the model will not do.
        FlashVLError: the audit failed, so that rows are missing or doubled; or SIGTERM came.
    """
    started_s = time.monotonic()
    source, fingerprint = check_caption_job(job)
    if (summary := finished_summary(job)) is not None:
        return summary
    num_gpus = _check_cluster(job.num_engines)
    with held(job.output):
        if job.restart:
            remove_rows(job.output)
            unclaim(job.output)
        claim(job.output, fingerprint)
        output = OutputFolder(job.output)
        is_done = output.done(source.num_rows)
        num_found = num_done = int(is_done.sum())
        logger.info("%d rows of %s -> %s", source.num_rows - num_found, job.input, job.output)
        with _stopped_by_sigterm() as stop:
            for rows in _captioned(job, source, is_done, num_gpus):
                output.write(rows)
                num_done += rows.num_rows
                if on_progress is not None:
                    on_progress(num_done, source.num_rows)
                if stop.is_set():
                    break
        written, dead = output.finish_rows()
        if stop.is_set():
            raise FlashVLError(
                f"stopped by SIGTERM with {written + dead} of {source.num_rows} rows on disk;"
                " run the same command again for the rest"
            )
        seconds = time.monotonic() - started_s
        if not output.done(source.num_rows).all():
            raise FlashVLError(
                f"audit failed: input ({source.num_rows}) must equal written ({written}) + dead "
                f"({dead}); did the input change meanwhile? Run again with --restart"
            )
        summary = Summary(
            input=source.num_rows,
            written=written,
            dead=dead,
            seconds=round(seconds, 3),
            images_per_s=round((source.num_rows - num_found) / seconds, 3),
            model=job.model,
            prompt=job.prompt,
            max_new_tokens=job.max_new_tokens,
        )
        output.finish(summary.model_dump_json(indent=2) + "\n")
    return summary


def check_caption_job(job: CaptionJob) -> tuple[Source, Fingerprint]:
    """What can be refused without Ray; an entry point that calls it first starts none in vain.

    Returns:
        The rows to caption, and what decides their captions.

    Raises:
        ConfigError: input or output will not do; nothing was started or created.
        CheckpointError: the model will not do.
    """
    source = find_source(job.input)
    check_output(job.output)
    load_processor(job.model)
    fingerprint: Fingerprint = {
        "version": __version__,
        "model": hash_folder(resolve_checkpoint(job.model)),
        "prompt": job.prompt,
        "max_new_tokens": job.max_new_tokens,
        "limits": job.limits.model_dump_json(),
        "input": hash_stats(source.files),
        "num_rows": source.num_rows,
    }
    if has_begun(job.output) and not job.restart:
        check_same(job.output, fingerprint)
    return source, fingerprint


def finished_summary(job: CaptionJob) -> Summary | None:
    """The closing audit of a job that has been done; None where anything is left to do."""
    path = job.output / SUMMARY
    if job.restart or not path.is_file():
        return None
    return Summary.model_validate_json(path.read_text())


@contextmanager
def _stopped_by_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; a spot machine gets one before it is taken away."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_cluster(num_engines: int) -> int:
    """GPUs an engine takes: one where the cluster has any, else none.

    Raises:
        ConfigError: engines on CPUs would leave none to read and decode with.
    """
    resources = ray.cluster_resources()
    if resources.get("GPU", 0) >= 1:
        return 1
    num_cpus = int(resources.get("CPU", 0))
    if num_engines >= num_cpus:
        raise ConfigError(
            f"num_engines ({num_engines}) must be less than the cluster's CPUs ({num_cpus}), "
            "as it has no GPU; lower num_engines"
        )
    return 0


def _captioned(job: CaptionJob, source: Source, is_done: Done, num_gpus: int) -> Iterator[pa.Table]:
    """Rows of `stages.CAPTIONED` as they are done, each once.

    Raises:
        Exception: what a step raised, as it was raised there, save `DataError`.
    """
    if is_done.all():
        return  # Ray has no columns for a dataset without blocks
    rows = _pipeline(job, source, is_done, num_gpus)
    try:
        yield from rows.iter_batches(batch_size=None, batch_format="pyarrow")
    except RayTaskError as error:
        if isinstance(error.cause, FlashVLError):
            # Ray puts advice of its own below the message.
            raise type(error.cause)(str(error.cause).splitlines()[0]) from None
        raise


def _pipeline(job: CaptionJob, source: Source, is_done: Done, num_gpus: int) -> ray.data.Dataset:
    folder = resolve_checkpoint(job.model)
    # A shipped model is found by its name in whatever folder a node has the package in.
    model = folder.name if folder.parent == SHIPPED else str(folder.absolute())
    rows = (
        source.read(is_done)
        # A table may be one row group of any length, which one task would decode alone.
        .repartition(target_num_rows_per_block=ROWS_PER_TASK)
        .map_batches(
            functools.partial(tile_images, model=model, limits=job.limits),
            batch_size=job.batch_size,
            batch_format="pyarrow",
        )
        # Cuts the task's output, so that a batch is captioned while the next is decoded; and keeps
        # Ray from fusing the decoding into the engine's actor, as it does where neither has a GPU.
        .repartition(target_num_rows_per_block=job.batch_size)
        .map_batches(
            Captioner,
            fn_constructor_kwargs={
                "model": model,
                "prompt": job.prompt,
                "max_new_tokens": job.max_new_tokens,
                "num_engines": job.num_engines,
            },
            batch_size=job.batch_size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=job.num_engines),
            num_gpus=num_gpus,
        )
    )
    rows.context.enable_progress_bars = False
    rows.context.print_on_execution_start = False
    rows.context.raise_original_map_exception = True
    return rows
