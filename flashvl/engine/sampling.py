"""From logits to the next token of each request."""

from collections import Counter
from collections.abc import Sequence

import torch

from flashvl.engine.request import Request, TokenLogprobs


class Sampler:
    """Chooses the tokens of one request; holds its random numbers and counts its tokens."""

    def __init__(self, request: Request, prompt: Sequence[int], end_token_ids: Sequence[int]):
        self.request = request
        self.end_token_ids = list(end_token_ids)
        self.prompt = set(prompt) if request.repetition_penalty != 1 else set()
        self.said: Counter[int] = Counter()
        """Token -> how often the answer holds it."""
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
        """Whether the next token is always the likeliest one, so that `choose` is not needed."""

    def choose(self, logits: torch.Tensor, num_new_tokens: int) -> int | None:
        """The next token of an answer of `num_new_tokens` tokens; the steps are in vLLM's order.

        Args:
            logits: (vocabulary,); -inf for tokens that are not admitted.

        Returns:
            The token's id; None if the answer must not end yet and no other token is admitted.
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
        """Apply the three penalties to `logits`, in place."""
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
        """The logits, -inf for tokens that `min_p`, then `top_k`, then `top_p` exclude."""
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
            # Compares the mass before each token, so that the first token is always admitted.
            is_out = probabilities.cumsum(-1) - probabilities >= request.top_p
            is_out[0] = False  # even if top_p is 0 in fp32
            logits = logits.masked_fill(is_out.scatter(0, order, is_out), -torch.inf)
        return logits


def token_logprobs(logits: torch.Tensor, token: int, count: int) -> TokenLogprobs:
    """Log-probabilities of `token` and of the `count` likeliest, from the (vocabulary,) logits."""
    logprobs = logits.float().log_softmax(-1)
    values, tokens = logprobs.topk(min(count, len(logprobs)))
    pairs = zip(tokens.tolist(), values.tolist(), strict=True)
    top = {other: value for other, value in pairs if value > -torch.inf}
    return TokenLogprobs(token_id=token, logprob=float(logprobs[token]), top=top)
