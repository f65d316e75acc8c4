"""From the ingress to the engines: an answer from any replica that has room and is alive."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator

from ray.exceptions import TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from flashvl.batch.service import LOST, by_grpc
from flashvl.engine import Delta
from flashvl.engine.heartbeats import SILENCE_S, Heartbeat
from flashvl.serve.protocol import RequestError
from flashvl.serve.replica import Refusal, ReplicaRequest
from flashvl.serve.traffic import Traffic, stopping

Item = tuple[int, Delta] | Refusal | Heartbeat
"""What a replica sends."""
Deltas = AsyncIterator[Item]

ATTEMPTS = 5
"""Replicas that a request is sent to, one after another, if each dies before its first delta."""
PAUSE_S = 0.5
"""Seconds before the second retry, and as many more before each next one: Serve must learn that the
replica has died."""


class SilenceError(Exception):
    """A replica has sent nothing for `SILENCE_S`."""


def lost() -> RequestError:
    """The error for a client whose engine died."""
    return RequestError(503, "the engine was lost; send the request again", retry_after_s=1)


class Engines:
    """The engine replicas, reached through Serve's handle."""

    def __init__(self, handle: DeploymentHandle, timeout_s: float, traffic: Traffic):
        """
        Args:
            timeout_s: seconds within which an answer must be complete.
            traffic: limits each wait while the service drains.
        """
        self.handle = by_grpc(handle)
        self.streams = self.handle.options(stream=True)
        self.timeout_s, self.traffic = timeout_s, traffic
        self._refusal: RequestError | None = None
        self._full_until_s = 0.0

    def check_room(self) -> None:
        """Refuse a request before it is read, as reading it would slow down those being answered.

        Raises:
            RequestError: an engine has just refused another request, and has no room yet.
        """
        if self._refusal is not None and time.monotonic() < self._full_until_s:
            raise self._refusal

    async def answer(self, request: ReplicaRequest) -> AsyncGenerator[tuple[int, Delta], None]:
        """The deltas of the answers to a prompt, with the answers' numbers, all from one replica.

        There are only the last ones, if the request is not streamed. If a replica dies before its
        first delta, another one is asked: the client has not seen any part of the answers.

        Raises:
            RequestError: the request is refused or takes too long, or its replica dies in the
                middle of the answer.
        """
        deadline_s = asyncio.get_running_loop().time() + self.timeout_s
        try:
            for attempt in range(ATTEMPTS):
                has_begun = False
                deltas = self.streams.answer.remote(request)
                try:
                    while (item := await self._next(deltas, deadline_s)) is not None:
                        if isinstance(item, Heartbeat):
                            continue
                        has_begun = True
                        if isinstance(item, Refusal):
                            raise self._as_error(item)
                        yield item
                    return
                except (*LOST, SilenceError):
                    if has_begun or attempt == ATTEMPTS - 1:
                        raise lost() from None
                finally:
                    deltas.cancel()
                await asyncio.sleep(PAUSE_S * attempt)
        except TimeoutError:
            if self.traffic.is_draining:
                raise stopping() from None
            raise RequestError(
                504,
                f"no answer within request_timeout_s={self.timeout_s:g}; ask for fewer tokens",
                code="timeout",
            ) from None
        except (BackPressureError, DeploymentUnavailableError) as error:
            raise RequestError(503, f"no engine is available: {error}", retry_after_s=5) from None
        except TaskCancelledError:
            raise stopping() from None

    async def _next(self, deltas: Deltas, deadline_s: float) -> Item | None:
        """The next item from a replica; None at the end.

        Raises:
            TimeoutError: it is not there at `deadline_s`.
            SilenceError: the replica does not even send heartbeats.
        """
        now_s = asyncio.get_running_loop().time
        try:
            # A limit for each wait: they need not all run in the same task.
            with self.traffic.waiting(min(deadline_s, now_s() + SILENCE_S)) as limit:
                async with limit:
                    return await anext(deltas, None)
        except TimeoutError:
            if self.traffic.is_draining or now_s() >= deadline_s:
                raise
            raise SilenceError from None

    async def load(self, timeout_s: float) -> tuple[int, int]:
        """The numbers of requests that one engine answers now, and that wait for it.

        Raises:
            RequestError: no engine has told within `timeout_s`.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self.handle.load.remote()
        except (TimeoutError, *LOST, DeploymentUnavailableError):
            raise RequestError(503, "no engine is ready", retry_after_s=1) from None

    def _as_error(self, refusal: Refusal) -> RequestError:
        if refusal.reason != "overloaded":
            code = None if refusal.reason == "bad_request" else refusal.reason
            return RequestError(400, refusal.message, param="messages", code=code)
        self._refusal = RequestError(
            429,
            refusal.message,
            code="rate_limit_exceeded",
            retry_after_s=refusal.retry_after_s,
        )
        self._full_until_s = time.monotonic() + refusal.full_for_s
        return self._refusal
