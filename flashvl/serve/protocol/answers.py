"""What several kinds of answer have in common."""

import time
import uuid
from typing import Self

from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from flashvl.engine import Completion, TokenLogprobs, token_bytes

LEAST_LOGPROB = -9999.0
"""JSON has no infinity; OpenAI's own floor."""


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, completions: list[Completion], num_prompts: int = 1) -> Self:
        """Of as many answers to each prompt, which counts once."""
        per_prompt = len(completions) // num_prompts
        prompt = sum(each.prompt_tokens for each in completions[::per_prompt])
        new = sum(len(each.token_ids) for each in completions)
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
    def of(cls, completion: Completion) -> Self:
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
    """Its text; of a part of a character, as OpenAI has it, `bytes:\\xe2\\x80`."""
    logprob: float
    bytes: list[int]

    @classmethod
    def of(cls, token_id: int, logprob: float, tokenizer: PreTrainedTokenizerBase) -> Self:
        data = token_bytes(tokenizer, token_id)
        return cls(token=_as_text(data), logprob=max(logprob, LEAST_LOGPROB), bytes=list(data))


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob] = []


class ChoiceLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None

    @classmethod
    def of(cls, logprobs: list[TokenLogprobs], tokenizer: PreTrainedTokenizerBase) -> Self:
        content = []
        for each in logprobs:
            token = TokenLogprob.of(each.token_id, each.logprob, tokenizer)
            token.top_logprobs = [TopLogprob.of(*top, tokenizer) for top in each.top.items()]
            content.append(token)
        return cls(content=content)


def _as_text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def new_id(prefix: str) -> str:
    return prefix + uuid.uuid4().hex


def now() -> int:
    return int(time.time())
