"""Score variance against a float64 loop written from the definition, and the properties that are promised.

Suffixes: T tokens, k experts of a token, F activation width, E experts of a layer, H hidden size.
"""

import pytest
import torch
from gradients import value_and_gradient

from megatron_moe_spec.losses import (
    score_variance_loss,
)


def variance_by_loops(scores_TE) -> float:
    total = 0.0
    for column in scores_TE.double().T.tolist():
        mean = sum(column) / len(column)
        total += sum((s - mean) ** 2 for s in column)
    return -total / scores_TE.numel()


@pytest.mark.parametrize("num_tokens", [1, 2, 9])
def test_score_variance_equals_its_definition(random, num_tokens):
    scores = torch.softmax(3.0 * random(num_tokens, 6), dim=-1)
    value = score_variance_loss(scores)
    assert value.dtype == torch.float64
    assert float(value) == pytest.approx(variance_by_loops(scores), rel=1e-12, abs=1e-15)
    assert torch.autograd.gradcheck(score_variance_loss, scores.requires_grad_())


def test_score_variance_of_equal_and_of_opposed_tokens():
    assert float(score_variance_loss(torch.full((5, 4), 0.25))) == 0.0
    # Half the tokens give all to one of two experts: the largest variance that a score can have, 1/4.
    assert float(score_variance_loss(torch.eye(2).repeat(3, 1))) == pytest.approx(-0.25)
    assert float(score_variance_loss(torch.tensor([[0.1, 0.9]]))) == 0.0, "one token does not vary"


def test_score_variance_ignores_order_and_offset(random):
    scores = torch.softmax(random(8, 5), dim=-1)
    expected = float(score_variance_loss(scores))
    assert float(score_variance_loss(scores.flip(0).flip(1))) == pytest.approx(expected, rel=1e-12)
    assert float(score_variance_loss(scores + random(5))) == pytest.approx(expected, rel=1e-12)


def test_score_variance_of_no_tokens():
    value, gradient = value_and_gradient(score_variance_loss, torch.zeros(0, 4))
    assert float(value) == 0.0 and gradient.shape == (0, 4)


def test_score_variance_of_half_precision_accumulates_in_fp32(random):
    scores = torch.softmax(random(600, 16), dim=-1).bfloat16()
    value = score_variance_loss(scores)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(score_variance_loss(scores.double())), rel=1e-4)
