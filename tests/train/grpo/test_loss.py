"""The terms of the loss, by formulas written out for single tokens."""

import math

import pytest
import torch

from flashvl.train.grpo.loss import (
    adjust_logits,
    divergences,
    entropies_of,
    importance_ratios,
    mean_by_completion,
    token_losses,
)


def test_an_update_pushes_by_the_advantage() -> None:
    """At the start of an update the ratio is 1: the loss is -A, and so is its gradient."""
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    advantages = torch.tensor([1.5, -0.5, 0.0])
    losses = token_losses(logprobs, advantages, epsilon=0.2)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([-1.5, 0.5, 0.0])
    assert logprobs.grad.tolist() == pytest.approx([-1.5, 0.5, 0.0])


def test_the_correction_weighs_tokens_up_to_a_cap() -> None:
    logprobs = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    ratios = importance_ratios(logprobs, torch.tensor([-1.0, -0.5, -5.0]), cap=3.0)
    assert ratios.tolist() == pytest.approx([1.0, math.exp(-0.5), 3.0])
    assert not ratios.requires_grad
    losses = token_losses(logprobs, torch.ones(3), epsilon=0.2, importance=ratios)
    assert losses.tolist() == pytest.approx([-1.0, -math.exp(-0.5), -3.0])


def test_the_divergence_has_the_gradient_of_the_divergence_itself() -> None:
    """Over all tokens, weighed by their probabilities, values and gradients are those of KL."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_()
    reference = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    exact = (logprobs.exp() * (logprobs - reference)).sum()
    (wanted,) = torch.autograd.grad(exact, logits, retain_graph=True)
    expected = (logprobs.detach().exp() * divergences(logprobs, reference)).sum()
    (found,) = torch.autograd.grad(expected, logits)
    assert float(expected) == pytest.approx(float(exact))
    assert torch.allclose(found, wanted)


def test_the_placeholder_has_no_part_in_the_distribution() -> None:
    logits = torch.tensor([[0.0, 9.0, 0.7]])
    adjusted = adjust_logits(logits, image_token_id=1, temperature=0.5)
    truth = torch.tensor([[0.0, 1.4]]).softmax(-1)
    assert adjusted.softmax(-1)[0, [0, 2]].tolist() == pytest.approx(truth[0].tolist())
    assert float(adjusted.softmax(-1)[0, 1]) == 0
    entropy = -(truth * truth.log()).sum()
    assert float(entropies_of(adjusted)) == pytest.approx(float(entropy))


def test_each_completion_counts_by_the_mean_of_its_tokens() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 10.0])
    means = mean_by_completion(values, torch.tensor([0, 0, 0, 2]), count=3)
    assert means.tolist() == [2.0, 0.0, 10.0]
