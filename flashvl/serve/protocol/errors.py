"""What a client is told in place of an answer."""

from pydantic import BaseModel


class APIError(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    error: APIError


class RequestError(Exception):
    """Whatever a client is told in place of an answer."""

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
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return ErrorResponse(
            error=APIError(message=self.message, type=kind, param=self.param, code=self.code)
        )


def _encodable(text: str) -> str:
    """Without the unpaired surrogates of a client's text, which no answer can hold."""
    return text.encode("utf-8", "backslashreplace").decode()
