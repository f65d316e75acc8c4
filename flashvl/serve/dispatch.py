"""From the ingress to the engines: an answer from whichever replica has room and lives."""

import asyncio
import time
from collections.abc import AsyncGenerator

from grpc.aio import AioRpcError
from ray.exceptions import RayActorError, TaskCancelledError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle

from flashvl.engine import Delta
from flashvl.serve.protocol import RequestError
from flashvl.serve.replica import Refusal, ReplicaRequest
from flashvl.serve.traffic import Traffic, stopping

ATTEMPTS = 5
"""Replicas that a request is sent to, each having died before it said anything."""
PAUSE_S = 0.5
"""Before the next: Serve has to learn of the death."""
LOST = (RayActorError, ReplicaUnavailableError, AioRpcError)


def lost() -> RequestError:
    """What a client hears whose engine died."""
    return RequestError(503, "the engine was lost; send the request again", retry_after_s=1)


class Engines:
    """The engine replicas, by Serve's handle."""

    def __init__(self, handle: DeploymentHandle, timeout_s: float, traffic: Traffic):
        """
        Args:
            timeout_s: for a whole answer.
        """
        # By Serve's gRPC, straight to the replica: a token as an object of Ray's costs more than to
        # make it.
        self.streams = handle.options(stream=True, _by_reference=False)
        self.handle, self.timeout_s, self.traffic = handle, timeout_s, traffic
        self._refusal: RequestError | None = None
        self._full_until_s = 0.0

    def check_room(self) -> None:
        """Refuse unread what an engine would refuse: to read it would slow down what is answered.

        Raises:
            RequestError: an engine has just refused a request, and has no room yet.
        """
        if self._refusal is not None and time.monotonic() < self._full_until_s:
            raise self._refusal

    async def answer(self, request: ReplicaRequest) -> AsyncGenerator[Delta, None]:
        """The deltas of one answer; one only, the last, where it is not streamed.

        A replica that dies before its first delta is replaced by another: nobody has seen anything
        of the answer yet.

        Raises:
            RequestError: refused, too slow, or its replica died in the middle.
        """
        deadline_s = asyncio.get_running_loop().time() + self.timeout_s
        try:
            for attempt in range(ATTEMPTS):
                has_begun = False
                deltas = self.streams.answer.remote(request)
                try:
                    while True:
                        # Each wait by itself: they are not all of the same task.
                        with self.traffic.waiting(deadline_s) as limit:
                            async with limit:
                                delta = await anext(deltas, None)
                        if delta is None:
                            return
                        has_begun = True
                        if isinstance(delta, Refusal):
                            raise self._as_error(delta)
                        yield delta
                except LOST:
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

    async def load(self, timeout_s: float) -> tuple[int, int]:
        """Requests that an engine runs, and that wait there.

        Raises:
            RequestError: none is there to tell.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self.handle.load.remote()
        except (TimeoutError, RayActorError, ReplicaUnavailableError, DeploymentUnavailableError):
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
