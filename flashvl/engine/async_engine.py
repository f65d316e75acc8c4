"""The engine for asyncio: one thread of its own steps it, any number of coroutines ask it."""

import asyncio
import contextlib
import dataclasses
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any

from flashvl.data.features import Tiles, make_tiles
from flashvl.engine.engine import Engine
from flashvl.engine.grammars import Grammar
from flashvl.engine.request import Completion, Delta, Request
from flashvl.errors import DataError

Deliver = Callable[[Delta | BaseException], None]
"""Hands a delta, or what went wrong, to the coroutine that waits for it."""


class AsyncEngine:
    """As `Engine`, but for many callers at once; `close` it, or use it in a `with`.

    A coroutine that is cancelled, or an iterator that is closed, cancels its request.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: dict[int, Deliver] = {}
        self._failure: BaseException | None = None
        """Why the thread has ended, if it has."""
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="flashvl-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> "AsyncEngine":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread; requests that are not answered yet raise RuntimeError."""
        self._calls.put(None)
        self._thread.join()

    async def generate(self, request: Request) -> Completion:
        """The whole answer.

        Raises:
            DataError: it cannot be answered.
        """
        async with contextlib.aclosing(self._answer(request, is_streamed=False)) as deltas:
            async for delta in deltas:
                if delta.completion is not None:
                    return delta.completion
        raise AssertionError("an answer ends with its completion")

    async def stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        """The answer as it comes; the last delta holds the completion.

        Raises:
            DataError: it cannot be answered.
        """
        async with contextlib.aclosing(self._answer(request, is_streamed=True)) as deltas:
            async for delta in deltas:
                yield delta

    async def _answer(self, request: Request, is_streamed: bool) -> AsyncGenerator[Delta, None]:
        if not isinstance(request.images, Tiles):  # cut beside the engine's thread, not in it
            tiles = await asyncio.to_thread(make_tiles, request.images, self.engine.processor)
            request = dataclasses.replace(request, images=tiles)
        grammar = None
        if (outputs := request.structured_outputs) is not None:
            grammar = await asyncio.to_thread(self.engine.grammars.compile, outputs)
        loop = asyncio.get_running_loop()
        deltas: asyncio.Queue[Delta | BaseException] = asyncio.Queue()

        def deliver(item: Delta | BaseException) -> None:
            # A loop that is closed has nobody who waits; its cancellation is on the way.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(deltas.put_nowait, item)

        call = _Call(request, grammar, is_streamed, deliver)
        self._call(lambda: self._add(call))
        try:
            while True:
                item = await deltas.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if item.completion is not None:
                    return
        finally:
            self._call(lambda: self._cancel(call))

    def _call(self, call: Callable[[], None]) -> None:
        """Have `call` run in the engine's thread; at once, where that has ended."""
        with self._lock:
            if self._failure is None:
                self._calls.put(call)
                return
        call()

    # All below runs in the engine's thread.

    def _run(self) -> None:
        failure: BaseException = RuntimeError("the engine was closed")
        try:
            while self._take_calls():
                self.engine.step()
                self._hand_out()
        except BaseException as error:  # a broken machine: whoever waits is to know
            failure = error
        with self._lock:
            self._failure = failure
        for deliver in self._waiting.values():
            deliver(failure)
        self._waiting.clear()
        while not self._calls.empty():
            if (call := self._calls.get()) is not None:
                call()

    def _take_calls(self) -> bool:
        """Do what was called for, and wait for calls while there is nothing to answer."""
        while self.engine.is_idle or not self._calls.empty():
            call = self._calls.get()
            if call is None:
                return False
            call()
        return True

    def _hand_out(self) -> None:
        for number in list(self._waiting):
            try:
                deltas = self.engine.take(number)
            except DataError as error:
                self._waiting.pop(number)(error)
                continue
            for delta in deltas:
                self._waiting[number](delta)
                if delta.completion is not None:
                    del self._waiting[number]

    def _add(self, call: "_Call") -> None:
        if self._failure is not None:
            call.deliver(self._failure)
            return
        try:
            call.number = self.engine.add(call.request, call.is_streamed, call.grammar)
        except Exception as error:  # the caller's, whatever it is
            call.deliver(error)
        else:
            self._waiting[call.number] = call.deliver

    def _cancel(self, call: "_Call") -> None:
        if call.number is not None and self._failure is None:
            self._waiting.pop(call.number, None)
            self.engine.cancel(call.number)


@dataclasses.dataclass(slots=True)
class _Call:
    request: Request
    grammar: Grammar | None
    is_streamed: bool
    deliver: Deliver
    number: int | None = None
