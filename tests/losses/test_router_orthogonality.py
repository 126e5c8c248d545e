"""Router orthogonality against a float64 loop written from the definition, and the properties that are promised.

Suffixes: T tokens, k experts of a token, F activation width, E experts of a layer, H hidden size.
"""

import math

import pytest
import torch
from gradients import value_and_gradient

from megatron_moe_spec.losses import (
    router_orthogonality_loss,
)


def router_orthogonality_by_loops(router_EH, kind: str) -> float:
    total = 0.0
    for i, row in enumerate(router_EH.tolist()):
        for j, other in enumerate(router_EH.tolist()):
            product = sum(x * y for x, y in zip(row, other))
            if kind == "squared":
                lengths = math.sqrt(sum(x * x for x in row)) * math.sqrt(sum(y * y for y in other))
                product = product / lengths if lengths else 0.0
            difference = product - (i == j)
            total += difference**2 if kind == "squared" else abs(difference)
    return total / len(router_EH) ** 2 if kind == "squared" else total


@pytest.mark.parametrize("kind", ["squared", "absolute"])
@pytest.mark.parametrize("num_experts", [1, 2, 7])
def test_router_orthogonality_equals_its_definition(random, num_experts, kind):
    router = random(num_experts, 5)
    value = router_orthogonality_loss(router, kind)
    assert value.dtype == torch.float64
    assert float(value) == pytest.approx(router_orthogonality_by_loops(router, kind), rel=1e-12, abs=1e-15)
    assert torch.autograd.gradcheck(lambda w: router_orthogonality_loss(w, kind), router.requires_grad_())


@pytest.mark.parametrize("kind", ["squared", "absolute"])
def test_orthonormal_routers_have_no_loss(kind):
    assert float(router_orthogonality_loss(torch.eye(4, 6), kind)) == 0.0
    # Equal rows of length 1: of 9 entries, the 6 off the diagonal are 1.
    equal = torch.ones(3, 1) * torch.eye(1, 4)
    assert float(router_orthogonality_loss(equal, kind)) == pytest.approx({"squared": 6 / 9, "absolute": 6.0}[kind])


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_squared_router_orthogonality_does_not_see_lengths(random, scale):
    router = random(6, 8).float()
    value, gradient = value_and_gradient(router_orthogonality_loss, router * scale)
    expected, expected_gradient = value_and_gradient(router_orthogonality_loss, router)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(gradient * scale, expected_gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["squared", "absolute"])
def test_router_orthogonality_ignores_the_order_of_experts_and_of_components(random, kind):
    router = random(6, 5)
    expected = float(router_orthogonality_loss(router, kind))
    shuffled = router[torch.tensor([3, 0, 5, 1, 4, 2])].flip(1)
    assert float(router_orthogonality_loss(shuffled, kind)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["squared", "absolute"])
def test_a_zero_row_of_a_router_gets_a_finite_gradient(random, kind):
    router = random(4, 5)
    router[1] = 0.0
    value, gradient = value_and_gradient(lambda w: router_orthogonality_loss(w, kind), router)
    assert float(value) == pytest.approx(router_orthogonality_by_loops(router, kind), rel=1e-12)
    assert torch.isfinite(gradient).all() and not gradient[1].any() and gradient.norm() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["squared", "absolute"])
def test_router_orthogonality_of_half_precision_accumulates_in_fp32(random, dtype, kind):
    router = random(16, 300).to(dtype)
    value = router_orthogonality_loss(router, kind)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(router_orthogonality_loss(router.double(), kind)), rel=1e-5)


def test_router_orthogonality_names_the_bad_argument(random):
    with pytest.raises(ValueError, match="kind must be squared or absolute; got 'cubed'"):
        router_orthogonality_loss(random(3, 4), "cubed")
    for weight in (random(3), random(2, 3, 4), torch.ones(2, 3, dtype=torch.int64)):
        with pytest.raises(ValueError, match="router_weight must be a floating-point tensor"):
            router_orthogonality_loss(weight)
