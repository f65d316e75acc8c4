"""From logits to the next token of each request, for all rows of a batch at once."""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence

import torch

from flashvl.engine.request import Request, TokenLogprobs

RANDOM_BITS = 24
"""Bits of a random number, as many as fp32 holds: multiplied by a sum it stays below the sum."""


class Sampler:
    """What one request asks of its tokens; holds its random numbers and counts its tokens."""

    def __init__(self, request: Request, prompt: Sequence[int], end_token_ids: Sequence[int]):
        self.request = request
        self.end_token_ids = list(end_token_ids)
        self.prompt = set(prompt) if request.repetition_penalty != 1 else set()
        self.said: Counter[int] = Counter()
        """Token -> how often the answer holds it."""
        self.random = random.Random(request.seed)
        self.has_penalties = bool(
            request.repetition_penalty != 1 or request.presence_penalty or request.frequency_penalty
        )
        self.adjusts = bool(self.has_penalties or request.logit_bias or request.min_new_tokens)
        """Whether `adjust` may change the logits."""

    def adjust(self, logits: torch.Tensor, num_new_tokens: int) -> None:
        """Change the fp32 logits, (vocabulary,), of an answer of `num_new_tokens` tokens, in place.

        The steps are in vLLM's order: least length, biases, penalties.
        """
        request = self.request
        if num_new_tokens < request.min_new_tokens:
            logits[[*self.end_token_ids, *request.stop_token_ids]] = -torch.inf
        if request.logit_bias:
            biases = torch.tensor(list(request.logit_bias.values()), device=logits.device)
            logits[list(request.logit_bias)] += biases
        if request.repetition_penalty != 1:
            seen = sorted(self.prompt | self.said.keys())
            penalty, held = request.repetition_penalty, logits[seen]
            logits[seen] = torch.where(held > 0, held / penalty, held * penalty)
        if self.has_penalties and self.said:
            counts = torch.tensor(list(self.said.values()), device=logits.device)
            logits[list(self.said)] -= counts * request.frequency_penalty + request.presence_penalty

    def uniform(self) -> float:
        """The request's next random number: at least 0, below 1, and exact in fp32."""
        return self.random.getrandbits(RANDOM_BITS) / 2**RANDOM_BITS


def choose_tokens(
    samplers: Sequence[Sampler], logits: torch.Tensor, lengths: Sequence[int]
) -> list[int | None]:
    """The next token of each answer; a row's token does not depend on the other rows.

    Args:
        logits: (rows, vocabulary); -inf for tokens that are not admitted.
        lengths: tokens that each answer has.

    Returns:
        The tokens' ids; None if an answer must not end yet and no other token is admitted.
    """
    adjusted = [row for row, sampler in enumerate(samplers) if sampler.adjusts]
    if adjusted:
        logits = logits.float().clone()
        for row in adjusted:
            samplers[row].adjust(logits[row], lengths[row])
    best, tokens = logits.max(-1)
    drawn = [row for row, sampler in enumerate(samplers) if sampler.request.temperature]
    if drawn:
        chosen = [samplers[row] for row in drawn]
        if len(drawn) == len(samplers):
            tokens = _draw(chosen, logits, tokens)
        else:
            tokens[drawn] = _draw(chosen, logits[drawn], tokens[drawn])
    pairs = zip(best.tolist(), tokens.tolist(), strict=True)
    found = [None if value == -torch.inf else token for value, token in pairs]
    for sampler, token in zip(samplers, found, strict=True):
        if sampler.has_penalties and token is not None:
            sampler.said[token] += 1
    return found


def _draw(
    samplers: Sequence[Sampler], logits: torch.Tensor, likeliest: torch.Tensor
) -> torch.Tensor:
    """A token for each of the (rows, vocabulary) logits, drawn with the rows' random numbers.

    The token is the first at which the sum of the probabilities exceeds the random number.
    """
    device = logits.device
    temperatures = [sampler.request.temperature for sampler in samplers]
    scaled = logits.float() / torch.tensor(temperatures, device=device)[:, None]
    uniform = torch.tensor([sampler.uniform() for sampler in samplers], device=device)[:, None]
    alike: dict[int | None, list[int]] = defaultdict(list)
    for row, sampler in enumerate(samplers):
        alike[_num_ordered(sampler.request)].append(row)
    tokens = torch.empty_like(likeliest)
    for num_ordered, rows in alike.items():
        part = scaled if len(alike) == 1 else scaled[rows]
        values, order = admit(part, [samplers[row].request for row in rows], num_ordered)
        probabilities = values.softmax(-1)
        sums = probabilities.cumsum(-1)
        places = torch.searchsorted(sums, uniform[rows] * sums[:, -1:], right=True)
        places.clamp_(max=sums.shape[1] - 1)
        found = places if order is None else order.gather(1, places)
        # Where sums of a GPU are not quite in order, the place may be of a token that is left out.
        is_in = probabilities.gather(1, places) > 0
        tokens[rows] = torch.where(is_in, found, likeliest[rows][:, None])[:, 0]
    return tokens


def _num_ordered(request: Request) -> int | None:
    """Tokens that must be put into order of their probability; 0: all; None: none."""
    return request.top_k if request.top_k or request.top_p < 1 else None


def admit(
    logits: torch.Tensor, requests: Sequence[Request], num_ordered: int | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Leave out the tokens that `min_p`, then `top_k`, then `top_p` exclude.

    Args:
        logits: (rows, vocabulary), divided by the temperature.
        num_ordered: the `top_k` of all rows, 0 for none; None: no row has `top_k` or `top_p`.

    Returns:
        The logits, -inf for tokens that are left out, and these tokens' ids; None: the logits are
        in the order of the vocabulary.
    """
    if num_ordered is None:
        values, order = logits, None
    elif num_ordered:
        values, order = logits.topk(min(num_ordered, logits.shape[-1]))
    else:
        values, order = logits.sort(descending=True, stable=True)
    min_p = torch.tensor([request.min_p for request in requests], device=logits.device)
    if any(request.min_p for request in requests):
        least = values.max(-1).values + min_p.log()
        values = values.masked_fill(values < least[:, None], -torch.inf)
    if any(request.top_p < 1 for request in requests):
        top_p = torch.tensor([request.top_p for request in requests], device=logits.device)
        probabilities = values.softmax(-1)
        # Compares the mass before each token, so that the first token is always admitted.
        is_out = probabilities.cumsum(-1) - probabilities >= top_p[:, None]
        is_out &= (top_p < 1)[:, None]  # where rounding makes the mass before a token 1
        is_out[:, 0] = False  # even if top_p is 0 in fp32
        values = values.masked_fill(is_out, -torch.inf)
    return values, order


def token_logprobs(
    logits: torch.Tensor, tokens: Sequence[int], counts: Sequence[int]
) -> list[TokenLogprobs]:
    """Log-probabilities of each row's token and of its likeliest ones.

    Args:
        logits: (rows, vocabulary).
        counts: how many of the likeliest are told, for each row.
    """
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
    values, ids = logprobs.topk(min(max(counts), logits.shape[-1]))
    tops = zip(ids.tolist(), values.tolist(), strict=True)
    return [
        TokenLogprobs(
            token_id=token,
            logprob=value,
            top={
                other: its
                for other, its in zip(others[:count], their[:count], strict=True)
                if its > -torch.inf
            },
        )
        for token, value, count, (others, their) in zip(
            tokens, chosen.tolist(), counts, tops, strict=True
        )
    ]
