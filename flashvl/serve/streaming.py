"""Several answers to one request, whole or as one stream of server-sent events."""

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from flashvl.engine import Completion, Delta
from flashvl.serve.dispatch import Engines, lost
from flashvl.serve.replica import ReplicaRequest

EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {
            "text/event-stream": {
                # OpenAPI 3.2's keyword: with `schema` alone, readers disagree whether it describes
                # an event or the whole stream.
                "itemSchema": {
                    "type": "object",
                    "properties": {
                        "event": {"type": "string"},
                        "data": {"type": "string", "description": "JSON, or [DONE] at the end."},
                    },
                    "required": ["data"],
                },
                "example": 'data: {"object":"chat.completion.chunk", ...}\n\ndata: [DONE]\n\n',
            }
        },
        "description": "The answer; with `stream`, server-sent events while it is generated.",
    }
}


async def answer_whole(engines: Engines, requests: list[ReplicaRequest]) -> list[Completion]:
    """The completions of all requests; if one fails, the others are cancelled.

    Raises:
        RequestError: one of the requests is refused, takes too long or is lost.
    """
    tasks = [asyncio.create_task(_whole(engines, request)) for request in requests]
    try:
        return list(itertools.chain.from_iterable(await asyncio.gather(*tasks)))
    finally:
        await _end(tasks)


async def _whole(engines: Engines, request: ReplicaRequest) -> list[Completion]:
    completions: dict[int, Completion] = {}
    async with contextlib.aclosing(engines.answer(request)) as deltas:
        async for number, delta in deltas:
            if delta.completion is not None:
                completions[number] = delta.completion
    if len(completions) < len(request.requests):
        raise lost()
    return [completions[number] for number in sorted(completions)]


class Answers:
    """The deltas of several answers as they come, each with its answer's number.

    Each prompt has a task of its own, in which its timeout holds from its beginning to its end.
    """

    def __init__(self, engines: Engines, requests: list[ReplicaRequest]):
        self._arrived: asyncio.Queue[tuple[int, Delta] | Exception] = asyncio.Queue()
        self._early: list[tuple[int, Delta]] = []
        counts = [len(request.requests) for request in requests]
        self._num_answers = sum(counts)
        firsts = itertools.accumulate(counts, initial=0)
        self._tasks = [
            asyncio.create_task(self._pump(engines, first, request))
            for first, request in zip(firsts, requests, strict=False)
        ]

    async def begin(self) -> None:
        """Wait for the first delta of each answer; until then, an error can have its HTTP status.

        Raises:
            RequestError: one of the requests is refused, takes too long or is lost.
        """
        begun: set[int] = set()
        try:
            while len(begun) < self._num_answers:
                number, delta = await self._next()
                self._early.append((number, delta))
                begun.add(number)
        except BaseException:
            await self.close()
            raise

    async def __aiter__(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """
        Raises:
            RequestError: one of the answers takes too long or is lost.
        """
        for item in self._early:
            yield item
        left = self._num_answers - sum(delta.completion is not None for _, delta in self._early)
        while left:
            number, delta = await self._next()
            yield number, delta
            left -= delta.completion is not None

    async def close(self) -> None:
        """Cancel the answers that have not ended, which frees their slots."""
        await _end(self._tasks)

    async def _next(self) -> tuple[int, Delta]:
        item = await self._arrived.get()
        if isinstance(item, Exception):
            raise item
        return item

    async def _pump(self, engines: Engines, first: int, request: ReplicaRequest) -> None:
        """Put the deltas of a prompt's answers into the queue; their numbers begin at `first`."""
        num_open = len(request.requests)
        try:
            async with contextlib.aclosing(engines.answer(request)) as deltas:
                async for number, delta in deltas:
                    num_open -= delta.completion is not None
                    self._arrived.put_nowait((first + number, delta))
            if num_open:
                raise lost()
        except Exception as error:
            self._arrived.put_nowait(error)


async def _end(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(StreamingResponse):
    """Server-sent events of some answers, which are cancelled when the client is gone."""

    def __init__(self, events: AsyncIterator[str], answers: Answers):
        super().__init__(
            events,
            media_type="text/event-stream",
            # No proxy on the way may hold events back.
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self.answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.answers.close()


def event(content: BaseModel | dict[str, Any], name: str | None = None) -> str:
    """One server-sent event, with or without a name."""
    if isinstance(content, BaseModel):
        content = content.model_dump()
    data = f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
    return data if name is None else f"event: {name}\n{data}"


DONE = "data: [DONE]\n\n"
"""The last event of a stream, except for `/v1/responses`."""
