"""The HTTP routes, with OpenAI's paths where OpenAI has one."""

import asyncio
from typing import Annotated, Any

from fastapi import FastAPI, Form, Path
from fastapi.middleware.cors import CORSMiddleware

from flashvl import __version__
from flashvl.model.loading import model_id, resolve_checkpoint
from flashvl.model.tiling import describe_tiles
from flashvl.serve.admission import Admission, read_api_keys
from flashvl.serve.answers import Served
from flashvl.serve.batches import Batch, Batches, BatchList, BatchRequest
from flashvl.serve.chat import ChatHandler
from flashvl.serve.completions import TextHandler
from flashvl.serve.config import ServiceConfig
from flashvl.serve.dispatch import Engines
from flashvl.serve.errors import ERRORS, answer_errors_as_openai_does
from flashvl.serve.playground import add_playground
from flashvl.serve.prompts import Prompts
from flashvl.serve.protocol.chat import ChatCompletion, ChatCompletionRequest
from flashvl.serve.protocol.completions import CompletionRequest, TextCompletion
from flashvl.serve.protocol.errors import RequestError
from flashvl.serve.protocol.responses import Response, ResponseRequest
from flashvl.serve.protocol.service import (
    Alive,
    Captioned,
    CaptionRequest,
    Detokenized,
    DetokenizeRequest,
    Model,
    ModelList,
    Ready,
    TilesRequest,
    Tokenized,
    TokenizeRequest,
    Version,
)
from flashvl.serve.responses import ResponseHandler
from flashvl.serve.streaming import EVENTS

READY_TIMEOUT_S = 5.0
"""Seconds within which an engine must tell its load to count as ready."""


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
    served = Served(name=model_id(config.model), prompts=Prompts(config), engines=engines)
    prompts = served.prompts
    chat, texts, responses = ChatHandler(served), TextHandler(served), ResponseHandler(served)

    @api.post("/v1/chat/completions", response_model=ChatCompletion, responses=EVENTS)
    async def create_chat_completion(request: ChatCompletionRequest) -> Any:
        """Answer a conversation about images."""
        check_model(request.model)
        return await chat.complete(request)

    @api.post("/v1/completions", response_model=TextCompletion, responses=EVENTS)
    async def create_completion(request: CompletionRequest) -> Any:
        """Continue a text as it is, without a chat template and without images."""
        check_model(request.model)
        return await texts.complete(request)

    @api.post("/v1/responses", response_model=Response, responses=EVENTS)
    async def create_response(request: ResponseRequest) -> Any:
        """Answer a conversation in OpenAI's newer form. The service keeps nothing of it."""
        check_model(request.model)
        return await responses.respond(request)

    @api.post("/v1/captions")
    async def create_caption(
        request: Annotated[CaptionRequest, Form(media_type="multipart/form-data")],
    ) -> Captioned:
        """Caption a picture: `curl -F image=@photo.jpg http://127.0.0.1:8000/v1/captions`."""
        return await chat.caption(await request.image.read(), request.prompt, request.max_tokens)

    @api.get("/v1/models")
    async def list_models() -> ModelList:
        """List the one model of this service."""
        return ModelList(data=[describe_model()])

    @api.get("/v1/models/{model}")
    async def get_model(model: Annotated[str, Path()]) -> Model:
        """Describe the model of this service."""
        check_model(model)
        return describe_model()

    @api.post("/tokenize")
    async def tokenize(request: TokenizeRequest) -> Tokenized:
        """Count and list the tokens of a conversation, its images included, or of a text."""
        check_model(request.model)
        tokens = await prompts.tokens_of(request)
        names = prompts.tokenizer.convert_ids_to_tokens(tokens)
        return Tokenized(
            count=len(tokens),
            max_model_len=prompts.max_model_len,
            tokens=tokens,
            token_strs=names if request.return_token_strs else None,
        )

    @api.post("/detokenize")
    async def detokenize(request: DetokenizeRequest) -> Detokenized:
        """Turn token ids into their text, control tokens included."""
        check_model(request.model)
        return Detokenized(prompt=await prompts.detokenize(request.tokens))

    @api.post("/v1/tiles")
    async def tiles(request: TilesRequest) -> dict[str, Any]:
        """Tell how an image of this size is cut into tiles, and how many tokens it takes."""
        processor = prompts.processor
        rule = processor.image_processor.tiling_rule
        return describe_tiles((request.width, request.height), rule, processor.image_seq_length)

    if config.batch_roots:
        add_batches(api, Batches(config))

    @api.get("/healthz")
    async def healthz() -> Alive:
        """Tell that the process which takes requests is alive."""
        return Alive()

    @api.get("/readyz")
    async def readyz() -> Ready:
        """Tell whether an engine is ready to answer, and how many requests it has."""
        running, waiting = await engines.load(READY_TIMEOUT_S)
        return Ready(running=running, waiting=waiting)

    @api.get("/health")
    async def health() -> Ready:
        """The same as `/readyz`, at the path that vLLM has for it."""
        return await readyz()

    @api.get("/version")
    async def version() -> Version:
        """Tell the version of flashvl."""
        return Version(version=__version__)

    add_playground(api, served.name, resolve_checkpoint(config.model))

    def check_model(name: str | None) -> None:
        if name not in (None, served.name):
            raise RequestError(
                404,
                f"no model {name!r:.100} here; ask for {served.name!r}",
                param="model",
                code="model_not_found",
            )

    def describe_model() -> Model:
        return Model(id=served.name, max_model_len=prompts.max_model_len)

    answer_errors_as_openai_does(api)
    api.add_middleware(
        Admission,
        api_keys=read_api_keys(config.api_keys_file),
        max_body_bytes=config.max_body_bytes,
        timeout_s=config.body_timeout_s,
        traffic=engines.traffic,
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


def add_batches(api: FastAPI, batches: Batches) -> None:
    """Add the routes of offline captioning jobs on the same cluster."""

    @api.post("/v1/batches")
    async def create_batch(request: BatchRequest) -> Batch:
        """Caption a table or a folder of images, as `flashvl caption` does, on this cluster."""
        return await asyncio.to_thread(batches.create, request)

    @api.get("/v1/batches")
    async def list_batches() -> BatchList:
        """List all batches, the newest first."""
        return await asyncio.to_thread(batches.list)

    @api.get("/v1/batches/{batch_id}")
    async def get_batch(batch_id: str) -> Batch:
        """Tell how far a batch is."""
        return await asyncio.to_thread(batches.get, batch_id)

    @api.post("/v1/batches/{batch_id}/cancel")
    async def cancel_batch(batch_id: str) -> Batch:
        """Stop a batch. What it has written stays, and the same request resumes it."""
        return await asyncio.to_thread(batches.cancel, batch_id)
