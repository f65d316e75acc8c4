"""From logits to the next token of each request."""

from collections import Counter
from collections.abc import Sequence

import torch

from flashvl.engine.request import Request, TokenLogprobs


class Sampler:
    """The choices of one request: its parameters, its random numbers, what it said before."""

    def __init__(self, request: Request, prompt: Sequence[int], end_token_ids: Sequence[int]):
        self.request = request
        self.end_token_ids = list(end_token_ids)
        self.prompt = set(prompt) if request.repetition_penalty != 1 else set()
        self.said: Counter[int] = Counter()
        """How often the answer holds each token."""
        self.generator = torch.Generator().manual_seed(request.seed)
        self.has_penalties = bool(
            request.repetition_penalty != 1 or request.presence_penalty or request.frequency_penalty
        )
        self.is_plain = not (
            request.temperature
            or self.has_penalties
            or request.logit_bias
            or request.min_new_tokens
        )
        """The likeliest token is the next one, whatever came before."""

    def choose(self, logits: torch.Tensor, num_new_tokens: int) -> int | None:
        """The next token, given the (vocabulary,) logits, behind `num_new_tokens` of the answer.

        None where the answer must not end and nothing can follow. The order is vLLM's.
        """
        request = self.request
        logits = logits.float().cpu().clone()
        if num_new_tokens < request.min_new_tokens:
            logits[[*self.end_token_ids, *request.stop_token_ids]] = -torch.inf
        if logits.max() == -torch.inf:
            return None
        if request.logit_bias:
            logits[list(request.logit_bias)] += torch.tensor(list(request.logit_bias.values()))
        if self.has_penalties:
            self._penalize(logits)
        if request.temperature == 0:
            token = int(logits.argmax())
        else:
            probabilities = self._truncate(logits / request.temperature).softmax(-1)
            token = int(torch.multinomial(probabilities, 1, generator=self.generator))
        if self.has_penalties:
            self.said[token] += 1
        return token

    def _penalize(self, logits: torch.Tensor) -> None:
        """In place."""
        request = self.request
        if request.repetition_penalty != 1:
            seen = torch.tensor(sorted(self.prompt | self.said.keys()))
            penalty = request.repetition_penalty
            logits[seen] = torch.where(
                logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty
            )
        if self.said:
            counts = torch.tensor(list(self.said.values()))
            logits[list(self.said)] -= counts * request.frequency_penalty + request.presence_penalty

    def _truncate(self, logits: torch.Tensor) -> torch.Tensor:
        """-inf for all tokens but those that `min_p`, `top_k` and then `top_p` admit."""
        request = self.request
        if request.min_p:
            probabilities = logits.softmax(-1)
            is_out = probabilities < request.min_p * probabilities.max()
            logits = logits.masked_fill(is_out, -torch.inf)
        if request.top_k:
            least = logits.topk(min(request.top_k, len(logits))).values[-1]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if request.top_p < 1:
            ordered, order = logits.sort(descending=True)
            probabilities = ordered.softmax(-1)
            # What stands before a token, not the token itself: the first is always admitted.
            is_out = probabilities.cumsum(-1) - probabilities >= request.top_p
            is_out[0] = False  # where top_p is 0 in fp32
            logits = logits.masked_fill(is_out.scatter(0, order, is_out), -torch.inf)
        return logits


def token_logprobs(logits: torch.Tensor, token: int, count: int) -> TokenLogprobs:
    """Log-probabilities of `token` and of the `count` likeliest, by the (vocabulary,) logits."""
    logprobs = logits.float().log_softmax(-1)
    values, tokens = logprobs.topk(min(count, len(logprobs)))
    pairs = zip(tokens.tolist(), values.tolist(), strict=True)
    top = {other: value for other, value in pairs if value > -torch.inf}
    return TokenLogprobs(token_id=token, logprob=float(logprobs[token]), top=top)
