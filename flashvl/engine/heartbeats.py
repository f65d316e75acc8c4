"""Signs of life in a stream, by which its reader tells a slow sender from one that is gone.

A host that loses its power or its network closes no connection: whoever reads from it would wait
for as long as the request may take.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TypeVar

HEARTBEAT_S = 2.0
"""Seconds without an item after which a sender tells that it is alive."""
SILENCE_S = 20.0
"""Seconds without an item or a heartbeat after which the sender counts as lost."""

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What is sent in place of an item that is not there yet."""


async def with_heartbeats(
    items: AsyncGenerator[Item, None],
) -> AsyncGenerator[Item | Heartbeat, None]:
    """The items, and heartbeats while the next one is not there."""
    coming: asyncio.Future[Item] | None = None
    async with contextlib.aclosing(items):
        try:
            while True:
                coming = asyncio.ensure_future(anext(items))
                while not (await asyncio.wait({coming}, timeout=HEARTBEAT_S))[0]:
                    yield Heartbeat()
                try:
                    item = coming.result()
                except StopAsyncIteration:
                    return
                yield item
        finally:
            if coming is not None and coming.cancel():  # the reader has gone
                await asyncio.wait({coming})
