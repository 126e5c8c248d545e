"""Scores of a router against float64 loops written from their definition, and the properties that are promised.

Suffixes: T tokens, k experts of a token, F activation width, E experts of a layer, H hidden size.
"""

import math

import pytest
import torch
from gradients import value_and_gradient

from megatron_moe_spec.losses.scores import normalized_scores, normalized_scores_gradient


def scores_by_loops(row, score_function) -> list[float]:
    if score_function == "softmax":
        highest = max(row)
        raw = [math.exp(x - highest) for x in row]
    elif score_function == "sigmoid":
        raw = [1 / (1 + math.exp(-x)) for x in row]
    else:
        raw = [math.sqrt(math.log1p(math.exp(x))) for x in row]
    return [x / sum(raw) for x in raw]


FUNCTIONS = pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrtsoftplus"])


@FUNCTIONS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, -25.0, 25.0])
def test_scores_equal_their_definition(random, score_function, dtype, offset):
    logits = (3 * random(7, 6) + offset).to(dtype)
    scores = normalized_scores(logits, score_function)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = torch.tensor([scores_by_loops(row, score_function) for row in logits.tolist()], dtype=torch.float64)
    rtol = 1e-7 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(scores.double(), expected, rtol=rtol, atol=0)
    torch.testing.assert_close(scores.sum(dim=-1), torch.ones_like(scores[:, 0]), rtol=0, atol=1e-6)


@FUNCTIONS
def test_closed_form_gradient_of_scores(random, score_function):
    logits, upstream = random(7, 6), random(7, 6)
    _, expected = value_and_gradient(lambda x: (normalized_scores(x, score_function) * upstream).sum(), logits)
    torch.testing.assert_close(normalized_scores_gradient(logits, score_function, upstream), expected)
    assert torch.autograd.gradcheck(lambda x: normalized_scores(x, score_function), logits.requires_grad_())


def test_unknown_score_function():
    with pytest.raises(ValueError, match="score_function.*relu"):
        normalized_scores(torch.zeros(2, 3), "relu")
