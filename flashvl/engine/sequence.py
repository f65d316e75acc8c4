"""One request while the engine answers it."""

import codecs
import time
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import torch

from flashvl.engine.cache import CopiedRow
from flashvl.engine.grammars import Grammar
from flashvl.engine.prompts import Prompt, SharedPrompt
from flashvl.engine.request import Completion, FinishReason, Request, Timing, TokenLogprobs
from flashvl.engine.sampling import Sampler
from flashvl.engine.tokens import TokenTable


@dataclass(eq=False, kw_only=True, slots=True)
class Sequence:
    """A request with its prompt, its answer so far, and the number of tokens in the cache."""

    id: int
    request: Request
    prompt: Prompt
    sampler: Sampler
    text: "AnswerText"
    is_streamed: bool
    grammar: Grammar | None = None
    """State of the request's `structured_outputs`; None if it has none."""
    shared: SharedPrompt | None = None
    """The prompt in the cache that the answer goes on from; None: its row holds the prompt too."""
    embeddings: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """Embeddings of a prompt of its own, kept from its admission until it is in the cache."""
    set_aside: CopiedRow | None = None
    """The part of a prompt of its own that was in the cache when others went first."""
    token_ids: list[int] = field(default_factory=list)
    """Tokens of the answer, with any end tokens that `ignore_eos` passes over."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    end: TokenLogprobs | None = None
    """Token that ended the answer without being part of it, if log-probabilities are asked for."""
    num_cached: int = 0
    """Tokens of the answer, and of a prompt of its own, that the row of the cache holds."""
    finish_reason: FinishReason | None = None
    added_s: float = field(default_factory=time.perf_counter)
    admitted_s: float = 0.0
    first_token_s: float = 0.0

    @property
    def row_length(self) -> int:
        """Tokens that the row of the cache may have to hold."""
        return self.request.max_new_tokens if self.shared is not None else self.max_length

    @property
    def max_length(self) -> int:
        """Tokens that the prompt and the answer can have together."""
        return len(self.prompt) + self.request.max_new_tokens

    def complete(self) -> Completion:
        """The finished answer."""
        assert self.finish_reason is not None
        return Completion(
            text=self.text.text,
            token_ids=self.token_ids,
            prompt_tokens=len(self.prompt),
            finish_reason=self.finish_reason,
            logprobs=None if self.request.logprobs is None else self.logprobs,
            end=self.end,
            timing=Timing(
                queue_s=self.admitted_s - self.added_s,
                first_token_s=self.first_token_s - self.added_s,
                last_token_s=time.perf_counter() - self.added_s,
            ),
        )


class AnswerText:
    """The text of an answer that grows token by token, cut before the stop string that ends it.

    The first stop string to be complete ends the answer; of several completed by the same
    character, the longest. So neither token boundaries nor streaming affect the text.
    """

    def __init__(self, tokens: TokenTable, stop: Many[str]):
        self.tokens, self.stop = tokens, tuple(stop)
        self.text = ""
        """Text so far: whole characters only, until `close`."""
        self.is_stopped = False
        """Whether a stop string has ended the answer."""
        self._num_taken = 0
        """Characters of the text that `take` has returned."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> bool:
        """Append a token's text; returns whether a stop string has ended the answer."""
        num_before = len(self.text)
        self.text += self._decoder.decode(self.tokens.text_bytes(token))
        ends = []
        for stop in self.stop:
            start = self.text.find(stop, max(num_before - len(stop) + 1, 0))
            if start >= 0:
                ends.append((start + len(stop), start))
        if ends:
            _, start = min(ends)
            self.text = self.text[:start]
            self.is_stopped = True
        return self.is_stopped

    def close(self) -> None:
        """End the text; an incomplete character becomes U+FFFD."""
        if not self.is_stopped:
            self.text += self._decoder.decode(b"", final=True)
            self.stop = ()  # no stop string can be completed any more

    def take(self) -> str:
        """Text since the last call, without an end that may still become part of a stop string."""
        end = len(self.text)
        if not self.is_stopped:
            end -= max((_overlap(self.text, stop) for stop in self.stop), default=0)
        new = self.text[self._num_taken : end]
        self._num_taken = end
        return new


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
