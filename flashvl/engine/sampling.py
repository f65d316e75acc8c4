"""From logits to the next token of each request."""

import torch

from flashvl.engine.request import Request, TokenLogprobs


class Sampler:
    """The choices of one request: its parameters, its random numbers, what it said before."""

    def __init__(self, request: Request, prompt: list[int], end_token_id: int):
        self.request = request
        self.end_token_id = end_token_id
        self.seen = set(prompt) if request.repetition_penalty != 1 else set()
        self.generator = torch.Generator().manual_seed(request.seed)
        self.is_plain = (
            request.temperature == 0
            and request.repetition_penalty == 1
            and not request.min_new_tokens
        )
        """The likeliest token is the next one, whatever came before."""

    def choose(self, logits: torch.Tensor, num_new_tokens: int) -> int:
        """The next token, given the (vocabulary,) logits, behind `num_new_tokens` of the answer."""
        request = self.request
        logits = logits.float().cpu().clone()
        if num_new_tokens < request.min_new_tokens:
            logits[self.end_token_id] = -torch.inf
        if request.repetition_penalty != 1:
            seen = torch.tensor(sorted(self.seen))
            penalty = request.repetition_penalty
            logits[seen] = torch.where(
                logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty
            )
        if request.temperature == 0:
            token = int(logits.argmax())
        else:
            probabilities = self._truncate(logits / request.temperature).softmax(-1)
            token = int(torch.multinomial(probabilities, 1, generator=self.generator))
        if request.repetition_penalty != 1:
            self.seen.add(token)
        return token

    def _truncate(self, logits: torch.Tensor) -> torch.Tensor:
        """-inf for all tokens but those that `top_k` and then `top_p` admit."""
        request = self.request
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
    top = dict(zip(tokens.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(token_id=token, logprob=float(logprobs[token]), top=top)
