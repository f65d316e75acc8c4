"""A client's messages -> what an engine is asked, checked as far as it can be without decoding."""

import asyncio
import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from flashvl.data.features import Message, encode_prompt
from flashvl.data.fetching import Fetcher
from flashvl.data.images import read_header
from flashvl.engine.engine import longest_conversation
from flashvl.errors import DataError
from flashvl.model import FlashVLConfig
from flashvl.model.loading import load_processor, resolve_checkpoint
from flashvl.serve.config import ServiceConfig
from flashvl.serve.media import decode_data_url
from flashvl.serve.protocol.chat import ChatCompletionRequest
from flashvl.serve.protocol.errors import RequestError
from flashvl.serve.protocol.messages import ChatMessage, ImagePart, TextPart
from flashvl.serve.replica import Ask


class Prompts:
    """Knows the model's processor, but not its weights."""

    def __init__(self, config: ServiceConfig):
        """
        Raises:
            CheckpointError: the model has no usable processor.
        """
        self.config = config
        self.processor = load_processor(config.model)
        self.max_model_len = longest_conversation(
            FlashVLConfig.from_pretrained(resolve_checkpoint(config.model))
        )
        self.fetcher = Fetcher(config.media_hosts, remedy="send the image as a data URL")
        # One thread, beside the event loop: a tokenizer is not made for several.
        self._thread = ThreadPoolExecutor(1, "flashvl-prompts")

    async def asks(self, request: ChatCompletionRequest) -> list[Ask]:
        """One for each answer that a request wants.

        Raises:
            RequestError: it cannot be answered.
        """
        return await self._asks(request, *await self.read(request.messages))

    async def asks_about(self, request: ChatCompletionRequest, image: bytes) -> list[Ask]:
        """As `asks`, with an image before the first message's text.

        Raises:
            RequestError: it cannot be answered.
        """
        first, *others = [_as_message(message) for message in request.messages]
        first = {**first, "content": [{"type": "image"}, *first["content"]]}
        return await self._asks(request, [first, *others], [image])

    async def _asks(
        self, request: ChatCompletionRequest, messages: list[Message], images: list[bytes]
    ) -> list[Ask]:
        num_tokens = len(await self.encode(messages, images))
        seed = secrets.randbits(62) if request.seed is None else request.seed
        stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
        ask = Ask(
            messages=messages,
            images=images,
            is_streamed=bool(request.stream),
            sampling={
                "max_new_tokens": self._max_new_tokens(request, num_tokens),
                "min_new_tokens": request.min_tokens,
                "temperature": request.temperature or 0.0,
                "top_p": 1.0 if request.top_p is None else request.top_p,
                "top_k": request.top_k,
                "repetition_penalty": request.repetition_penalty,
                "stop": tuple(stop),
                "ignore_eos": request.ignore_eos,
                "logprobs": (request.top_logprobs or 0) if request.logprobs else None,
            },
        )
        return [
            replace(ask, sampling=ask.sampling | {"seed": (seed + number) % 2**63})
            for number in range(request.n)
        ]

    async def read(self, messages: list[ChatMessage]) -> tuple[list[Message], list[bytes]]:
        """Messages as the chat template wants them, and their images, still encoded.

        Raises:
            RequestError: too many images, or one that cannot be had.
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
                f"request has {len(urls)} images, more than max_images={self.config.max_images}",
                param="messages",
            )
        if messages[-1].role != "user":
            raise RequestError(
                400,
                "the last message must be the user's, which the model is to answer",
                param=f"messages.{len(messages) - 1}.role",
            )
        images = await asyncio.gather(*(self._get(url, place) for url, place in urls))
        return [_as_message(message) for message in messages], images

    async def encode(self, messages: list[Message], images: list[bytes]) -> list[int]:
        """The prompt's token ids, by what the images' headers say.

        Raises:
            RequestError: an image is outside the limits, or the prompt is too long.
        """
        try:
            loop = asyncio.get_running_loop()
            prompt = await loop.run_in_executor(self._thread, self._encode, messages, images)
        except DataError as error:
            raise RequestError(400, str(error), param="messages") from None
        if len(prompt) >= self.max_model_len:
            raise RequestError(
                400,
                f"prompt has {len(prompt)} tokens, and the model's limit, with the answer, is"
                f" {self.max_model_len}; shorten it or send fewer images",
                param="messages",
                code="context_length_exceeded",
            )
        return prompt

    def _encode(self, messages: list[Message], images: list[bytes]) -> list[int]:
        rule = self.processor.image_processor.tiling_rule
        sizes = [read_header(image, self.config.limits).size for image in images]
        return encode_prompt(messages, [rule.num_tiles(size) for size in sizes], self.processor)

    async def _get(self, url: str, place: str) -> bytes:
        limits = self.config.limits
        try:
            if not url[:5].lower() == "data:":
                return await self.fetcher.fetch(url, limits.max_image_bytes)
            data, media_type = decode_data_url(url, limits.max_image_bytes)
            found = read_header(data, limits).media_type
            if media_type is not None and media_type != found:
                raise DataError(
                    f"image is labelled {media_type} and is {found}; label it as what it is"
                )
            return data
        except DataError as error:
            raise RequestError(400, str(error), param=place, code="invalid_image") from None

    def _max_new_tokens(self, request: ChatCompletionRequest, num_tokens: int) -> int:
        """
        Raises:
            RequestError: there is no room for as many as the request asks for.
        """
        room = min(self.max_model_len - num_tokens, self.config.max_new_tokens)
        name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        wanted = request.max_completion_tokens or request.max_tokens
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


def _as_message(message: ChatMessage) -> Message:
    """As the chat template has it, the images before the text if they stood behind all of it.

    The model learnt to read a question that follows its picture.
    """
    role = "system" if message.role == "developer" else message.role
    if not isinstance(message.content, list):
        return {"role": role, "content": [{"type": "text", "text": message.content or ""}]}
    images = [index for index, part in enumerate(message.content) if isinstance(part, ImagePart)]
    parts = list(message.content)
    if images and images[0] == len(parts) - len(images):
        parts = parts[images[0] :] + parts[: images[0]]
    return {
        "role": role,
        "content": [
            {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
            for part in parts
        ],
    }
