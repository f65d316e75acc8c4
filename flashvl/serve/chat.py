"""Conversations: requests -> what the engines answer, whole or piece by piece."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi.responses import JSONResponse, Response, StreamingResponse

from flashvl.engine import Completion, Delta
from flashvl.model.loading import model_id
from flashvl.serve.config import ServiceConfig
from flashvl.serve.dispatch import Engines, lost
from flashvl.serve.prompts import Prompts
from flashvl.serve.protocol.chat import (
    AnswerMessage,
    ChatCompletion,
    ChatCompletionRequest,
    Choice,
)
from flashvl.serve.protocol.errors import RequestError
from flashvl.serve.protocol.messages import UserMessage
from flashvl.serve.protocol.parts import ChoiceLogprobs, Timings, Usage, new_id, now
from flashvl.serve.protocol.service import Captioned
from flashvl.serve.replica import Ask
from flashvl.serve.streaming import event, merged

logger = logging.getLogger("ray.serve")


class Chat:
    """Conversations: requests -> what the engines answer, whole or piece by piece."""

    def __init__(self, config: ServiceConfig, engines: Engines):
        self.config, self.engines = config, engines
        self.prompts = Prompts(config)
        self.model = model_id(config.model)

    async def complete(self, request: ChatCompletionRequest) -> Response:
        asks = await self.prompts.asks(request)
        if request.stream:
            return await self._stream(request, asks)
        completions = await asyncio.gather(*(self._whole(ask) for ask in asks))
        answer = ChatCompletion(
            model=self.model,
            choices=[
                Choice(
                    index=index,
                    message=AnswerMessage(content=completion.text),
                    logprobs=self._logprobs(completion),
                    finish_reason=completion.finish_reason,
                )
                for index, completion in enumerate(completions)
            ],
            usage=Usage.of(completions),
            timing=Timings.of(completions[0]) if request.include_timing else None,
        )
        _log(completions)
        return JSONResponse(answer.model_dump(exclude=None if answer.timing else {"timing"}))

    async def caption(self, image: bytes, prompt: str, max_tokens: int | None) -> Captioned:
        """As a conversation of one turn, of an image that needs no label."""
        request = ChatCompletionRequest(
            model=self.model,
            messages=[UserMessage(role="user", content=prompt)],
            max_tokens=max_tokens,
        )
        (ask,) = await self.prompts.asks_about(request, image)
        completion = await self._whole(ask)
        _log([completion])
        return Captioned(
            caption=completion.text,
            finish_reason=completion.finish_reason,
            usage=Usage.of([completion]),
            timing=Timings.of(completion),
        )

    async def _whole(self, ask: Ask) -> Completion:
        async with contextlib.aclosing(self.engines.answer(ask)) as deltas:
            async for delta in deltas:
                if delta.completion is not None:
                    return delta.completion
        raise lost()

    def _logprobs(self, completion: Completion) -> ChoiceLogprobs | None:
        if completion.logprobs is None:
            return None
        return ChoiceLogprobs.of(completion.logprobs, self.prompts.processor.tokenizer)

    async def _stream(self, request: ChatCompletionRequest, asks: list[Ask]) -> Response:
        answers = [self.engines.answer(ask) for ask in asks]
        try:
            # A refusal still has a status of its own; once the first delta is there, it is 200.
            first = await asyncio.gather(*(anext(deltas) for deltas in answers))
        except BaseException:
            for deltas in answers:
                await deltas.aclose()
            raise
        events = self._events(request, list(zip(first, answers, strict=True)))
        return StreamingResponse(
            events,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    async def _events(
        self,
        request: ChatCompletionRequest,
        answers: list[tuple[Delta, AsyncGenerator[Delta, None]]],
    ) -> AsyncIterator[str]:
        """Server-sent events: OpenAI's `chat.completion.chunk`s, and an end or an error."""
        common = {
            "id": new_id(),
            "object": "chat.completion.chunk",
            "created": now(),
            "model": self.model,
        }
        completions: list[Completion] = []
        try:
            for index in range(len(answers)):
                start = {"role": "assistant", "content": ""}
                yield event(common | {"choices": [_chunk(index, start)]})
            async with contextlib.aclosing(merged(answers)) as deltas:
                async for index, delta in deltas:
                    for chunk in self._chunks(index, delta):
                        yield event(common | {"choices": [chunk]})
                    if delta.completion is not None:
                        completions.append(delta.completion)
        except RequestError as error:
            yield event(error.body)
            return
        _log(completions)
        last: dict[str, Any] = {}
        if request.stream_options is not None and request.stream_options.include_usage:
            last["usage"] = Usage.of(completions).model_dump()
        if request.include_timing:
            last["timing"] = Timings.of(completions[0]).model_dump()
        if last:
            yield event(common | {"choices": []} | last)
        yield "data: [DONE]\n\n"

    def _chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        chunks = []
        if delta.text or delta.logprobs is not None:
            chunk = _chunk(index, {"content": delta.text})
            if delta.logprobs is not None:
                tokenizer = self.prompts.processor.tokenizer
                chunk["logprobs"] = ChoiceLogprobs.of([delta.logprobs], tokenizer).model_dump()
            chunks.append(chunk)
        if delta.completion is not None:
            chunks.append(_chunk(index, {}, delta.completion.finish_reason))
        return chunks


def _chunk(index: int, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _log(completions: list[Completion]) -> None:
    """What an answer cost, and nothing of what was said; Serve puts the request's id beside it."""
    first = completions[0]
    logger.info(
        "answered prompt_tokens=%d completion_tokens=%d finish_reasons=%s"
        " queue_ms=%.1f ttft_ms=%.1f",
        first.prompt_tokens,
        sum(len(each.token_ids) for each in completions),
        ",".join(each.finish_reason for each in completions),
        1e3 * first.timing.queue_s,
        1e3 * first.timing.first_token_s,
    )
