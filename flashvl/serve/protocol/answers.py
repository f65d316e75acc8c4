"""Parts that several kinds of answer have in common."""

import time
import uuid
from typing import Self

from transformers import PreTrainedTokenizerBase

from flashvl.engine import Completion, TokenLogprobs, token_bytes
from flashvl.serve.protocol.parts import Answer

LEAST_LOGPROB = -9999.0
"""The least log-probability in an answer, as OpenAI's: JSON has no infinity."""


class Usage(Answer):
    """Tokens that a request took."""

    prompt_tokens: int
    """Tokens of the prompt, those of its images included."""
    completion_tokens: int
    """Tokens of all answers."""
    total_tokens: int

    @classmethod
    def of(cls, completions: list[Completion], num_prompts: int = 1) -> Self:
        """The tokens of all completions, the same number for each prompt; a prompt counts once."""
        per_prompt = len(completions) // num_prompts
        prompt = sum(each.prompt_tokens for each in completions[::per_prompt])
        new = sum(len(each.token_ids) for each in completions)
        return cls(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new)


class Timings(Answer):
    """Times of an answer in milliseconds, from when the engine received its request."""

    queue_ms: float
    """Time until a slot was free."""
    ttft_ms: float
    """Time until the first token."""
    tpot_ms: float
    """Mean time from one token to the next; 0 for an answer of one token."""
    total_ms: float
    """Time until the last token."""

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


class TopLogprob(Answer):
    token: str
    """Text of the token; `bytes:\\xe2\\x80`, as OpenAI has it, for a part of a character."""
    logprob: float
    """Log-probability of the token."""
    bytes: list[int]
    """The token's bytes in UTF-8."""

    @classmethod
    def of(cls, token_id: int, logprob: float, tokenizer: PreTrainedTokenizerBase) -> Self:
        data = token_bytes(tokenizer, token_id)
        return cls(token=_as_text(data), logprob=max(logprob, LEAST_LOGPROB), bytes=list(data))


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob] = []
    """The likeliest tokens at this place, the likeliest first."""


class ChoiceLogprobs(Answer):
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
    """A random id that begins with `prefix`."""
    return prefix + uuid.uuid4().hex


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())
