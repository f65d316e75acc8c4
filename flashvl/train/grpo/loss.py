"""The loss of GRPO, token by token, as TRL computes it with `loss_type="grpo"`."""

import torch

ROWS_AT_ONCE = 256
"""Tokens whose whole distributions are computed at once for their entropies, which saves memory."""


def adjust_logits(logits: torch.Tensor, image_token_id: int, temperature: float) -> torch.Tensor:
    """The logits of the distribution that the engine samples from, in fp32: divided by the
    temperature, and without the image's placeholder.

    Args:
        logits: (tokens, vocabulary); they may be changed, as they are large.
    """
    scaled = logits.float() / temperature if temperature != 1 else logits.float()
    # Not -inf: the entropy multiplies it by a probability of 0.
    scaled[:, image_token_id] = torch.finfo(scaled.dtype).min / 2
    return scaled


@torch.no_grad()
def entropies_of(logits: torch.Tensor) -> torch.Tensor:
    """(tokens,): entropy of each token's distribution, in nats."""
    return torch.cat([_entropies(part.log_softmax(-1)) for part in logits.split(ROWS_AT_ONCE)])


def _entropies(logprobs: torch.Tensor) -> torch.Tensor:
    return -(logprobs.exp() * logprobs).sum(-1)


def token_losses(
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    epsilon: float,
    importance: torch.Tensor | None = None,
) -> torch.Tensor:
    """(tokens,): the clipped policy loss of each token, without the penalty for the divergence.

    Args:
        logprobs: (tokens,), with gradients.
        advantages: (tokens,): that of each token's completion.
        importance: (tokens,): `importance_ratios`; None: no correction.
    """
    ratios = own_ratios(logprobs)
    clipped = ratios.clamp(1 - epsilon, 1 + epsilon)
    losses = -torch.minimum(ratios * advantages, clipped * advantages)
    return losses if importance is None else losses * importance


def own_ratios(logprobs: torch.Tensor) -> torch.Tensor:
    """(tokens,): probabilities after the update in relation to those before, which are the same as
    long as the completions are used for one update: 1, with gradients."""
    return (logprobs - logprobs.detach()).exp()


def importance_ratios(
    logprobs: torch.Tensor, sampled_logprobs: torch.Tensor, cap: float
) -> torch.Tensor:
    """(tokens,): how much likelier the trainer finds each token than the engine that sampled it, at
    most `cap` (truncated importance sampling); detached."""
    return (logprobs.detach() - sampled_logprobs).exp().clamp(max=cap)


def divergences(logprobs: torch.Tensor, reference_logprobs: torch.Tensor) -> torch.Tensor:
    """(tokens,): estimates of the KL divergence from the reference (Schulman's k3).

    They are weighed by `own_ratios`, as in DeepSeek-V3.2 (arXiv 2512.02556) and by default in TRL:
    the values stay, and the gradient becomes that of the divergence itself.
    """
    difference = reference_logprobs - logprobs
    return (difference.exp() - difference - 1) * own_ratios(logprobs)


def mean_by_completion(values: torch.Tensor, completions: torch.Tensor, count: int) -> torch.Tensor:
    """(completions,): the mean of each completion's tokens.

    Args:
        values: (tokens,).
        completions: (tokens,): number of each token's completion.
        count: number of completions.
    """
    sums = values.new_zeros(count).index_add(0, completions, values)
    lengths = torch.bincount(completions, minlength=count).clamp(min=1)
    return sums / lengths
