"""The requests under way in one ingress, and their end when the service ends."""

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager

from flashvl.serve.protocol import RequestError

POLL_S = 0.05
"""Seconds between two looks at whether all requests have ended."""
ERRORS_S = 1.0
"""Seconds for requests whose time is over to tell their clients so."""
RETRY_AFTER_S = 5
"""Seconds after which a client is told to try again."""
STOPPING = "service_stopping"
"""Code of the error that clients get while the service stops."""


class Traffic:
    """Counts the requests under way; when the service is to end, it refuses new ones."""

    def __init__(self) -> None:
        self._num_under_way = 0
        self._deadline_s = math.inf
        self._waits: set[asyncio.Timeout] = set()

    @property
    def is_draining(self) -> bool:
        """Whether the service is to end."""
        return self._deadline_s < math.inf

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request as under way for the length of a `with` block.

        Raises:
            RequestError: the service is to end, and takes no more requests.
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
        """A time limit for one wait, to be used in `async with`.

        It raises TimeoutError there at `deadline_s` by the event loop's clock, or at the end of the
        time that `drain` gives.
        """
        limit = asyncio.timeout_at(min(deadline_s, self._deadline_s))
        self._waits.add(limit)
        try:
            yield limit
        finally:
            self._waits.discard(limit)

    async def drain(self, grace_s: float) -> None:
        """Take no more requests, and wait until those under way have ended.

        Those that have not ended after `grace_s` end with an error. Another call may shorten that
        time.
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
    """The error for requests that the service cannot answer because it stops."""
    return RequestError(
        503,
        "the service is stopping; send the request again, to another or when it is back",
        code=STOPPING,
        retry_after_s=RETRY_AFTER_S,
    )
