"""Tiles -> captions, by an engine that an actor holds.

Several calls are under way in an actor at once, and all their rows share the engine's batch, so
that it stays full from one of Ray Data's blocks to the next.
"""

import asyncio
import os
from typing import Any

import pyarrow as pa
import torch
from ray.actor import ActorHandle

from flashvl.batch.gate import enter
from flashvl.batch.inputs import KEYS
from flashvl.batch.settings import CaptionJob
from flashvl.batch.tiling import FAILURE, append_columns, failure, without_kept
from flashvl.data.features import Tiles, ask_about_image, tiles_from_bytes
from flashvl.data.schema import CAPTIONS
from flashvl.engine import AsyncEngine, Completion, Engine, Request
from flashvl.errors import CheckpointError, DataError

OCCUPANCY = pa.field("occupancy", pa.float32())
"""The part of the engine's slots that was in use since its answer before; null if unknown."""
ANSWERED = pa.schema([*(field for field in CAPTIONS if field not in KEYS), *FAILURE, OCCUPANCY])
CAPTIONED = pa.schema([*KEYS, *ANSWERED])
"""And `kept`, if there is such a column. A row with neither caption nor stage was not taken, as the
job is to stop."""


class Captioner:
    """One engine, held by one actor: rows of `tiling.TILED` -> `CAPTIONED`."""

    def __init__(self, *, job: CaptionJob, engines_per_node: int, gate: ActorHandle):
        """
        Args:
            engines_per_node: that share the node's cores, where there are no GPUs.
        """
        # Ray lets a worker use as many threads as it asked for CPUs, here one.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // engines_per_node))
        self.job = job
        self.gate = gate
        self.engine: AsyncEngine | CheckpointError
        self._counted = (0, 0)
        try:
            engine = Engine.from_pretrained(job.model, job.dtype, max_num_seqs=job.max_num_seqs)
            self.engine = AsyncEngine(engine)
        except CheckpointError as error:
            # What an actor raises while it starts reaches the driver only as text; held back until
            # the first batch, it arrives as what it is.
            self.engine = error

    async def __call__(self, rows: pa.Table) -> pa.Table:
        if isinstance(self.engine, CheckpointError):
            raise self.engine
        if await enter(self.gate, rows.num_rows):
            results = await asyncio.gather(
                *(self._answer(self.engine, row) for row in without_kept(rows).to_pylist())
            )
        else:
            results = [{}] * rows.num_rows
        occupancy = {"occupancy": self._occupancy(self.engine.engine)}
        answers = pa.Table.from_pylist([each | occupancy for each in results], schema=ANSWERED)
        keys = rows.select([name for name in ("id", "row", "kept") if name in rows.column_names])
        return append_columns(keys, answers)

    async def _answer(self, engine: AsyncEngine, row: dict[str, Any]) -> dict[str, Any]:
        if row["stage"] is not None:
            return row
        job = self.job
        try:
            completion = await engine.generate(
                Request(
                    messages=ask_about_image(row.get("prompt", job.prompt)),
                    images=_as_tiles(row["tiles"], engine),
                    max_new_tokens=job.max_new_tokens,
                    temperature=job.temperature,
                    top_p=job.top_p,
                    seed=job.seed + row["row"],
                )
            )
        except DataError as error:
            return failure("caption", error)
        return _as_answer(completion)

    def _occupancy(self, engine: Engine) -> float | None:
        """The mean since the last call."""
        steps, tokens = engine.num_decode_steps, engine.num_decoded_tokens
        steps_before, tokens_before = self._counted
        self._counted = steps, tokens
        if steps == steps_before:
            return None
        return (tokens - tokens_before) / ((steps - steps_before) * self.job.max_num_seqs)


def _as_tiles(data: bytes, engine: AsyncEngine) -> Tiles:
    pixels = tiles_from_bytes(data, engine.engine.processor)
    return Tiles(pixels, (len(pixels),))


def _as_answer(completion: Completion) -> dict[str, Any]:
    return {
        "caption": completion.text,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }
