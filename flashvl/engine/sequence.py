"""One request on its way through the engine."""

import time
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import torch
from llguidance import LLMatcher
from transformers import PreTrainedTokenizerBase

from flashvl.data.features import Tiles
from flashvl.engine.request import Completion, FinishReason, Request, Timing, TokenLogprobs
from flashvl.engine.sampling import Sampler


@dataclass(eq=False, kw_only=True, slots=True)
class Sequence:
    """Its prompt, its answer so far, and how much of both the cache holds."""

    id: int
    request: Request
    prompt: list[int]
    tiles: Tiles
    sampler: Sampler
    text: "AnswerText"
    is_streamed: bool
    grammar: LLMatcher | None = None
    """What may follow, by `structured_outputs`."""
    embeddings: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """Of the prompt, from its admission until it is in the cache."""
    token_ids: list[int] = field(default_factory=list)
    """New ones, an end token among them where it is ignored."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_cached: int = 0
    finish_reason: FinishReason | None = None
    added_s: float = field(default_factory=time.perf_counter)
    admitted_s: float = 0.0
    first_token_s: float = 0.0

    @property
    def is_prefilled(self) -> bool:
        return self.num_cached >= len(self.prompt)

    @property
    def max_length(self) -> int:
        """Tokens that it can come to."""
        return len(self.prompt) + self.request.max_new_tokens

    def complete(self) -> Completion:
        assert self.finish_reason is not None
        return Completion(
            text=self.text.whole(self.token_ids),
            token_ids=self.token_ids,
            prompt_tokens=len(self.prompt),
            finish_reason=self.finish_reason,
            logprobs=None if self.request.logprobs is None else self.logprobs,
            timing=Timing(
                queue_s=self.admitted_s - self.added_s,
                first_token_s=self.first_token_s - self.added_s,
                last_token_s=time.perf_counter() - self.added_s,
            ),
        )


class AnswerText:
    """The text of an answer that grows token by token, cut before the first stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Many[str]):
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.text = ""
        """Decoded so far, whole characters only."""
        self.num_given = 0
        """Characters of it that `take` has returned."""
        self.is_stopped = False
        self._start = self._end = 0

    def add(self, token_ids: list[int]) -> bool:
        """Decode what `token_ids`, the whole answer, has on top; returns whether it is stopped.

        Some tokens are parts of a character, and some decode otherwise behind others, so the last
        decoded ones are decoded again with the new ones.
        """
        before = self._decode(token_ids[self._start : self._end])
        now = self._decode(token_ids[self._start :])
        if len(now) > len(before) and not now.endswith("\N{REPLACEMENT CHARACTER}"):
            self.text += now[len(before) :]
            self._start, self._end = self._end, len(token_ids)
        places = [place for place in map(self.text.find, self.stop) if place >= 0]
        if places:
            self.text = self.text[: min(places)]
            self.is_stopped = True
        return self.is_stopped

    def take(self, token_ids: list[int], is_last: bool = False) -> str:
        """What is new since the last call and cannot become part of a stop string any more."""
        text = self.whole(token_ids) if is_last else self.text
        end = len(text)
        if not is_last:
            end -= max((_overlap(text, stop) for stop in self.stop), default=0)
        new = text[self.num_given : end]
        self.num_given = max(end, self.num_given)
        return new

    def whole(self, token_ids: list[int]) -> str:
        """The answer's text."""
        return self.text if self.is_stopped else self._decode(token_ids)

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` with which `stop` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
