"""Conversations: requests -> the engines' answers in OpenAI's form, whole or as a stream."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi.responses import JSONResponse, Response

from flashvl.engine import Completion, Delta
from flashvl.serve.answers import Served, log_answers
from flashvl.serve.protocol.answers import ChoiceLogprobs, Timings, Usage, new_id, now
from flashvl.serve.protocol.chat import (
    AnswerFunction,
    AnswerMessage,
    AnswerToolCall,
    ChatCompletion,
    ChatCompletionRequest,
    ChatFinishReason,
    Choice,
)
from flashvl.serve.protocol.errors import RequestError
from flashvl.serve.protocol.messages import UserMessage
from flashvl.serve.protocol.service import Captioned
from flashvl.serve.streaming import DONE, Answers, EventStream, answer_whole, event
from flashvl.serve.tools import AnswerReader, Piece, ToolUse


class ChatHandler:
    """Answers `/v1/chat/completions` and `/v1/captions`."""

    def __init__(self, served: Served):
        self.served = served

    async def complete(self, request: ChatCompletionRequest) -> Response:
        """The response to a chat completion request: JSON, or a stream of events.

        Raises:
            RequestError: the request cannot be answered.
        """
        wanted = await self.served.prompts.read_chat(request)
        if request.stream:
            answers = Answers(self.served.engines, [wanted])
            await answers.begin()
            return EventStream(self._events(request, answers), answers)
        completions = await answer_whole(self.served.engines, [wanted])
        uses_tools = ToolUse.of(request) is not None
        answer = ChatCompletion(
            model=self.served.name,
            choices=[
                self._choice(index, completion, uses_tools)
                for index, completion in enumerate(completions)
            ],
            usage=Usage.of(completions),
            timing=Timings.of(completions[0]) if request.include_timing else None,
        )
        log_answers(completions)
        left_out: dict[str, Any] = {} if answer.timing else {"timing": True}
        for choice in answer.choices:
            if choice.message.tool_calls is None:  # OpenAI leaves the field out then
                left_out.setdefault("choices", {})[choice.index] = {"message": {"tool_calls"}}
        return JSONResponse(answer.model_dump(exclude=left_out))

    async def caption(self, image: bytes, prompt: str, max_tokens: int | None) -> Captioned:
        """The caption of one encoded image, asked for by a conversation of one turn.

        Raises:
            RequestError: the request cannot be answered.
        """
        request = ChatCompletionRequest(
            model=self.served.name,
            messages=[UserMessage(role="user", content=prompt)],
            max_tokens=max_tokens,
        )
        wanted = await self.served.prompts.read_chat(request, image)
        (completion,) = await answer_whole(self.served.engines, [wanted])
        log_answers([completion])
        return Captioned(
            caption=completion.text,
            finish_reason=completion.finish_reason,
            usage=Usage.of([completion]),
            timing=Timings.of(completion),
        )

    def _choice(self, index: int, completion: Completion, uses_tools: bool) -> Choice:
        reader = AnswerReader(uses_tools)
        list(reader.read(completion.text, is_last=True))
        calls = [
            AnswerToolCall(
                id=call.id, function=AnswerFunction(name=call.name, arguments=call.arguments)
            )
            for call in reader.calls
        ]
        return Choice(
            index=index,
            message=AnswerMessage(
                content=None if calls and not reader.content else reader.content,
                tool_calls=calls or None,
            ),
            logprobs=None
            if completion.logprobs is None
            else ChoiceLogprobs.of(completion.logprobs, self.served.prompts.tokenizer),
            finish_reason=_finish_reason(completion, reader),
        )

    async def _events(self, request: ChatCompletionRequest, answers: Answers) -> AsyncIterator[str]:
        """OpenAI's `chat.completion.chunk` events, and then the end mark or an error."""
        common = {
            "id": new_id("chatcmpl-"),
            "object": "chat.completion.chunk",
            "created": now(),
            "model": self.served.name,
        }
        uses_tools = ToolUse.of(request) is not None
        readers = [AnswerReader(uses_tools) for _ in range(request.n)]
        completions: list[Completion] = []
        try:
            for index in range(request.n):
                start = {"role": "assistant", "content": ""}
                yield event(common | {"choices": [_chunk(index, start)]})
            async for index, delta in answers:
                for chunk in self._chunks(index, delta, readers[index]):
                    yield event(common | {"choices": [chunk]})
                if delta.completion is not None:
                    completions.append(delta.completion)
        except RequestError as error:
            yield event(error.body)
            return
        log_answers(completions)
        last: dict[str, Any] = {}
        if request.stream_options.include_usage:
            last["usage"] = Usage.of(completions).model_dump()
        if request.include_timing:
            last["timing"] = Timings.of(completions[0]).model_dump()
        if last:
            yield event(common | {"choices": []} | last)
        yield DONE

    def _chunks(self, index: int, delta: Delta, reader: AnswerReader) -> Iterator[dict[str, Any]]:
        is_last = delta.completion is not None
        chunks = [
            _chunk(index, _as_delta(piece, reader)) for piece in reader.read(delta.text, is_last)
        ]
        if delta.logprobs is not None:
            chunks = chunks or [_chunk(index, {"content": ""})]
            logprobs = ChoiceLogprobs.of([delta.logprobs], self.served.prompts.tokenizer)
            chunks[0]["logprobs"] = logprobs.model_dump()
        yield from chunks
        if delta.completion is not None:
            yield _chunk(index, {}, _finish_reason(delta.completion, reader))


def _finish_reason(completion: Completion, reader: AnswerReader) -> ChatFinishReason:
    is_called = reader.calls and completion.finish_reason == "stop"
    return "tool_calls" if is_called else completion.finish_reason


def _as_delta(piece: Piece, reader: AnswerReader) -> dict[str, Any]:
    """OpenAI's delta: the first one of a tool call has its name, the next ones its arguments."""
    if piece.call is None:
        return {"content": piece.text}
    call = reader.calls[piece.call]
    told: dict[str, Any] = {"index": piece.call, "function": {"arguments": piece.text}}
    if not piece.text:
        told |= {"id": call.id, "type": "function"}
        told["function"] = {"name": call.name, "arguments": ""}
    return {"tool_calls": [told]}


def _chunk(index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
