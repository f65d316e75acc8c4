"""Checks before a request is parsed: its API key, the engines' room, the length of its body."""

import asyncio
import contextlib
import hmac
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashvl.errors import ConfigError
from flashvl.serve.metrics import refusals
from flashvl.serve.playground import PATHS
from flashvl.serve.protocol import RequestError
from flashvl.serve.traffic import STOPPING, Traffic

KEYS_VARIABLE = "FLASHVL_API_KEYS"
OPEN_PATHS = PATHS | {"/health", "/healthz", "/readyz", "/version", "/docs", "/openapi.json"}
"""Paths that need no key: they tell nothing about the users and start nothing."""
ALIVE_PATH = "/healthz"
"""Path that is answered while the service drains: a process that does not answer it is killed."""
ANSWERED_PATHS = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/captions"}
)
"""Paths whose requests engines answer."""


def read_api_keys(file: str | None) -> tuple[bytes, ...]:
    """The API keys in the environment and in a file.

    Raises:
        ConfigError: the file cannot be read or holds no key; a service that should be closed must
            not be open by mistake.
    """
    keys = os.environ.get(KEYS_VARIABLE, "").split(",")
    if file is not None:
        try:
            lines = Path(file).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"api_keys_file {file} cannot be read ({error}); name another"
            ) from None
        if not any(line.strip() for line in lines):
            raise ConfigError(f"api_keys_file {file} holds no key; write one a line")
        keys += lines
    return tuple(key.strip().encode() for key in keys if key.strip())


class Admission:
    """ASGI middleware that checks a request's key, then reads its whole body within bounds."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_keys: tuple[bytes, ...],
        max_body_bytes: int,
        timeout_s: float,
        traffic: Traffic,
        check_room: Callable[[], None],
    ):
        """
        Args:
            timeout_s: seconds within which the body must have come.
            traffic: counts the requests under way.
            check_room: raises RequestError if the engines have no room; asked for `ANSWERED_PATHS`.
        """
        self.app, self.api_keys, self.check_room = app, api_keys, check_room
        self.traffic = traffic
        self.max_body_bytes, self.timeout_s = max_body_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == ALIVE_PATH:
            await self.app(scope, receive, send)
            return
        with contextlib.ExitStack() as under_way:
            try:
                under_way.enter_context(self.traffic.request())
                headers = Headers(scope=scope)
                if scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS":
                    self._check_key(headers)
                if scope["path"] in ANSWERED_PATHS:
                    self.check_room()
                body = await self._read(headers, receive)
            except RequestError as refusal:
                await as_response(refusal)(scope, receive, send)
                return
            except _DisconnectedError:
                return
            replayed = iter([{"type": "http.request", "body": body, "more_body": False}])

            async def receive_again() -> Message:
                return next(replayed, None) or await receive()

            await self.app(scope, receive_again, send)

    def _check_key(self, headers: Headers) -> None:
        if not self.api_keys:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        key = given.strip().encode() if scheme.lower() == "bearer" else b""
        # Each key is compared whole, whether or not one before was equal: the time tells nothing.
        if not sum(hmac.compare_digest(key, each) for each in self.api_keys):
            problem = "is not one of this service's" if key else "is missing"
            raise RequestError(
                401,
                f"API key {problem}; send the header Authorization: Bearer KEY",
                code="invalid_api_key",
            )

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        too_long = RequestError(
            413,
            f"request body has more than max_body_bytes={self.max_body_bytes}; send fewer or"
            " smaller images",
            code="request_too_large",
        )
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or int(length[:20]) > self.max_body_bytes:
            raise too_long
        body = bytearray()
        try:
            async with asyncio.timeout(self.timeout_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _DisconnectedError
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self.max_body_bytes:
                        raise too_long
        except TimeoutError:
            raise RequestError(
                408, f"request body did not arrive within {self.timeout_s:g} s", code="timeout"
            ) from None
        return bytes(body)


class _DisconnectedError(Exception):
    pass


def as_response(refusal: RequestError) -> JSONResponse:
    """The HTTP response, in OpenAI's shape, to a request that is refused; also counts it."""
    refusals().inc(tags={"reason": refusal.code or str(refusal.status)})
    headers: dict[str, Any] = {}
    if refusal.retry_after_s is not None:
        headers["Retry-After"] = str(refusal.retry_after_s)
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if refusal.status in (408, 413) or refusal.code == STOPPING:
        headers["Connection"] = "close"  # neither the rest of the body nor a next request
    return JSONResponse(refusal.body.model_dump(), refusal.status, headers)
