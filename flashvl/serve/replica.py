"""The engine as a Serve deployment: each replica holds a model, and refuses requests when full.

A replica admits as many requests as its slots and its queue hold, from all callers together;
Serve's own bound would count those of each caller alone.
"""

import asyncio
import contextlib
import gc
import math
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from PIL import Image

from flashvl.batch.cores import share_cores
from flashvl.config import DEFAULT_PROMPT
from flashvl.data.features import Message, decode_tiles
from flashvl.engine import AsyncEngine, Completion, Delta, Engine, Request
from flashvl.engine.heartbeats import Heartbeat, with_heartbeats
from flashvl.engine.remote import RemoteEngine, ServedModel
from flashvl.errors import DataError
from flashvl.model.loading import hash_folder, resolve_checkpoint
from flashvl.serve.config import ServiceConfig
from flashvl.serve.metrics import EngineMetrics, refusals

REPORT_S = 2.0
"""Seconds between two reports of the gauges."""
OFFLINE_SHARE = 0.75
"""Share of the slots that rows of jobs may take, so that an online request finds one free."""
OFFLINE_PRIORITY = 1
"""`priority` of the rows of jobs; that of online requests is 0."""
RETRY_AFTER_S = 1.0
"""Least seconds after which a client is told to try again; more where answers take longer."""
FULL_S = 1.0
"""Most seconds for which further requests are refused unread: clients that leave make room at any
time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaRequest:
    """A request for one answer or several to a prompt, on its way from an ingress to a replica."""

    requests: list[Request]
    """The engine's request for each answer, with a prompt of token ids, but without the images."""
    messages: Sequence[Message] = ()
    """The conversation that the prompt was made of; empty, if it was made of a text."""
    maker_hash: str = ""
    """Hash of the files that the prompt was made by. While a new version of a model is rolled out,
    the replica may have others."""
    images: list[bytes] = field(default_factory=list)
    """Encoded images, in the order of their places in the prompt."""
    is_streamed: bool = False
    """Whether each delta is sent, and not only the last one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """What a replica says in place of an answer."""

    reason: Literal["overloaded", "bad_request", "invalid_image"]
    message: str
    retry_after_s: int | None = None
    full_for_s: float = 0.0
    """Seconds for which other requests may be refused unread: until then, part of the queue gets
    free, but no slot."""


class EngineReplica(RemoteEngine):
    """Answers `ReplicaRequest`s; `app.build_app` makes a deployment of it."""

    def __init__(self, config: ServiceConfig):
        """
        Raises:
            CheckpointError: the model cannot be used.
        """
        share_cores(config.replicas, config.gpus_per_replica)
        self.config = config
        self.maker_hash = hash_folder(resolve_checkpoint(config.model), has_weights=False)
        self.metrics = EngineMetrics()
        engine = Engine.from_pretrained(
            config.model, config.dtype, max_num_seqs=config.max_num_seqs
        )
        engine.generate([_health_request()])  # a replica that cannot answer never gets ready
        # Python's collector would go through half a million imported objects again and again, and
        # stop all answers for a quarter of a second.
        gc.freeze()
        self.engine = AsyncEngine(engine)
        self.num_admitted = self.num_offline = 0
        # Rows wait here: sent again and again, they would take the time of the event loop.
        self._offline_places = asyncio.Semaphore(int(OFFLINE_SHARE * config.max_num_seqs) or 1)
        self._seconds_per_answer = 0.0
        self._steps_when_checked = -1
        self._reporting: asyncio.Task[None] | None = None

    async def answer(
        self, asked: ReplicaRequest
    ) -> AsyncGenerator[tuple[int, Delta] | Refusal | Heartbeat, None]:
        """The deltas of the answers with the answers' numbers; only the last ones if not streamed.

        Closing the iterator, as Serve does when a client is gone, frees the slots at once.
        """
        self._report_from_now_on()
        async with contextlib.aclosing(with_heartbeats(self._answer(asked))) as items:
            async for item in items:
                yield item

    async def _answer(
        self, asked: ReplicaRequest
    ) -> AsyncGenerator[tuple[int, Delta] | Refusal, None]:
        config = self.config
        num_open, num_places = len(asked.requests), config.max_num_seqs + config.max_waiting
        if self.num_admitted + num_open > num_places:
            is_full = self.num_admitted >= num_places
            yield Refusal(
                reason="overloaded",
                message=f"all {config.max_num_seqs} slots and {config.max_waiting} places to wait"
                " are taken; try again later",
                retry_after_s=math.ceil(
                    max(self._until_free(config.max_waiting / 2), RETRY_AFTER_S)
                ),
                full_for_s=min(self._until_free(config.max_waiting / 4), FULL_S) * is_full,
            )
            return
        began_s = time.monotonic()
        self.num_admitted += num_open
        try:
            try:  # outside the event loop, which other requests' tokens pass through
                tiles = await asyncio.to_thread(
                    decode_tiles, asked.images, self.engine.processor, config.image_limits
                )
            except DataError as error:
                yield Refusal(reason="invalid_image", message=str(error))
                return
            requests = [replace(request, images=tiles) for request in asked.requests]
            if asked.messages and asked.maker_hash != self.maker_hash:
                requests = [
                    replace(request, prompt=None, messages=asked.messages) for request in requests
                ]
            answers = self.engine.answer(requests, asked.is_streamed)
            async with contextlib.aclosing(answers) as deltas:
                async for number, delta in deltas:
                    if delta.completion is not None:  # counted before the caller may stop
                        num_open -= 1
                        self.num_admitted -= 1
                        self.metrics.count(delta.completion)
                        self._learn_duration(time.monotonic() - began_s)
                    yield number, delta
        except DataError as error:
            yield Refusal(reason="bad_request", message=str(error))
        except (asyncio.CancelledError, GeneratorExit):
            if num_open:
                refusals().inc(num_open, tags={"reason": "cancelled"})
            raise
        finally:
            self.num_admitted -= num_open

    async def caption(
        self, request: Request
    ) -> AsyncGenerator[Completion | Heartbeat | None, None]:
        """Answer one row of a job; None, at once, where online requests need the room.

        Raises:
            DataError: the request cannot be answered.
        """
        self._report_from_now_on()
        async with contextlib.aclosing(with_heartbeats(self._caption(request))) as items:
            async for item in items:
                yield item

    async def _caption(self, request: Request) -> AsyncGenerator[Completion | None, None]:
        if self.num_admitted + self.num_offline >= self.config.max_num_seqs:
            yield None
            return
        async with self._offline_places:
            self.num_offline += 1
            try:
                completion = await self.engine.generate(replace(request, priority=OFFLINE_PRIORITY))
            finally:
                self.num_offline -= 1
        self.metrics.count(completion)
        yield completion

    async def model(self) -> ServedModel:
        """The model that answers."""
        folder_hash = await asyncio.to_thread(hash_folder, resolve_checkpoint(self.config.model))
        return ServedModel(folder_hash, self.config.dtype)

    async def load(self) -> tuple[int, int]:
        """The numbers of requests that are running and that wait."""
        stats = self.engine.stats()
        return stats.num_running, stats.num_waiting

    async def check_health(self) -> None:
        """Answer with one token about a small picture, unless the engine has worked since then.

        The request goes through the engine's own thread, as all do: a replica whose model hangs is
        not healthy, although its actor answers. While the engine works, the request would wait in
        the queue, and is not needed.
        """
        stats = self.engine.stats()
        if stats.num_steps == self._steps_when_checked or stats.is_idle:
            await self.engine.generate(_health_request())
        self._steps_when_checked = self.engine.stats().num_steps

    def _until_free(self, places: float) -> float:
        """Seconds until `places` more requests fit, by Little's law: requests leave at the rate
        (requests here) / (seconds that each stays)."""
        return places * self._seconds_per_answer / max(self.num_admitted, 1)

    def _learn_duration(self, seconds: float) -> None:
        self._seconds_per_answer += 0.1 * (seconds - self._seconds_per_answer)

    def _report_from_now_on(self) -> None:
        if self._reporting is None:
            self._reporting = asyncio.create_task(self._report())

    async def _report(self) -> None:
        while True:
            self.metrics.report(self.engine.stats(), self.config.max_num_seqs)
            await asyncio.sleep(REPORT_S)


def _health_request() -> Request:
    return Request(
        messages=[{"role": "user", "content": f"<image>\n{DEFAULT_PROMPT}"}],
        images=[Image.new("RGB", (64, 64), "white")],
        max_new_tokens=1,
    )
