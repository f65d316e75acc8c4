"""Every error that a client can meet, answered as OpenAI does."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from flashvl.serve.admission import as_response
from flashvl.serve.protocol.errors import ErrorResponse, RequestError

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


def answer_errors_as_openai_does(api: FastAPI) -> None:
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
