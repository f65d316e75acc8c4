"""Tiles -> captions, by an engine that an actor holds.

Several calls run in an actor at once, and their rows share the engine's batch, which so stays full
from one of Ray Data's blocks to the next.
"""

import asyncio
from typing import Any

import pyarrow as pa
from ray.actor import ActorHandle

from flashvl.batch.config import CaptionJob
from flashvl.batch.cores import share_cores
from flashvl.batch.gate import enter
from flashvl.batch.metrics import EngineMetrics
from flashvl.batch.service import ServedEngine
from flashvl.data.features import Tiles, ask_about_image, tiles_from_bytes
from flashvl.data.inputs.image_reader import append_columns, failure, without_kept
from flashvl.data.inputs.source import FAILURE, KEYS
from flashvl.data.schema import CAPTIONS
from flashvl.engine import AsyncEngine, Completion, Engine, Request, StructuredOutputs
from flashvl.errors import CheckpointError, DataError
from flashvl.model.loading import load_processor

OCCUPANCY = pa.field("occupancy", pa.float32())
"""Share of the engine's slots that was in use since its previous answer; null if unknown."""
ANSWERED = pa.schema([*(field for field in CAPTIONS if field not in KEYS), *FAILURE, OCCUPANCY])
CAPTIONED = pa.schema([*KEYS, *ANSWERED])
"""Columns of a captioned row, followed by `kept` where the input has that column. A row without a
caption and a step was not taken, because the job must stop."""


class OwnEngine:
    """An engine in the actor's own process."""

    def __init__(self, job: CaptionJob):
        """
        Raises:
            CheckpointError: the model cannot be loaded.
        """
        share_cores(job.replicas, job.gpus_per_replica)
        self.max_num_seqs = job.max_num_seqs
        self.engine = Engine.from_pretrained(job.model, job.dtype, max_num_seqs=job.max_num_seqs)
        self.processor = self.engine.processor
        self.async_engine = AsyncEngine(self.engine)
        self._counted = (0, 0)

    async def complete(self, request: Request) -> Completion:
        """Answer a request.

        Raises:
            DataError: the request cannot be answered.
        """
        return await self.async_engine.generate(request)

    def occupancy(self) -> float | None:
        """Mean share of the slots that was in use since the last call; None if unknown."""
        steps, tokens = self.engine.num_decode_steps, self.engine.num_decoded_tokens
        steps_before, tokens_before = self._counted
        self._counted = steps, tokens
        if steps == steps_before:
            return None
        return (tokens - tokens_before) / ((steps - steps_before) * self.max_num_seqs)


class Captioner:
    """Rows of `decoding.TILED` -> rows of `CAPTIONED`, in an actor.

    The actor has an engine of its own, or sends its rows to a running service.
    """

    def __init__(self, *, job: CaptionJob, gate: ActorHandle):
        """
        Args:
            gate: says whether more rows may be taken.
        """
        self.job, self.gate = job, gate
        schema = job.json_schema
        self.form = None if schema is None else StructuredOutputs(json=schema)
        self.engine: OwnEngine | ServedEngine | CheckpointError
        try:
            self.engine = (
                OwnEngine(job)
                if job.via_serve is None
                else ServedEngine(job.via_serve, load_processor(job.model))
            )
        except CheckpointError as error:
            # An error that an actor raises while it starts reaches the driver as text only; raised
            # with the first batch, it keeps its class.
            self.engine = error
        self.metrics = EngineMetrics()
        self._reporting: asyncio.Task[None] | None = None

    async def __call__(self, rows: pa.Table) -> pa.Table:
        if isinstance(self.engine, CheckpointError):
            raise self.engine
        if self._reporting is None:
            self._reporting = asyncio.create_task(self.metrics.keep_reporting())
        self.metrics.begin()
        if await enter(self.gate, rows.num_rows):
            results = await asyncio.gather(
                *(self._answer(self.engine, row) for row in without_kept(rows).to_pylist())
            )
        else:
            results = [{}] * rows.num_rows
        occupancy = self.engine.occupancy()
        self.metrics.end(occupancy)
        found = [each | {"occupancy": occupancy} for each in results]
        answers = pa.Table.from_pylist(found, schema=ANSWERED)
        keys = rows.select([name for name in ("id", "row", "kept") if name in rows.column_names])
        return append_columns(keys, answers)

    async def _answer(
        self, engine: OwnEngine | ServedEngine, row: dict[str, Any]
    ) -> dict[str, Any]:
        if row["step"] is not None:
            return row
        job = self.job
        pixels = tiles_from_bytes(row["tiles"], engine.processor)
        try:
            completion = await engine.complete(
                Request(
                    messages=ask_about_image(row.get("prompt", job.prompt), len(row["counts"])),
                    images=Tiles(pixels, tuple(row["counts"])),
                    max_new_tokens=job.max_new_tokens,
                    temperature=job.temperature,
                    top_p=job.top_p,
                    seed=job.seed + row["row"],
                    structured_outputs=self.form,
                )
            )
        except DataError as error:
            return failure("caption", error)
        return _as_answer(completion)


def _as_answer(completion: Completion) -> dict[str, Any]:
    return {
        "caption": completion.text,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }
