"""OpenAI's newer form of a chat: the conversation comes as items, the answer goes out as events."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi.responses import JSONResponse
from fastapi.responses import Response as HTTPResponse

from flashvl.engine import Completion
from flashvl.serve.answers import Served, log_answers
from flashvl.serve.protocol.answers import ChoiceLogprobs, TokenLogprob, Usage, now
from flashvl.serve.protocol.chat import ChatCompletionRequest
from flashvl.serve.protocol.errors import RequestError
from flashvl.serve.protocol.messages import (
    AssistantMessage,
    ChatMessage,
    FunctionCall,
    SystemMessage,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from flashvl.serve.protocol.responses import (
    AllowedFunctions,
    AssistantItem,
    FunctionCallItem,
    FunctionOutputItem,
    FunctionTool,
    IncompleteDetails,
    InputItem,
    JSONSchemaTextFormat,
    NamedFunction,
    OutputCall,
    OutputMessage,
    OutputText,
    Response,
    ResponseError,
    ResponseRequest,
    ResponseStatus,
    ResponseUsage,
    SystemItem,
    UserItem,
)
from flashvl.serve.protocol.sampling import Sampling
from flashvl.serve.protocol.structured import JSONSchema, JSONSchemaFormat, ResponseFormat
from flashvl.serve.protocol.tools import (
    AllowedToolChoice,
    AllowedTools,
    Function,
    FunctionName,
    NamedTool,
    Tool,
    ToolChoice,
)
from flashvl.serve.streaming import Answers, EventStream, answer_whole, event
from flashvl.serve.tools import AnswerReader, Piece, ToolUse


class ResponseHandler:
    """Answers `/v1/responses`."""

    def __init__(self, served: Served):
        self.served = served

    async def respond(self, request: ResponseRequest) -> HTTPResponse:
        """The response to a request of `/v1/responses`: JSON, or a stream of events.

        Raises:
            RequestError: the request cannot be answered.
        """
        chat, places = as_chat(request)
        try:
            wanted = await self.served.prompts.read_chat(chat)
        except RequestError as error:
            error.param = _as_place(error.param, places)
            raise
        writer = ResponseWriter(request, self.served.name, ToolUse.of(chat) is not None)
        if request.stream:
            answers = Answers(self.served.engines, [wanted])
            await answers.begin()
            return EventStream(self._events(answers, writer), answers)
        (completion,) = await answer_whole(self.served.engines, [wanted])
        log_answers([completion])
        list(writer.write(completion.text, self._logprobs(completion), is_last=True))
        list(writer.end(completion))
        return JSONResponse(writer.response.model_dump())

    def _logprobs(self, completion: Completion) -> list[TokenLogprob]:
        tokenizer = self.served.prompts.tokenizer
        return ChoiceLogprobs.of(completion.logprobs or [], tokenizer).content

    async def _events(self, answers: Answers, writer: "ResponseWriter") -> AsyncIterator[str]:
        tokenizer = self.served.prompts.tokenizer
        try:
            for told in writer.begin():
                yield event(told, told["type"])
            async for _, delta in answers:
                new = [] if delta.logprobs is None else [delta.logprobs]
                logprobs = ChoiceLogprobs.of(new, tokenizer).content
                completion = delta.completion
                for told in writer.write(delta.text, logprobs, is_last=completion is not None):
                    yield event(told, told["type"])
                if completion is not None:
                    log_answers([completion])
                    for told in writer.end(completion):
                        yield event(told, told["type"])
        except RequestError as error:
            told = writer.fail(error)
            yield event(told, told["type"])


class ResponseWriter:
    """An answer's text, piece by piece -> the response's items, and the events that report them."""

    def __init__(self, request: ResponseRequest, model: str, uses_tools: bool):
        self.response = Response(
            model=model,
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            metadata=request.metadata or {},
            parallel_tool_calls=request.parallel_tool_calls,
            temperature=request.temperature,
            text=request.text.model_dump(by_alias=True, exclude_none=True),
            tool_choice=request.tool_choice
            if isinstance(request.tool_choice, str)
            else request.tool_choice.model_dump(exclude_none=True),
            tools=[tool.model_dump(exclude_none=True) for tool in request.tools],
            top_logprobs=request.top_logprobs,
            top_p=request.top_p,
            user=request.user,
        )
        self._reader = AnswerReader(uses_tools)
        self._item: OutputMessage | OutputCall | None = None
        """The output item that is being written, the last one."""
        self._call: int | None = None
        """Number of the item's tool call; None: the item is a message."""
        self._logprobs: list[TokenLogprob] = []
        """Log-probabilities of tokens that have added no text yet, being parts of characters."""
        self._sequence_number = -1

    def begin(self) -> Iterator[dict[str, Any]]:
        """The events before the answer's first text."""
        yield self._event("response.created", response=self.response.model_dump())
        yield self._event("response.in_progress", response=self.response.model_dump())

    def write(
        self, text: str, logprobs: list[TokenLogprob], is_last: bool = False
    ) -> Iterator[dict[str, Any]]:
        """The events for a piece of the answer's text.

        Args:
            logprobs: log-probabilities of the tokens that added the text.
        """
        self._logprobs += logprobs
        for piece in self._reader.read(text, is_last):
            yield from self._turn_to(piece)
            yield from self._add(piece)

    def end(self, completion: Completion) -> Iterator[dict[str, Any]]:
        """The events after the last piece of the text."""
        is_whole = completion.finish_reason == "stop"
        status: ResponseStatus = "completed" if is_whole else "incomplete"
        if not self.response.output:
            yield from self._turn_to(Piece())
        yield from self._close(status)
        usage = Usage.of([completion])
        self.response.usage = ResponseUsage(
            input_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
        )
        self.response.status = status
        if is_whole:
            self.response.completed_at = now()
        else:
            self.response.incomplete_details = IncompleteDetails(reason="max_output_tokens")
        yield self._event(f"response.{status}", response=self.response.model_dump())

    def fail(self, error: RequestError) -> dict[str, Any]:
        """The last event of a response that an error ends."""
        self.response.status = "failed"
        self.response.error = ResponseError(
            code=error.code or "server_error", message=error.message
        )
        return self._event("response.failed", response=self.response.model_dump())

    def _turn_to(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """The events between two items, unless the piece belongs to the present one."""
        if self._item is not None and piece.call == self._call:
            return
        yield from self._close("completed")
        self._call = piece.call
        if piece.call is None:
            self._item = OutputMessage()
        else:
            call = self._reader.calls[piece.call]
            self._item = OutputCall(call_id=call.id, name=call.name)
        self.response.output.append(self._item)
        yield self._of_item("response.output_item.added", item=self._item.model_dump())
        if isinstance(self._item, OutputMessage):
            part = OutputText()
            self._item.content.append(part)
            yield self._of_part("response.content_part.added", part=part.model_dump())

    def _add(self, piece: Piece) -> Iterator[dict[str, Any]]:
        logprobs, self._logprobs = self._logprobs, []
        if isinstance(self._item, OutputMessage):
            part = self._item.content[0]
            part.text += piece.text
            part.logprobs += logprobs
            told = [each.model_dump() for each in logprobs]
            yield self._of_part("response.output_text.delta", delta=piece.text, logprobs=told)
        elif self._item is not None and piece.text:
            self._item.arguments += piece.text
            yield self._of_item(
                "response.function_call_arguments.delta", item_id=self._item.id, delta=piece.text
            )

    def _close(self, status: ResponseStatus) -> Iterator[dict[str, Any]]:
        item = self._item
        if item is None:
            return
        if isinstance(item, OutputMessage):
            part = item.content[0]
            part.logprobs += self._logprobs
            told = part.model_dump()
            yield self._of_part(
                "response.output_text.done", text=part.text, logprobs=told["logprobs"]
            )
            yield self._of_part("response.content_part.done", part=told)
        else:
            yield self._of_item(
                "response.function_call_arguments.done",
                item_id=item.id,
                name=item.name,
                arguments=item.arguments,
            )
        item.status = status
        yield self._of_item("response.output_item.done", item=item.model_dump())

    def _of_part(self, kind: str, **told: Any) -> dict[str, Any]:
        assert self._item is not None
        return self._of_item(kind, item_id=self._item.id, content_index=0, **told)

    def _of_item(self, kind: str, **told: Any) -> dict[str, Any]:
        return self._event(kind, output_index=len(self.response.output) - 1, **told)

    def _event(self, kind: str, **told: Any) -> dict[str, Any]:
        self._sequence_number += 1
        return {"type": kind, "sequence_number": self._sequence_number, **told}


def as_chat(request: ResponseRequest) -> tuple[ChatCompletionRequest, list[str]]:
    """The conversation as a chat request, and the place in `request` of each of its messages.

    Raises:
        RequestError: the conversation has no message.
    """
    messages: list[ChatMessage] = []
    places: list[str] = []
    if request.instructions is not None:
        messages.append(SystemMessage(role="system", content=request.instructions))
        places.append("instructions")
    if isinstance(request.input, str):
        messages.append(UserMessage(role="user", content=request.input))
        places.append("input")
    else:
        for number, item in enumerate(request.input):
            _add_item(messages, item)
            places += [f"input.{number}"] * (len(messages) - len(places))
    if not messages:
        raise RequestError(400, "input must hold a message, not only reasoning", param="input")
    chat = ChatCompletionRequest(
        **{name: getattr(request, name) for name in Sampling.model_fields},
        model=request.model,
        messages=messages,
        max_completion_tokens=request.max_output_tokens,
        response_format=_as_format(request),
        tools=[_as_tool(tool) for tool in request.tools],
        tool_choice=_as_choice(request),
        parallel_tool_calls=request.parallel_tool_calls,
        logprobs="message.output_text.logprobs" in request.include,
        top_logprobs=request.top_logprobs,
    )
    return chat, places


def _add_item(messages: list[ChatMessage], item: InputItem) -> None:
    """Add an item to the messages; a call joins the assistant's turn before it, if there is one."""
    if isinstance(item, FunctionCallItem):
        call = FunctionCall(name=item.name, arguments=item.arguments)
        last = messages[-1] if messages else None
        if not isinstance(last, AssistantMessage):
            last = AssistantMessage(role="assistant")
            messages.append(last)
        last.tool_calls = [*last.tool_calls, ToolCall(id=item.call_id, function=call)]
    elif isinstance(item, FunctionOutputItem):
        messages.append(ToolMessage(role="tool", content=item.output, tool_call_id=item.call_id))
    elif isinstance(item, UserItem):
        messages.append(UserMessage(role="user", content=item.content))
    elif isinstance(item, AssistantItem):
        messages.append(AssistantMessage(role="assistant", content=item.content))
    elif isinstance(item, SystemItem):
        messages.append(SystemMessage(role=item.role, content=item.content))


def _as_format(request: ResponseRequest) -> ResponseFormat:
    wanted = request.text.format
    if isinstance(wanted, JSONSchemaTextFormat):
        schema = JSONSchema(name=wanted.name, schema=wanted.schema_)
        return JSONSchemaFormat(type="json_schema", json_schema=schema)
    return wanted


def _as_tool(tool: FunctionTool) -> Tool:
    fields = {name: getattr(tool, name) for name in Function.model_fields}
    return Tool(type="function", function=Function(**fields))


def _as_choice(request: ResponseRequest) -> ToolChoice:
    choice = request.tool_choice
    if isinstance(choice, NamedFunction):
        return _as_named(choice)
    if isinstance(choice, AllowedFunctions):
        tools = [_as_named(tool) for tool in choice.tools]
        return AllowedToolChoice(
            type="allowed_tools", allowed_tools=AllowedTools(mode=choice.mode, tools=tools)
        )
    return choice


def _as_named(choice: NamedFunction) -> NamedTool:
    return NamedTool(type="function", function=FunctionName(name=choice.name))


def _as_place(param: str | None, places: list[str]) -> str | None:
    """The field of the original request that the chat's field `param` was made from."""
    head, _, rest = (param or "").partition(".")
    if head == "messages":
        number, _, rest = rest.partition(".")
        place = places[int(number)] if number else "input"
        return ".".join(filter(None, (place, rest.removesuffix(".url"))))
    renamed = {"max_completion_tokens": "max_output_tokens", "response_format": "text.format"}
    return renamed.get(head, param)
