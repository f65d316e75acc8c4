"""The requests under way in one ingress, and how they end when the service does."""

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager

from flashvl.serve.protocol import RequestError

POLL_S = 0.05
ERRORS_S = 1.0
"""For what has come to the end of its time to tell its client so."""
RETRY_AFTER_S = 5
STOPPING = "service_stopping"
"""The error's code."""


class Traffic:
    """Lets requests in until the service is to end, and then those out that have begun."""

    def __init__(self) -> None:
        self._num_under_way = 0
        self._deadline_s = math.inf
        self._waits: set[asyncio.Timeout] = set()

    @property
    def is_draining(self) -> bool:
        return self._deadline_s < math.inf

    @contextmanager
    def request(self) -> Iterator[None]:
        """One that is under way as long as this lasts.

        Raises:
            RequestError: no more of them are taken.
        """
        if self.is_draining:
            raise stopping()
        self._num_under_way += 1
        try:
            yield
        finally:
            self._num_under_way -= 1

    @contextmanager
    def waiting(self, deadline_s: float) -> Iterator[asyncio.Timeout]:
        """A time limit for `async with` around one wait, by the event loop's clock.

        Raises TimeoutError there at `deadline_s`, or when the service does not wait any longer.
        """
        limit = asyncio.timeout_at(min(deadline_s, self._deadline_s))
        self._waits.add(limit)
        try:
            yield limit
        finally:
            self._waits.discard(limit)

    async def drain(self, grace_s: float) -> None:
        """Take no more requests, and wait until those under way have ended.

        Called again, it may shorten the time that they have; what has not ended then ends with an
        error.
        """
        now_s = asyncio.get_running_loop().time
        self._deadline_s = min(self._deadline_s, now_s() + grace_s)
        for limit in self._waits:
            when_s = limit.when()
            if when_s is not None and when_s > self._deadline_s:
                limit.reschedule(self._deadline_s)
        while self._num_under_way and now_s() < self._deadline_s + ERRORS_S:
            await asyncio.sleep(POLL_S)


def stopping() -> RequestError:
    """What clients hear from then on."""
    return RequestError(
        503,
        "the service is stopping; send the request again, to another or when it is back",
        code=STOPPING,
        retry_after_s=RETRY_AFTER_S,
    )
