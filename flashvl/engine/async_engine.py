"""The engine for asyncio: a thread of its own steps it, and any number of coroutines ask it."""

import asyncio
import contextlib
import dataclasses
import functools
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from flashvl.data.features import Tiles, make_tiles
from flashvl.engine.engine import Engine
from flashvl.engine.grammars import Grammar
from flashvl.engine.request import Completion, Delta, Request
from flashvl.errors import DataError
from flashvl.model import FlashVLProcessor

Deliver = Callable[[Delta | BaseException], None]
"""Hands a delta, or the error that ends an answer, to the coroutine that waits for it."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """What an engine does at the moment, and what it has done since it was made."""

    num_running: int
    """Requests that hold a slot."""
    num_waiting: int
    """Requests that wait for a slot."""
    num_steps: int
    """Steps so far; the engine hangs if they stay the same while requests wait."""
    num_decode_steps: int
    """Steps so far that gave a token to each decoding request."""
    num_decoded_tokens: int
    """Tokens that these steps gave."""
    num_prefilled_tokens: int
    """Prompt tokens so far that the model has read; prompts that requests share count once."""
    num_image_hits: int
    """Images so far whose features were kept from an earlier request."""
    num_image_misses: int
    """Images so far that had to be encoded."""

    @property
    def is_idle(self) -> bool:
        """Whether no request is running or waiting."""
        return not (self.num_running or self.num_waiting)


class AsyncEngine:
    """An `Engine` for many callers at once; call `close` at the end, or use it in a `with`.

    Cancelling a coroutine, or closing an iterator, cancels its request.
    """

    def __init__(self, engine: Engine):
        """Take `engine` over: nobody else may step it or give it requests from now on."""
        self._engine = engine
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: dict[int, Deliver] = {}
        self._failure: BaseException | None = None
        """The reason why the thread has ended, if it has."""
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="flashvl-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> "AsyncEngine":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @property
    def processor(self) -> FlashVLProcessor:
        """The model's tokenizer and image processor."""
        return self._engine.processor

    def stats(self) -> EngineStats:
        """The engine's counts now, each read on its own, between two steps or within one."""
        engine, features = self._engine, self._engine.image_features
        return EngineStats(
            num_running=engine.num_running,
            num_waiting=engine.num_waiting,
            num_steps=engine.num_steps,
            num_decode_steps=engine.num_decode_steps,
            num_decoded_tokens=engine.num_decoded_tokens,
            num_prefilled_tokens=engine.num_prefilled_tokens,
            num_image_hits=features.num_hits,
            num_image_misses=features.num_misses,
        )

    def close(self) -> None:
        """Stop the thread; requests that are not answered yet raise RuntimeError."""
        self._calls.put(None)
        self._thread.join()

    async def generate(self, request: Request) -> Completion:
        """The whole answer to `request`.

        Raises:
            DataError: the request cannot be answered.
        """
        async with contextlib.aclosing(self.answer([request], is_streamed=False)) as deltas:
            async for _, delta in deltas:
                if delta.completion is not None:
                    return delta.completion
        raise AssertionError("an answer ends with its completion")

    async def stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        """The answer as it comes; the last delta holds the completion.

        Raises:
            DataError: the request cannot be answered.
        """
        async with contextlib.aclosing(self.answer([request], is_streamed=True)) as deltas:
            async for _, delta in deltas:
                yield delta

    async def answer(
        self, requests: Sequence[Request], is_streamed: bool
    ) -> AsyncGenerator[tuple[int, Delta], None]:
        """The deltas of several answers as they come, each with its request's place.

        The engine is given all requests at once, so that those with the same prompt share it.

        Args:
            is_streamed: whether the text comes as it grows, not only with the completion.

        Raises:
            DataError: one of the requests cannot be answered; all are cancelled.
        """
        loop = asyncio.get_running_loop()
        deltas: asyncio.Queue[tuple[int, Delta | BaseException]] = asyncio.Queue()

        def deliver(number: int, item: Delta | BaseException) -> None:
            # Nobody waits in a loop that is closed; the request's cancellation is on its way.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(deltas.put_nowait, (number, item))

        calls = [
            await self._prepare(request, is_streamed, functools.partial(deliver, number))
            for number, request in enumerate(requests)
        ]
        self._call(lambda: self._add(calls))
        try:
            num_open = len(calls)
            while num_open:
                number, item = await deltas.get()
                if isinstance(item, BaseException):
                    raise item
                yield number, item
                num_open -= item.completion is not None
        finally:
            self._call(lambda: self._cancel(calls))

    async def _prepare(self, request: Request, is_streamed: bool, deliver: Deliver) -> "_Call":
        """Do outside the engine's thread what would keep other requests waiting there."""
        if not isinstance(request.images, Tiles):
            tiles = await asyncio.to_thread(make_tiles, request.images, self._engine.processor)
            request = dataclasses.replace(request, images=tiles)
        grammar = None
        if (outputs := request.structured_outputs) is not None:
            grammar = await asyncio.to_thread(self._engine.grammars.compile, outputs)
        return _Call(request, grammar, is_streamed, deliver)

    def _call(self, call: Callable[[], None]) -> None:
        """Run `call` in the engine's thread, or here and now if that thread has ended."""
        with self._lock:
            if self._failure is None:
                self._calls.put(call)
                return
        call()

    # The methods below run in the engine's thread.

    def _run(self) -> None:
        failure: BaseException = RuntimeError("the engine was closed")
        try:
            while self._take_calls():
                self._engine.step()
                self._hand_out()
        except BaseException as error:  # a broken machine: all who wait must hear of it
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
        """Run the calls that have come, and wait for calls while there is nothing to answer.

        Returns False once the engine is closed.
        """
        while self._engine.is_idle or not self._calls.empty():
            call = self._calls.get()
            if call is None:
                return False
            call()
        return True

    def _hand_out(self) -> None:
        for number in list(self._waiting):
            try:
                deltas = self._engine.take(number)
            except DataError as error:
                self._waiting.pop(number)(error)
                continue
            for delta in deltas:
                self._waiting[number](delta)
                if delta.completion is not None:
                    del self._waiting[number]

    def _add(self, calls: "Sequence[_Call]") -> None:
        for call in calls:
            if self._failure is not None:
                call.deliver(self._failure)
                continue
            try:
                call.number = self._engine.add(call.request, call.is_streamed, call.grammar)
            except Exception as error:  # whatever it is, it is the caller's
                call.deliver(error)
            else:
                self._waiting[call.number] = call.deliver

    def _cancel(self, calls: "Sequence[_Call]") -> None:
        for call in calls:
            if call.number is not None and self._failure is None:
                self._waiting.pop(call.number, None)
                self._engine.cancel(call.number)


@dataclasses.dataclass(slots=True)
class _Call:
    request: Request
    grammar: Grammar | None
    is_streamed: bool
    deliver: Deliver
    number: int | None = None
