"""What a client gets in place of an answer."""

from flashvl.serve.protocol.parts import Answer


class APIError(Answer):
    message: str
    """The rule, what broke it, and what the client can do."""
    type: str
    """OpenAI's kind of error, such as `invalid_request_error`."""
    param: str | None = None
    """Field of the request that is wrong, such as `messages.0.content`."""
    code: str | None = None
    """Name of the error for programs."""


class ErrorResponse(Answer):
    error: APIError


class RequestError(Exception):
    """An error that a client gets, with its HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code = status, _encodable(message), code
        self.param = None if param is None else _encodable(param)
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> ErrorResponse:
        """The content of the HTTP response."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return ErrorResponse(
            error=APIError(message=self.message, type=kind, param=self.param, code=self.code)
        )


def _encodable(text: str) -> str:
    """`text` with the unpaired surrogates escaped that a client may send and no answer can hold."""
    return text.encode("utf-8", "backslashreplace").decode()
