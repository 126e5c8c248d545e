"""Expert-router coupling against a float64 loop written from the definition, and the properties that are promised.

Suffixes: T tokens, k experts of a token, F activation width, E experts of a layer, H hidden size.
"""

import math

import pytest
import torch
from gradients import value_and_gradient

from megatron_moe_spec.losses import (
    expert_router_coupling_loss,
    router_noise,
)


def coupling_by_loops(router_EH, gate_EFH, alpha, noise_EH=None) -> float:
    router, gate = router_EH.double().tolist(), gate_EFH.double().tolist()
    noise = [[1.0] * len(row) for row in router] if noise_EH is None else noise_EH.double().tolist()
    num_experts = len(router)

    def norm(i, j):
        proxy = [r * d for r, d in zip(router[i], noise[i])]
        return math.hypot(*(sum(p * w for p, w in zip(proxy, row)) for row in gate[j]))

    total = 0.0
    for i in range(num_experts):
        for j in range(num_experts):
            if j != i:
                own = alpha * norm(i, i)
                total += max(norm(i, j) - own, 0.0) + max(norm(j, i) - own, 0.0)
    return total / num_experts**2


@pytest.mark.parametrize("alpha", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("num_experts", [2, 5])
def test_expert_router_coupling_equals_its_definition(random, num_experts, alpha):
    router, gate = random(num_experts, 7), random(num_experts, 4, 7) * torch.arange(1.0, num_experts + 1)[:, None, None]
    for noise in (None, router_noise(router, seed=3)):
        value = expert_router_coupling_loss(router, gate, alpha, noise)
        assert value.dtype == torch.float64 and float(value) > 0
        assert float(value) == pytest.approx(coupling_by_loops(router, gate, alpha, noise), rel=1e-12)
        assert torch.autograd.gradcheck(
            lambda r, w: expert_router_coupling_loss(r, w, alpha, noise),
            (router.clone().requires_grad_(), gate.clone().requires_grad_()),
        )


def test_coupled_experts_have_no_loss():
    """Each expert's gate answers its own router row only."""
    router = torch.eye(4)
    assert float(expert_router_coupling_loss(router, router.unsqueeze(1))) == 0.0
    swapped = float(expert_router_coupling_loss(router, router.flip(0).unsqueeze(1)))
    # Each row excites one other expert by 1 and each expert is excited by one other row: 2 * 4 / 16.
    assert swapped == pytest.approx(0.5)


def test_expert_router_coupling_ignores_the_order_of_experts_and_of_gate_rows(random):
    router, gate = random(6, 5), random(6, 4, 5)
    expected = float(expert_router_coupling_loss(router, gate))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert float(expert_router_coupling_loss(router[order], gate[order])) == pytest.approx(expected, rel=1e-12)
    assert float(expert_router_coupling_loss(router, gate.flip(1))) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_expert_router_coupling_is_proportional_to_both_weights(random, scale):
    router, gate = random(4, 5).float(), random(4, 3, 5).float()
    expected = scale * float(expert_router_coupling_loss(router, gate))
    assert float(expert_router_coupling_loss(router * scale, gate)) == pytest.approx(expected, rel=1e-5)
    assert float(expert_router_coupling_loss(router, gate * scale)) == pytest.approx(expected, rel=1e-5)


def test_zero_weights_send_finite_gradients(random):
    router, gate = random(4, 5), random(4, 3, 5)
    router[1] = 0.0
    gate[2] = 0.0
    for index, x in enumerate((router, gate)):
        arguments = [router, gate]
        value, gradient = value_and_gradient(
            lambda y: expert_router_coupling_loss(*arguments[:index], y, *arguments[index + 1 :]), x
        )
        assert float(value) == pytest.approx(coupling_by_loops(router, gate, 1.0), rel=1e-12)
        assert torch.isfinite(gradient).all() and gradient.norm() > 0


def test_expert_router_coupling_of_half_precision_accumulates_in_fp32(random):
    router, gate = random(8, 64).bfloat16(), random(8, 48, 64).bfloat16()
    value = expert_router_coupling_loss(router, gate)
    assert value.dtype == torch.float32
    exact = expert_router_coupling_loss(router.double(), gate.double())
    assert float(value) == pytest.approx(float(exact), rel=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_noise_keeps_every_proxy_nearest_to_its_own_row(seed):
    """Rows of very different lengths and distances, many of them close pairs."""
    generator = torch.Generator().manual_seed(seed)
    router = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    router *= 10.0 ** torch.randn(12, 1, generator=generator, dtype=torch.float64)
    router[6:9] = router[:3] * (1 + 0.05 * torch.randn(3, 6, generator=generator, dtype=torch.float64))
    proxies = router * router_noise(router, seed)
    distances = torch.cdist(proxies, router, compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(distances.argmin(dim=1), torch.arange(12))
    assert (proxies != router).any(dim=1).all()


def test_noise_reaches_its_bound(random):
    """Uniform on (1 - eps, 1 + eps), where eps is half the distance to the next row over the row's own length."""
    router = random(3, 20000)
    noise = router_noise(router, seed=0)
    for i, row in enumerate(router):
        nearest = min(float((row - other).norm()) for j, other in enumerate(router) if j != i)
        epsilon = nearest / (2 * float(row.norm()))
        largest = float((noise[i] - 1).abs().max())
        assert 0.99 * epsilon < largest <= epsilon
        assert float((noise[i] - 1).mean()) == pytest.approx(0.0, abs=0.02)
        assert float((noise[i] - 1).std()) == pytest.approx(epsilon / math.sqrt(3), rel=0.02)


def test_equal_rows_get_no_noise_and_zero_rows_no_error(random):
    router = random(5, 8).float()
    router[3] = router[1]
    router[4] = 0.0
    noise = router_noise(router, seed=0)
    assert (noise[[1, 3, 4]] == 1.0).all()
    assert (noise[[0, 2]] != 1.0).all() and torch.isfinite(noise).all()


def test_noise_depends_on_its_seed_alone(random):
    router = random(4, 8).float()
    before = torch.get_rng_state()
    noise = router_noise(router, seed=5)
    torch.rand(3)
    assert torch.equal(router_noise(router, seed=5), noise)
    assert not torch.equal(router_noise(router, seed=6), noise)
    torch.set_rng_state(before)
    router_noise(router.requires_grad_(), seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert not noise.requires_grad


def test_noise_is_taken_as_constant(random):
    router, gate = random(4, 6), random(4, 3, 6)
    noise = router_noise(router, seed=1).requires_grad_()
    value = expert_router_coupling_loss(router.requires_grad_(), gate, noise=noise)
    assert torch.autograd.grad(value, noise, allow_unused=True) == (None,)
