"""Tiles -> captions, by an engine that an actor holds.

Several calls are under way in an actor at once, and all their rows share the engine's batch, so
that it stays full from one of Ray Data's blocks to the next.
"""

import asyncio
import os
from typing import Any

import pyarrow as pa
import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from ray.actor import ActorHandle

from flashvl.batch.gate import enter
from flashvl.batch.inputs import KEYS
from flashvl.batch.tiling import FAILURE, failure
from flashvl.config import StrictModel
from flashvl.data.features import Tiles, tiles_from_bytes
from flashvl.data.schema import CAPTIONS, IMAGE_MARKER
from flashvl.engine import AsyncEngine, Completion, Engine, Request
from flashvl.errors import CheckpointError, DataError

ANSWER = [field for field in CAPTIONS if field not in KEYS]
OCCUPANCY = pa.field("occupancy", pa.float32())
"""The part of the engine's slots that was in use since its answer before; null if unknown."""
CAPTIONED = pa.schema([*KEYS, *ANSWER, *FAILURE, OCCUPANCY])
"""And `kept`, if there is such a column. A row with neither caption nor stage was not taken, as the
job is to stop."""


class Question(StrictModel):
    """What is asked about each image, and how the answer is chosen."""

    prompt: str
    """For rows without one of their own."""
    max_new_tokens: PositiveInt
    temperature: float = Field(ge=0)
    top_p: float = Field(gt=0, le=1)
    seed: NonNegativeInt


class Captioner:
    """One engine, held by one actor: rows of `tiling.TILED` -> `CAPTIONED`."""

    def __init__(
        self,
        *,
        model: str,
        question: Question,
        max_num_seqs: int,
        engines_per_node: int,
        gate: ActorHandle,
    ):
        """
        Args:
            max_num_seqs: rows that are answered at once.
            engines_per_node: that share the node's cores, where there are no GPUs.
        """
        # Ray lets a worker use as many threads as it asked for CPUs, here one.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // engines_per_node))
        self.question = question
        self.max_num_seqs = max_num_seqs
        self.gate = gate
        self.engine: AsyncEngine | CheckpointError
        self._counted = (0, 0)
        try:
            self.engine = AsyncEngine(Engine.from_pretrained(model, max_num_seqs=max_num_seqs))
        except CheckpointError as error:
            # What an actor raises while it starts reaches the driver only as text; held back until
            # the first batch, it arrives as what it is.
            self.engine = error

    async def __call__(self, rows: pa.Table) -> pa.Table:
        if isinstance(self.engine, CheckpointError):
            raise self.engine
        keys = rows.select([name for name in ("id", "row", "kept") if name in rows.column_names])
        if await enter(self.gate, rows.num_rows):
            results = await asyncio.gather(
                *(self._answer(self.engine, row) for row in _without_kept(rows).to_pylist())
            )
        else:
            results = [{}] * rows.num_rows
        fields = [field for field in CAPTIONED if field.name not in keys.column_names]
        answers = pa.Table.from_pylist(results, schema=pa.schema(fields))
        for field in fields:
            keys = keys.append_column(field, answers[field.name])
        return keys.set_column(
            keys.column_names.index("occupancy"),
            OCCUPANCY,
            pa.array([self._occupancy(self.engine.engine)] * keys.num_rows, OCCUPANCY.type),
        )

    async def _answer(self, engine: AsyncEngine, row: dict[str, Any]) -> dict[str, Any]:
        if row["stage"] is not None:
            return row
        question = self.question
        try:
            completion = await engine.generate(
                Request(
                    messages=[
                        {
                            "role": "user",
                            "content": f"{IMAGE_MARKER}\n{row.get('prompt', question.prompt)}",
                        }
                    ],
                    images=_as_tiles(row["tiles"], engine),
                    max_new_tokens=question.max_new_tokens,
                    temperature=question.temperature,
                    top_p=question.top_p,
                    seed=question.seed + row["row"],
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
        return (tokens - tokens_before) / ((steps - steps_before) * self.max_num_seqs)


def _without_kept(rows: pa.Table) -> pa.Table:
    return rows.drop_columns(["kept"]) if "kept" in rows.column_names else rows


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
