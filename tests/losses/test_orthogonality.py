"""Orthogonality against a float64 loop written from the definition, and the properties that are promised.

Suffixes: T tokens, k experts of a token, F activation width, E experts of a layer, H hidden size.
"""

import math

import pytest
import torch
from gradients import value_and_gradient

from megatron_moe_spec.losses import (
    orthogonality_loss,
)
from megatron_moe_spec.losses.orthogonality import Orthogonality
from megatron_moe_spec.losses.vectors import inverse, mixed, mixing_of, pair_cosines, unit_vectors


def orthogonality_by_loops(x_TkH, valid_Tk=None) -> float:
    num_tokens, k, _ = x_TkH.shape
    total = 0.0
    for t, token in enumerate(x_TkH.double().tolist()):
        alive = [e for e in range(k) if valid_Tk is None or valid_Tk[t, e]]
        for j in alive:
            for v in alive:
                square = sum(x * x for x in token[v])
                if v != j and square > 0:
                    factor = sum(x * y for x, y in zip(token[j], token[v])) / square
                    total += sum((factor * x) ** 2 for x in token[v])
    return total / (num_tokens * k * (k - 1))


@pytest.mark.parametrize("k", [2, 3, 6])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_orthogonality_equals_its_definition(random, num_tokens, k):
    x = random(num_tokens, k, 4)
    valid = random(num_tokens, k) > -0.3
    for mask in (None, valid):
        value = orthogonality_loss(x, mask)
        assert value.dtype == torch.float64
        assert float(value) == pytest.approx(orthogonality_by_loops(x, mask), rel=1e-12)
        assert torch.autograd.gradcheck(lambda x: orthogonality_loss(x, mask), x.clone().requires_grad_())


def test_orthogonality_of_worked_examples():
    """Parallel outputs of lengths 2 and 3 project onto each other whole, (4 + 9) / 2; orthogonal ones not at all."""
    assert float(orthogonality_loss(torch.tensor([[[2.0, 0.0], [-3.0, 0.0]]]))) == pytest.approx(6.5)
    assert float(orthogonality_loss(torch.tensor([[[2.0, 0.0], [0.0, 5.0]]]))) == 0.0


def test_orthogonality_grows_with_the_square_of_the_lengths(random):
    x = random(7, 3, 5)
    assert float(orthogonality_loss(3.0 * x)) == pytest.approx(9.0 * float(orthogonality_loss(x)), rel=1e-12)


def test_orthogonality_ignores_order_rotation_and_sign(random):
    x, valid = random(9, 4, 6), random(9, 4) > -0.5
    expected = float(orthogonality_loss(x, valid))
    order = torch.tensor([2, 0, 3, 1])
    assert float(orthogonality_loss(x[:, order].flip(0), valid[:, order].flip(0))) == pytest.approx(expected, rel=1e-12)
    assert float(orthogonality_loss(x @ torch.linalg.qr(random(6, 6)).Q, valid)) == pytest.approx(expected, rel=1e-12)
    assert float(orthogonality_loss(x * random(9, 4, 1).sign(), valid)) == pytest.approx(expected, rel=1e-12)


def test_orthogonality_of_zero_outputs_is_zero_and_sends_no_gradient(random):
    x = random(4, 3, 6)
    x[0] = 0.0
    x[1, 1] = 0.0
    value, gradient = value_and_gradient(orthogonality_loss, x)
    assert float(value) == pytest.approx(orthogonality_by_loops(x), rel=1e-12)
    assert gradient[0].abs().max() == 0.0
    # The projection of the zero output on the others grows with its square: no slope at 0.
    assert gradient[1, 1].abs().max() == 0.0 and gradient[1, 0].norm() > 1e-4


def test_orthogonality_of_tokens_without_a_pair(random):
    x, valid = random(4, 2, 3), torch.tensor([[True, True], [True, False], [False, False], [True, True]])
    value, gradient = value_and_gradient(lambda x: orthogonality_loss(x, valid), x)
    assert float(value) == pytest.approx(orthogonality_by_loops(x[[0, 3]]) / 2, rel=1e-12)
    assert gradient[1:3].abs().max() == 0.0


@pytest.mark.parametrize("garbage", [7.0, 1e38, math.inf, math.nan])
def test_content_of_invalid_slots_does_not_matter(random, garbage):
    x, valid = random(6, 4, 5).float(), random(6, 4) > 0
    filled = x.masked_fill(~valid.unsqueeze(-1), garbage)
    for one, other in zip(*(value_and_gradient(lambda x: orthogonality_loss(x, valid), y) for y in (x, filled))):
        assert torch.equal(one, other)


def test_orthogonality_of_no_tokens():
    value, gradient = value_and_gradient(orthogonality_loss, torch.zeros(0, 2, 4))
    assert float(value) == 0.0 and gradient.shape == (0, 2, 4)


@pytest.mark.parametrize("scale", [1e-18, 1e-12, 1e12, 1e18])
def test_orthogonality_of_small_and_huge_outputs_in_fp32(random, scale):
    x = random(16, 3, 10).float()
    value, gradient = value_and_gradient(orthogonality_loss, x)
    scaled_value, scaled_gradient = value_and_gradient(orthogonality_loss, x * scale)
    torch.testing.assert_close(scaled_gradient / scale, gradient, rtol=1e-4, atol=1e-6)
    assert float(scaled_value) == pytest.approx(float(value) * scale**2, rel=1e-4)


def test_a_tiny_output_still_has_a_direction(random):
    """The projection on it depends on its direction alone, though the square of its length is 0 in fp32."""
    x = random(5, 2, 6).float()
    tiny = x * torch.tensor([1.0, 1e-30])[None, :, None]
    along = (x[:, 0] * torch.nn.functional.normalize(x[:, 1], dim=-1)).sum(dim=-1).square().mean() / 2
    assert float(orthogonality_loss(tiny)) == pytest.approx(float(along), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_orthogonality_of_half_precision_accumulates_in_fp32(random, dtype):
    x = random(300, 4, 50).to(dtype)
    value, gradient = value_and_gradient(orthogonality_loss, x)
    exact, exact_gradient = value_and_gradient(orthogonality_loss, x.double())
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    assert float(value) == pytest.approx(float(exact), rel=1e-5)
    spacing = 2.0**-24 if dtype == torch.float16 else 0.0
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=2 * torch.finfo(dtype).eps, atol=spacing + 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_mixing_is_the_gradient_of_orthogonality(random, scale, dtype):
    """Of cosines and lengths by autograd, of the vectors by mixing their directions, as the taps do it."""
    x, valid = (scale * random(8, 4, 6)).to(dtype), random(8, 4) > -1.0
    x[0, 1] = 0.0
    value, gradient = value_and_gradient(lambda x: orthogonality_loss(x, valid), x)
    units, inverse_lengths = unit_vectors(x, valid)
    cosines, lengths = pair_cosines(units).requires_grad_(), inverse(inverse_lengths).requires_grad_()
    loss = Orthogonality().token_losses(cosines, lengths, valid).sum() / 8
    torch.testing.assert_close(loss, value)
    mixing = mixing_of(cosines.detach(), lengths.detach(), *torch.autograd.grad(loss, (cosines, lengths)))
    close = dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else {}
    torch.testing.assert_close(mixed(mixing, units, inverse_lengths) / scale, gradient / scale, **close)
