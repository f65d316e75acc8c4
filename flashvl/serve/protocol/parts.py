"""What several kinds of request and of answer have in common."""

import base64
import time
import uuid
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag

from flashvl.engine import Completion, TokenLogprobs

MAX_MESSAGES = 256
MAX_TEXT = 1_000_000
"""Characters of a text; the model's limit in tokens is far below."""

Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]


class Closed(BaseModel):
    """Base of what clients send."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


def form(content: Any) -> str:
    """Which of the two a client means, so that an error is of that one."""
    return "[parts]" if isinstance(content, list) else "[text]"


StopString = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Stop = Annotated[
    Annotated[StopString, Tag("[text]")]
    | Annotated[list[StopString], Field(max_length=16), Tag("[parts]")],
    Discriminator(form),
]


class StreamOptions(Closed):
    include_usage: bool = False
    """A last chunk without choices tells the tokens of the whole request."""
    include_obfuscation: bool = False
    """Taken and ignored."""


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, completions: list[Completion]) -> "Usage":
        """Of the answers to one prompt."""
        prompt, new = completions[0].prompt_tokens, sum(len(each.token_ids) for each in completions)
        return cls(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new)


class Timings(BaseModel):
    """In milliseconds, since the engine had the request."""

    queue_ms: float
    """Until a slot was free."""
    ttft_ms: float
    """Until the first token."""
    tpot_ms: float
    """From token to token, on average; 0 for an answer of one."""
    total_ms: float

    @classmethod
    def of(cls, completion: Completion) -> "Timings":
        timing = completion.timing
        num_steps = max(len(completion.token_ids) - 1, 1)
        return cls(
            queue_ms=round(1e3 * timing.queue_s, 3),
            ttft_ms=round(1e3 * timing.first_token_s, 3),
            tpot_ms=round(1e3 * (timing.last_token_s - timing.first_token_s) / num_steps, 3),
            total_ms=round(1e3 * timing.last_token_s, 3),
        )


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None

    @classmethod
    def of(cls, logprobs: list[TokenLogprobs], tokenizer: Any) -> "ChoiceLogprobs":
        def named(token_id: int, logprob: float) -> dict[str, Any]:
            token = tokenizer.decode([token_id])
            # JSON has no infinity; OpenAI's own floor.
            return {
                "token": token,
                "logprob": max(logprob, -9999.0),
                "bytes": list(token.encode()),
            }

        return cls(
            content=[
                TokenLogprob(
                    **named(each.token_id, each.logprob),
                    top_logprobs=[TopLogprob(**named(*top)) for top in each.top.items()],
                )
                for each in logprobs
            ]
        )


def new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


def now() -> int:
    return int(time.time())


def decode_base64(text: str) -> bytes:
    """
    Raises:
        ValueError: it is not base64.
    """
    return base64.b64decode(text, validate=True)
