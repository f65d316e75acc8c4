"""The HTTP routes: OpenAI's where OpenAI has one."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from importlib import resources
from typing import Annotated, Any

from fastapi import FastAPI, File, Form, Path, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from flashvl import __version__
from flashvl.engine import Completion, Delta
from flashvl.model.loading import model_id
from flashvl.model.tiling import describe_tiles
from flashvl.serve.admission import Admission, as_response, read_api_keys
from flashvl.serve.batches import Batch, Batches, BatchList, BatchRequest
from flashvl.serve.config import ServiceConfig
from flashvl.serve.dispatch import Engines, lost
from flashvl.serve.prompts import Prompts
from flashvl.serve.protocol import (
    Alive,
    AnswerMessage,
    Captioned,
    ChatCompletion,
    ChatCompletionRequest,
    Choice,
    ChoiceLogprobs,
    ErrorResponse,
    Model,
    ModelList,
    Ready,
    RequestError,
    TilesRequest,
    Timings,
    Tokenized,
    TokenizeRequest,
    Usage,
    UserMessage,
    new_id,
    now,
)
from flashvl.serve.replica import Ask

logger = logging.getLogger("ray.serve")

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in (
        (400, "Something in the request will not do; `param` names it."),
        (401, "The API key is missing or wrong."),
        (404, "No such model, batch or path."),
        (408, "The body did not arrive in time."),
        (413, "The body is too long."),
        (429, "All places to wait are taken; `Retry-After` tells when to try again."),
        (503, "No engine is there, or the one that was asked was lost."),
        (504, "The answer took too long."),
    )
}
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
READY_TIMEOUT_S = 5.0


def make_api(config: ServiceConfig, engines: Engines) -> FastAPI:
    """The ASGI application of one ingress replica.

    Raises:
        CheckpointError: the model has no usable processor.
        ConfigError: the API keys cannot be read.
    """
    api = FastAPI(
        title="flashvl",
        version=__version__,
        description="An OpenAI-compatible service of a Flash-VL model on Ray Serve.",
        responses=ERRORS,
        redoc_url=None,
    )
    chat = Chat(config, engines)
    served = model_id(config.model)
    page = resources.files("flashvl.serve").joinpath("playground/index.html").read_text()

    @api.post("/v1/chat/completions", response_model=ChatCompletion, responses=EVENTS)
    async def create_chat_completion(request: ChatCompletionRequest) -> Any:
        """Answer a conversation about images."""
        check_model(request.model)
        return await chat.complete(request)

    @api.post("/v1/captions")
    async def create_caption(
        image: Annotated[UploadFile, File(description="JPEG, PNG, WebP and others.")],
        prompt: Annotated[str, Form()] = "Describe the image.",
        max_tokens: Annotated[int | None, Form(ge=1)] = None,
    ) -> Captioned:
        """Caption a picture: `curl -F image=@photo.jpg http://127.0.0.1:8000/v1/captions`."""
        return await chat.caption(await image.read(), prompt, max_tokens)

    @api.get("/v1/models")
    async def list_models() -> ModelList:
        return ModelList(data=[describe_model()])

    @api.get("/v1/models/{model}")
    async def get_model(model: Annotated[str, Path()]) -> Model:
        check_model(model)
        return describe_model()

    @api.post("/tokenize")
    async def tokenize(request: TokenizeRequest) -> Tokenized:
        """The prompt that a conversation makes, images and all."""
        check_model(request.model)
        tokens = await chat.prompts.encode(*await chat.prompts.read(request.messages))
        return Tokenized(count=len(tokens), max_model_len=chat.prompts.max_model_len, tokens=tokens)

    @api.post("/v1/tiles")
    async def tiles(request: TilesRequest) -> dict[str, Any]:
        """How an image of this size is cut, and the tokens that it costs."""
        processor = chat.prompts.processor
        rule = processor.image_processor.tiling_rule
        return describe_tiles((request.width, request.height), rule, processor.image_seq_length)

    if config.batch_roots:
        add_batches(api, Batches(config))

    @api.get("/healthz")
    async def healthz() -> Alive:
        """This ingress lives."""
        return Alive()

    @api.get("/readyz")
    async def readyz() -> Ready:
        """An engine has answered about a picture, and would answer another."""
        running, waiting = await engines.load(READY_TIMEOUT_S)
        return Ready(running=running, waiting=waiting)

    @api.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def playground() -> HTMLResponse:
        return HTMLResponse(page.replace("{{ model }}", served), headers=PAGE_HEADERS)

    def check_model(name: str) -> None:
        if name != served:
            raise RequestError(
                404,
                f"no model {name[:100]!r} here; ask for {served!r}",
                param="model",
                code="model_not_found",
            )

    def describe_model() -> Model:
        return Model(id=served, max_model_len=chat.prompts.max_model_len)

    _answer_errors_as_openai_does(api)
    api.add_middleware(
        Admission,
        api_keys=read_api_keys(config.api_keys_file),
        max_body_bytes=config.max_body_bytes,
        timeout_s=config.body_timeout_s,
        check_room=engines.check_room,
    )
    if config.cors_origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return api


PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'unsafe-inline';"
    " script-src 'unsafe-inline'; img-src 'self' data: blob:; media-src blob:;"
    " frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def add_batches(api: FastAPI, batches: Batches) -> None:
    """Offline jobs on the same cluster."""

    @api.post("/v1/batches")
    async def create_batch(request: BatchRequest) -> Batch:
        """Caption a table: what `flashvl caption` does, as a job on this cluster."""
        return await asyncio.to_thread(batches.create, request)

    @api.get("/v1/batches")
    async def list_batches() -> BatchList:
        return await asyncio.to_thread(batches.list)

    @api.get("/v1/batches/{batch_id}")
    async def get_batch(batch_id: str) -> Batch:
        return await asyncio.to_thread(batches.get, batch_id)

    @api.post("/v1/batches/{batch_id}/cancel")
    async def cancel_batch(batch_id: str) -> Batch:
        """Stop it; what it has written stays, and the same request goes on with it."""
        return await asyncio.to_thread(batches.cancel, batch_id)


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
                yield _event(common | {"choices": [_chunk(index, start)]})
            async with contextlib.aclosing(_merged(answers)) as deltas:
                async for index, delta in deltas:
                    for chunk in self._chunks(index, delta):
                        yield _event(common | {"choices": [chunk]})
                    if delta.completion is not None:
                        completions.append(delta.completion)
        except RequestError as error:
            yield _event(error.body)
            return
        _log(completions)
        last: dict[str, Any] = {}
        if request.stream_options is not None and request.stream_options.include_usage:
            last["usage"] = Usage.of(completions).model_dump()
        if request.include_timing:
            last["timing"] = Timings.of(completions[0]).model_dump()
        if last:
            yield _event(common | {"choices": []} | last)
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


async def _merged(
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


def _event(content: BaseModel | dict[str, Any]) -> str:
    if isinstance(content, BaseModel):
        content = content.model_dump()
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


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


def _answer_errors_as_openai_does(api: FastAPI) -> None:
    @api.exception_handler(RequestError)
    async def refuse(_: Request, error: RequestError) -> Response:
        return as_response(error)

    @api.exception_handler(RequestValidationError)
    async def refuse_fields(_: Request, error: RequestValidationError) -> Response:
        problem = error.errors()[0]
        param = _place(problem, error.body)
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "this service knows no such field; leave it out"
        told = f"{param}: {message}" if param else message
        return as_response(RequestError(400, told, param=param, code=problem["type"]))

    @api.exception_handler(Exception)
    async def admit_fault(_: Request, error: Exception) -> Response:
        # Starlette raises it again behind this, and so it is in the log with its traceback.
        return as_response(RequestError(500, "the service has failed; its log tells why"))

    @api.exception_handler(HTTPException)
    async def refuse_path(_: Request, error: HTTPException) -> Response:
        response = as_response(RequestError(error.status_code, str(error.detail)))
        response.headers.update(error.headers or {})
        return response


def _place(problem: dict[str, Any], body: Any) -> str | None:
    """The field that is wrong, as `messages.0.content`: without the variants that were tried."""
    place, node = [], body
    for number, part in enumerate(problem["loc"][1:], start=2):
        is_last = number == len(problem["loc"])
        is_there = (
            part < len(node)
            if isinstance(node, list) and isinstance(part, int)
            else isinstance(node, dict) and part in node
        )
        if is_there:
            node = node[part]
        if is_there or (is_last and problem["type"] == "missing"):
            place.append(str(part)[:100])
    return ".".join(place) or None
