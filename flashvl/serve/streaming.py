"""Server-sent events, and several answers at once as one stream."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any

from pydantic import BaseModel

from flashvl.engine import Delta

EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {
            "text/event-stream": {
                "schema": {"type": "string"},
                "example": 'data: {"object":"chat.completion.chunk", ...}\n\ndata: [DONE]\n\n',
            }
        },
        "description": "The answer; with `stream`, as server-sent events while it is made.",
    }
}


async def merged(
    answers: list[tuple[Delta, AsyncGenerator[Delta, None]]],
) -> AsyncGenerator[tuple[int, Delta], None]:
    """The deltas of several answers as they come, with the answer's number."""
    arrived: asyncio.Queue[tuple[int, Delta] | Exception | None] = asyncio.Queue()

    async def pump(index: int, first: Delta, rest: AsyncGenerator[Delta, None]) -> None:
        try:
            arrived.put_nowait((index, first))
            async with contextlib.aclosing(rest):
                async for delta in rest:
                    arrived.put_nowait((index, delta))
            arrived.put_nowait(None)
        except Exception as error:
            arrived.put_nowait(error)

    pumps = [
        asyncio.create_task(pump(index, first, rest)) for index, (first, rest) in enumerate(answers)
    ]
    try:
        left = len(pumps)
        while left:
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


def event(content: BaseModel | dict[str, Any]) -> str:
    if isinstance(content, BaseModel):
        content = content.model_dump()
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
