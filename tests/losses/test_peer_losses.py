"""The pure losses of other papers against float64 loops written from their definitions, and what they promise.

Suffixes: T tokens, k experts of a token, H hidden size, F gate width, E experts of a layer.
"""

import math

import pytest
import torch
from test_losses import value_and_gradient

from megatron_moe_spec.losses import (
    expert_router_coupling_loss,
    orthogonality_loss,
    router_noise,
    router_orthogonality_loss,
    score_variance_loss,
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


def variance_by_loops(scores_TE) -> float:
    total = 0.0
    for column in scores_TE.double().T.tolist():
        mean = sum(column) / len(column)
        total += sum((s - mean) ** 2 for s in column)
    return -total / scores_TE.numel()


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


# Orthogonality


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


# Score variance


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


# Router orthogonality


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


# Expert-router coupling


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


# Bad use

ROUTER, GATE = torch.ones(3, 4), torch.ones(3, 2, 4)


@pytest.mark.parametrize(
    "loss, arguments, name",
    [
        (orthogonality_loss, (torch.zeros(4, 3),), "x"),
        (orthogonality_loss, (torch.zeros(4, 2, 3, dtype=torch.long),), "x"),
        (orthogonality_loss, (torch.zeros(4, 1, 3),), "x"),
        (orthogonality_loss, (torch.zeros(4, 2, 3), torch.ones(4, 3, dtype=torch.bool)), "valid"),
        (orthogonality_loss, (torch.zeros(4, 2, 3), torch.ones(4, 2)), "valid"),
        (score_variance_loss, (torch.zeros(4),), "scores"),
        (score_variance_loss, (torch.zeros(4, 2, dtype=torch.long),), "scores"),
        (expert_router_coupling_loss, (ROUTER[0], GATE), "router_weight"),
        (expert_router_coupling_loss, (ROUTER.long(), GATE), "router_weight"),
        (expert_router_coupling_loss, (ROUTER[:1], GATE[:1]), "router_weight"),
        (expert_router_coupling_loss, (ROUTER, GATE[0]), "gate_weight"),
        (expert_router_coupling_loss, (ROUTER, GATE.long()), "gate_weight"),
        (expert_router_coupling_loss, (ROUTER, GATE[:2]), "gate_weight"),
        (expert_router_coupling_loss, (ROUTER, GATE[..., :3]), "gate_weight"),
        (expert_router_coupling_loss, (ROUTER, GATE, -0.5), "alpha"),
        (expert_router_coupling_loss, (ROUTER, GATE, math.nan), "alpha"),
        (expert_router_coupling_loss, (ROUTER, GATE, 1.0, ROUTER[:2]), "noise"),
        (expert_router_coupling_loss, (ROUTER, GATE, 1.0, ROUTER.long()), "noise"),
        (router_noise, (ROUTER[:1], 0), "router_weight"),
    ],
)
def test_bad_argument_is_named(loss, arguments, name):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        loss(*arguments)
