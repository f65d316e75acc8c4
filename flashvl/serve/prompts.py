"""Clients' requests -> requests for the engines, checked as far as possible without decoding."""

import asyncio
import json
import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from flashvl.data.features import Message, encode_prompt
from flashvl.data.fetching import Fetcher, decode_data_url, is_data_url
from flashvl.data.images import read_header
from flashvl.engine import Request, StructuredOutputs
from flashvl.engine.engine import longest_conversation
from flashvl.engine.grammars import Grammars
from flashvl.errors import DataError
from flashvl.model import FlashVLConfig
from flashvl.model.loading import hash_folder, load_processor, resolve_checkpoint
from flashvl.serve.config import ServiceConfig
from flashvl.serve.conversations import as_conversation
from flashvl.serve.protocol.chat import ChatCompletionRequest
from flashvl.serve.protocol.completions import CompletionRequest
from flashvl.serve.protocol.errors import RequestError
from flashvl.serve.protocol.messages import ChatMessage, ImagePart
from flashvl.serve.protocol.sampling import Sampling
from flashvl.serve.protocol.service import TokenizeRequest
from flashvl.serve.protocol.structured import JSONObjectFormat, JSONSchemaFormat, ResponseFormat
from flashvl.serve.protocol.tools import Tool
from flashvl.serve.replica import ReplicaRequest
from flashvl.serve.tools import ToolUse, arguments_schema

LEAST_TEMPERATURE = 1e-3
"""Lower temperatures count as 0: logits divided by them would overflow, and the likeliest token is
as good as certain."""
LEAST_TOP_P = 1e-6
"""Lower values of `top_p` count as this one, which leaves only the likeliest token."""


class Prompts:
    """Makes prompts with a model's processor; does not know its weights."""

    def __init__(self, config: ServiceConfig):
        """
        Raises:
            CheckpointError: the model has no usable processor.
        """
        self.config = config
        self.processor = load_processor(config.model)
        self.tokenizer = self.processor.tokenizer
        folder = resolve_checkpoint(config.model)
        self.maker_hash = hash_folder(folder, has_weights=False)
        model_config = FlashVLConfig.from_pretrained(folder)
        self.max_model_len = longest_conversation(model_config)
        self.vocab_size: int = model_config.text_config.vocab_size
        self.grammars = Grammars(self.tokenizer, self.vocab_size, [self.tokenizer.eos_token_id])
        self.fetcher = Fetcher(config.media_hosts, remedy="send the image as a data URL")
        # One thread of its own: a tokenizer must not be used by several at once.
        self._thread = ThreadPoolExecutor(1, "flashvl-prompts")

    async def read_chat(
        self, request: ChatCompletionRequest, image: bytes | None = None
    ) -> ReplicaRequest:
        """What an engine is asked: the answers that `request` wants, which share its prompt.

        Args:
            image: an encoded image to put before the first message's text.

        Raises:
            RequestError: the request cannot be answered.
        """
        tools = ToolUse.of(request)
        try:
            structured = await self._structure(request, tools)
        except RequestError:
            await self._check_tools(request.tools, tools)
            raise
        messages, images = await self.read_messages(request.messages, tools)
        if image is not None:
            first, *others = messages
            messages = [{**first, "content": [{"type": "image"}, *first["content"]]}, *others]
            images = [image, *images]
        prompt = await self.encode(messages, images)
        self._check_sampling(request)
        name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        wanted = request.max_completion_tokens or request.max_tokens
        asked = _engine_request(
            request,
            prompt=prompt,
            max_new_tokens=self._max_new_tokens(name, wanted, len(prompt)),
            logprobs=request.top_logprobs if request.logprobs else None,
            structured=structured,
        )
        return ReplicaRequest(
            requests=_seeded(asked, request.seed, request.n),
            messages=messages,
            maker_hash=self.maker_hash,
            images=images,
            is_streamed=request.stream,
        )

    async def read_texts(self, request: CompletionRequest) -> list[ReplicaRequest]:
        """What the engines are asked: for each prompt, the answers to it.

        Raises:
            RequestError: the request cannot be answered.
        """
        structured = await self._structure(request, None)
        wanted = []
        for text in request.prompts:
            prompt = await self.tokenize(text, request.add_special_tokens)
            self._check_sampling(request)
            asked = _engine_request(
                request,
                prompt=prompt,
                max_new_tokens=self._max_new_tokens("max_tokens", request.max_tokens, len(prompt)),
                logprobs=request.logprobs,
                structured=structured,
            )
            seeded = _seeded(asked, request.seed, request.n)
            wanted.append(ReplicaRequest(requests=seeded, is_streamed=request.stream))
        return wanted

    async def read_messages(
        self, messages: list[ChatMessage], tools: ToolUse | None
    ) -> tuple[list[Message], list[bytes]]:
        """Messages for the chat template, and their images, still encoded.

        Raises:
            RequestError: there are too many images, one cannot be fetched or read, or the last
                message is the assistant's.
        """
        urls = [
            (part.image_url.url, f"messages.{number}.content.{place}.image_url.url")
            for number, message in enumerate(messages)
            if isinstance(message.content, list)
            for place, part in enumerate(message.content)
            if isinstance(part, ImagePart)
        ]
        if len(urls) > self.config.max_images:
            raise RequestError(
                400,
                f"request has {len(urls)} images, more than max_images={self.config.max_images};"
                " send fewer",
                param="messages",
            )
        if messages[-1].role == "assistant":
            raise RequestError(
                400,
                "the last message must not be the assistant's, whose turn it is; end with a user's",
                param=f"messages.{len(messages) - 1}.role",
            )
        images = await asyncio.gather(*(self._get(url, place) for url, place in urls))
        return as_conversation(messages, tools), images

    async def encode(self, messages: list[Message], images: list[bytes]) -> list[int]:
        """The token ids of a conversation, with places for images of the sizes in their headers.

        Raises:
            RequestError: an image is outside the limits, or the prompt is too long.
        """
        try:
            loop = asyncio.get_running_loop()
            prompt = await loop.run_in_executor(self._thread, self._encode, messages, images)
        except DataError as error:
            raise RequestError(400, str(error), param="messages") from None
        self._check_length(prompt, "messages", "shorten it or send fewer images")
        return prompt

    async def tokenize(self, prompt: str | list[int], add_special_tokens: bool = True) -> list[int]:
        """The token ids of a prompt that is not a conversation.

        Raises:
            RequestError: the prompt is empty or too long, or has a token of an image or one that
                the model does not have.
        """
        tokens: list[int]
        if isinstance(prompt, str):
            encode = partial(self.tokenizer.encode, add_special_tokens=add_special_tokens)
            loop = asyncio.get_running_loop()
            tokens = await loop.run_in_executor(self._thread, encode, prompt)
        else:
            tokens = prompt
        self.check_tokens(tokens, "prompt")
        if not tokens or self.processor.image_token_id in tokens:
            raise RequestError(
                400,
                f"prompt must hold at least one token and no {self.processor.image_token}; send"
                " images to /v1/chat/completions",
                param="prompt",
            )
        self._check_length(tokens, "prompt", "shorten it")
        return tokens

    async def tokens_of(self, request: TokenizeRequest) -> list[int]:
        """The token ids of a conversation, or of a prompt that is not one.

        Raises:
            RequestError: as `read_chat` and `tokenize`.
        """
        if request.messages is None:
            return await self.tokenize(request.prompt or "", request.add_special_tokens)
        tools = ToolUse(tools=request.tools) if request.tools else None
        return await self.encode(*await self.read_messages(request.messages, tools))

    async def detokenize(self, tokens: list[int]) -> str:
        """The text of token ids.

        Raises:
            RequestError: the model does not have one of the tokens.
        """
        self.check_tokens(tokens, "tokens")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self.tokenizer.decode, tokens)

    def check_tokens(self, tokens: Any, param: str) -> None:
        """Check a field `param` that holds token ids.

        Raises:
            RequestError: the model does not have one of the tokens.
        """
        if tokens and max(tokens) >= self.vocab_size:
            raise RequestError(
                400,
                f"{param} must hold token ids below {self.vocab_size}, not {max(tokens)}",
                param=param,
            )

    def _check_length(self, prompt: list[int], param: str, remedy: str) -> None:
        """
        Raises:
            RequestError: the prompt leaves no room for an answer.
        """
        if len(prompt) >= self.max_model_len:
            raise RequestError(
                400,
                f"prompt has {len(prompt)} tokens, and the model's limit, with the answer, is"
                f" {self.max_model_len}; {remedy}",
                param=param,
                code="context_length_exceeded",
            )

    def _encode(self, messages: list[Message], images: list[bytes]) -> list[int]:
        rule = self.processor.image_processor.tiling_rule
        sizes = [read_header(image, self.config.image_limits).size for image in images]
        return encode_prompt(messages, [rule.num_tiles(size) for size in sizes], self.processor)

    async def _get(self, url: str, place: str) -> bytes:
        limits = self.config.image_limits
        try:
            if not is_data_url(url):
                return await self.fetcher.fetch(url, limits.max_image_bytes)
            data = decode_data_url(url, limits.max_image_bytes)
            read_header(data, limits)
            return data
        except DataError as error:
            raise RequestError(400, str(error), param=place, code="invalid_image") from None

    def _check_sampling(self, request: Sampling) -> None:
        """
        Raises:
            RequestError: a field names a token that the model does not have.
        """
        self.check_tokens(request.logit_bias, "logit_bias")
        self.check_tokens(request.stop_token_ids, "stop_token_ids")

    async def _structure(
        self, request: ChatCompletionRequest | CompletionRequest, tools: ToolUse | None
    ) -> StructuredOutputs | None:
        """The form that tools, `response_format` or `structured_outputs` give the answer.

        Raises:
            RequestError: `structured_outputs` and another are given, or the form cannot be used.
        """
        schema = schema_of(request.response_format)
        if request.structured_outputs is not None:
            others = {"response_format": schema is not None, "tools": tools is not None}
            for name, is_there in others.items():
                if is_there:
                    raise RequestError(
                        400,
                        f"structured_outputs must stand without {name}; leave one of them out",
                        param="structured_outputs",
                    )
            structured = request.structured_outputs.structured()
            await self._check_grammar(structured, "structured_outputs")
            return structured
        answer = None if schema is None else StructuredOutputs(json=json.dumps(schema))
        if answer is not None:
            await self._check_grammar(answer, "response_format")
        if tools is None:
            return answer
        structured = StructuredOutputs(grammar=tools.grammar(schema))
        await self._check_grammar(structured, "tools")
        return structured

    async def _check_tools(self, given: list[Tool], tools: ToolUse | None) -> None:
        """Find out whether one of the tools is the reason why the form cannot be used.

        Raises:
            RequestError: one is; the error names it.
        """
        for tool in tools.tools if tools else ():
            arguments = json.dumps(arguments_schema(tool.function.parameters))
            place = f"tools.{given.index(tool)}.function.parameters"
            await self._check_grammar(StructuredOutputs(json=arguments), place)

    async def _check_grammar(self, structured: StructuredOutputs, param: str) -> None:
        """
        Raises:
            RequestError: the grammar cannot be compiled; the error names `param`.
        """
        try:
            await asyncio.to_thread(self.grammars.compile, structured)
        except DataError as error:
            told = str(error).partition(" ")[2]  # without the engine's name of the field
            raise RequestError(400, f"{param} {told}", param=param) from None

    def _max_new_tokens(self, name: str, wanted: int | None, num_tokens: int) -> int:
        """Tokens of the answer at most, where the field `name` asks for `wanted`.

        Raises:
            RequestError: there is no room for that number of tokens.
        """
        room = min(self.max_model_len - num_tokens, self.config.max_new_tokens)
        if wanted is None:
            return min(self.config.default_new_tokens, room)
        if wanted > room:
            raise RequestError(
                400,
                f"{name}={wanted} is more than the {room} that are left: the service answers with"
                f" up to {self.config.max_new_tokens} tokens, the model takes"
                f" {self.max_model_len} in all, and the prompt has {num_tokens}",
                param=name,
                code="context_length_exceeded",
            )
        return wanted


def schema_of(wanted: ResponseFormat | None) -> dict[str, Any] | None:
    """The JSON schema that OpenAI's `response_format` asks for; None: any text."""
    if isinstance(wanted, JSONObjectFormat):
        return {"type": "object"}
    return wanted.json_schema.schema_ if isinstance(wanted, JSONSchemaFormat) else None


def _engine_request(
    request: Sampling,
    *,
    prompt: list[int],
    max_new_tokens: int,
    logprobs: int | None,
    structured: StructuredOutputs | None,
) -> Request:
    """The engine's form of what all kinds of request have in common."""
    temperature = request.temperature
    return Request(
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        min_new_tokens=request.min_tokens,
        temperature=temperature if temperature >= LEAST_TEMPERATURE else 0.0,
        top_p=max(request.top_p, LEAST_TOP_P),
        top_k=max(request.top_k, 0),
        min_p=request.min_p,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias=request.logit_bias,
        stop=tuple(request.stop_strings),
        stop_token_ids=tuple(request.stop_token_ids),
        ignore_eos=request.ignore_eos,
        structured_outputs=structured,
        logprobs=logprobs,
    )


def _seeded(request: Request, seed: int | None, count: int) -> list[Request]:
    """`count` times the same request, each with a seed of its own."""
    first = secrets.randbits(62) if seed is None else seed
    return [replace(request, seed=(first + number) % 2**63) for number in range(count)]
