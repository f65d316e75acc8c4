"""The rows of a source, read, cut into tiles and captioned by Ray Data, wherever there is room.

An encoded image is sent from the task that reads it to the task that decodes it, and its tiles, as
uint8, from there to an engine.
"""

import functools
from collections.abc import Generator
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.actor import ActorHandle

from flashvl.batch.captioner import Captioner
from flashvl.batch.config import CaptionJob
from flashvl.batch.decoding import tile_images
from flashvl.batch.gpus import engine_environment, gpus_per_engine, warn_of_missing_gpus
from flashvl.config import pool_of
from flashvl.data.inputs.source import Done, Source
from flashvl.data.ledger.streaming import stream_tables
from flashvl.errors import ConfigError
from flashvl.model.loading import SHIPPED, resolve_checkpoint

ROWS_PER_TASK = 128
"""Rows that one CPU task decodes and tiles, in about a second; a lost worker costs one task."""
BLOCKS_PER_ENGINE = 2
"""Blocks that fill an engine's slots; fewer cost Ray less time, more show progress sooner."""
CALLS_PER_ENGINE = 4
"""Blocks that an engine has at once: those that fill its slots, and some that wait."""
CALLS_AHEAD = 2
"""Blocks that are sent to an engine ahead of its calls."""


def check_pool(job: CaptionJob) -> None:
    """Check that the cluster has room for the job's engines.

    Raises:
        ConfigError: engines on CPUs would leave none to read and decode with.
    """
    num_gpus = gpus_per_engine(job.gpus_per_replica)
    num_cpus = int(ray.cluster_resources().get("CPU", 0))
    least, _ = pool_of(job.replicas)
    if not num_gpus and least >= num_cpus:
        raise ConfigError(
            f"replicas ({least}) must be less than the cluster's CPUs ({num_cpus}), as the engines"
            " have no GPU; lower it"
        )
    warn_of_missing_gpus(num_gpus)


def _engine_options(job: CaptionJob) -> dict[str, Any]:
    """Ray's options of the actors that caption."""
    if job.via_serve is not None:
        return {"num_gpus": 0}
    num_gpus = gpus_per_engine(job.gpus_per_replica)
    environment = engine_environment(num_gpus)
    return {"num_gpus": num_gpus} | (
        {"runtime_env": {"env_vars": environment}} if environment else {}
    )


def captioned(
    job: CaptionJob, source: Source, is_done: Done, gate: ActorHandle
) -> Generator[pa.Table, None, None]:
    """The rows of `source` that are not done, captioned: tables of `captioner.CAPTIONED`.

    Where a machine was lost, a row may come twice or not at all; the caller counts.

    Raises:
        Exception: the error of a step, other than `DataError`, as it was raised there.
    """
    folder = resolve_checkpoint(job.model)
    # A shipped model goes by its name: nodes may have the package in different folders.
    model = folder.name if folder.parent == SHIPPED else str(folder.absolute())
    num_gpus = gpus_per_engine(job.gpus_per_replica)
    job = job.model_copy(update={"model": model, "gpus_per_replica": num_gpus})
    rows_per_block = max(job.max_num_seqs // BLOCKS_PER_ENGINE, 1)
    least, most = pool_of(job.replicas)
    rows = (
        source.read(is_done)
        # Otherwise one task would decode a whole row group, however long.
        .repartition(target_num_rows_per_block=ROWS_PER_TASK)
        .map_batches(
            functools.partial(
                tile_images,
                model=model,
                image_limits=job.image_limits,
                store=source.store,
                media_hosts=job.media_hosts,
            ),
            batch_size=rows_per_block,
            batch_format="pyarrow",
        )
        # Cuts the task's output, so that a block is captioned while the next is decoded, and keeps
        # Ray from running the decoding inside the engine's actor, where neither has a GPU.
        .repartition(target_num_rows_per_block=rows_per_block)
        .map_batches(
            Captioner,
            fn_constructor_kwargs={"job": job, "gate": gate},
            batch_size=rows_per_block,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                min_size=least,
                max_size=most,
                max_concurrent_calls_per_actor=CALLS_PER_ENGINE,
                max_tasks_in_flight_per_actor=CALLS_PER_ENGINE + CALLS_AHEAD,
            ),
            **_engine_options(job),
        )
    )
    # Add an engine when blocks wait for the present ones. Ray's own threshold is higher than an
    # engine's load ever is: the pool would never grow.
    scaling = rows.context.autoscaling_config
    scaling.actor_pool_util_upscaling_threshold = 1 + CALLS_AHEAD / CALLS_PER_ENGINE / 2
    yield from stream_tables(rows)
