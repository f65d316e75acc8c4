"""Every error that a client can get, in OpenAI's form."""

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
        (400, "The request has a field that cannot be used; `param` names it."),
        (401, "The API key is missing or wrong."),
        (404, "There is no model, batch or path with this name."),
        (408, "The body did not arrive in time."),
        (413, "The body is too long."),
        (429, "The queue is full; `Retry-After` tells when to try again."),
        (503, "No engine is available, or the one that was answering was lost."),
        (504, "The answer took too long."),
    )
}


def answer_errors_as_openai_does(api: FastAPI) -> None:
    """Add handlers of exceptions to an application."""

    @api.exception_handler(RequestError)
    async def refuse(_: Request, error: RequestError) -> Response:
        return as_response(error)

    @api.exception_handler(RequestValidationError)
    async def refuse_fields(_: Request, error: RequestValidationError) -> Response:
        problems = error.errors()
        # A wrong field may be the reason why another one is missing.
        problem = next((each for each in problems if each["type"] != "missing"), problems[0])
        param = _place(problem, error.body)
        message = f"{param or 'body'}{_in_our_words(problem)}"
        return as_response(RequestError(400, message, param=param, code=problem["type"]))

    @api.exception_handler(Exception)
    async def admit_fault(_: Request, error: Exception) -> Response:
        # Starlette raises it again after this, so that the log has it with its traceback.
        return as_response(RequestError(500, "the service has failed; its log tells why"))

    @api.exception_handler(HTTPException)
    async def refuse_path(request: Request, error: HTTPException) -> Response:
        method, path = request.method, request.url.path[:100]
        allowed = (error.headers or {}).get("Allow", "other methods")
        told = {
            400: "body cannot be read: it must be JSON, or for /v1/captions a multipart form whose"
            " texts are shorter than 1 MiB",
            404: f"no path {path!r} here; GET /openapi.json lists those that there are",
            405: f"{path} takes {allowed}, not {method}",
        }.get(error.status_code, str(error.detail))
        response = as_response(RequestError(error.status_code, told))
        response.headers.update(error.headers or {})
        return response


def _in_our_words(problem: dict[str, Any]) -> str:
    """What is wrong with a field, to be written after its name."""
    kind, context, value = problem["type"], problem.get("ctx", {}), problem.get("input")
    shown = "" if isinstance(value, dict | list | None) else f", not {value!r:.60}"
    match kind:
        case "missing":
            return " is missing; send it"
        case "extra_forbidden":
            return ": this service knows no such field; leave it out"
        case "json_invalid":
            return f" is not JSON: {context.get('error', 'it ends too early')}"
        case "model_attributes_type" | "model_type" | "dict_type":
            return f" must be a JSON object, sent as application/json{shown:.60}"
        case "string_unicode":
            return " holds half a surrogate pair; send valid Unicode"
        case "union_tag_invalid":
            return f" must be one of {context['expected_tags']}, not {context['tag']!r:.60}"
        case "union_tag_not_found":
            return f" must be an object that tells its {context['discriminator'].strip(chr(39))}"
    message = str(problem["msg"])
    if message.startswith("Input should"):
        return f" must{message.removeprefix('Input should')}{shown}"
    return f": {message.removeprefix('Value error, ')}{shown if kind == 'value_error' else ''}"


def _place(problem: dict[str, Any], body: Any) -> str | None:
    """The wrong field, such as `messages.0.content`, without the variants that pydantic tried."""
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
