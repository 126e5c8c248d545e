"""Specialization against a float64 loop written from the definition, and the properties that are promised.

Suffixes: T tokens, k experts of a token, F activation width, E experts of a layer, H hidden size.
"""

import math

import pytest
import torch
from gradients import value_and_gradient

from megatron_moe_spec.losses import (
    specialization_loss,
)


def specialization_by_loops(z_TkF, valid_Tk=None) -> float:
    num_tokens, k, _ = z_TkF.shape
    total = 0.0
    for t, token in enumerate(z_TkF.double().tolist()):
        alive = [e for e in range(k) if valid_Tk is None or valid_Tk[t, e]]
        for i, e in enumerate(alive):
            for v in alive[i + 1 :]:
                dot = sum(x * y for x, y in zip(token[e], token[v]))
                lengths = math.hypot(*token[e]) * math.hypot(*token[v])
                total += (dot / lengths) ** 2 if lengths > 0 else 0.0
    return 2.0 * total / (num_tokens * k * (k - 1))


@pytest.mark.parametrize("k", range(2, 9))
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_specialization_equals_its_definition(random, num_tokens, k):
    z = random(num_tokens, k, 5)
    valid = random(num_tokens, k) > -0.3
    for mask in (None, valid):
        value = specialization_loss(z, mask)
        assert value.dtype == torch.float64
        assert float(value) == pytest.approx(specialization_by_loops(z, mask), rel=1e-12)
        assert torch.autograd.gradcheck(lambda x: specialization_loss(x, mask), z.clone().requires_grad_())


def test_specialization_is_one_for_parallel_and_zero_for_orthogonal_experts(random):
    factors = torch.tensor([2.0, -0.5, 3.0, 1e-3], dtype=torch.float64)
    parallel = factors[None, :, None] * random(6, 1, 8)
    assert float(specialization_loss(parallel)) == pytest.approx(1.0, rel=1e-12)
    orthogonal = torch.linalg.qr(random(6, 8, 8)).Q[:, :4] * factors[None, :, None]
    assert float(specialization_loss(orthogonal)) == pytest.approx(0.0, abs=1e-12)
    assert 0.0 < float(specialization_loss(random(6, 4, 8))) < 1.0


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e18, 1e30])
def test_specialization_ignores_positive_scale_in_fp32(random, scale):
    z = random(16, 3, 10).float()
    factors = scale * (0.5 + torch.rand(16, 3, 1, generator=torch.Generator().manual_seed(1)))
    value, gradient = value_and_gradient(specialization_loss, z)
    scaled_value, scaled_gradient = value_and_gradient(specialization_loss, z * factors)
    assert float(scaled_value) == pytest.approx(float(value), rel=1e-5)
    assert torch.isfinite(scaled_gradient).all()
    torch.testing.assert_close(scaled_gradient * factors, gradient, rtol=1e-4, atol=1e-7)


def test_specialization_ignores_scales_that_differ_within_a_token(random):
    z = random(5, 3, 6).float()
    factors = torch.tensor([1e-30, 1.0, 1e30])[None, :, None]
    assert float(specialization_loss(z * factors)) == pytest.approx(float(specialization_loss(z)), rel=1e-5)


def test_specialization_gradient_is_orthogonal_to_each_vector(random):
    z = random(9, 4, 12)
    _, gradient = value_and_gradient(specialization_loss, z)
    cosine = torch.cosine_similarity(gradient, z, dim=-1)
    assert gradient.norm(dim=-1).min() > 1e-4
    torch.testing.assert_close(cosine, torch.zeros_like(cosine), rtol=0, atol=1e-10)


@pytest.mark.parametrize("k", [2, 8])
def test_the_coefficient_of_a_sum_over_ordered_pairs_is_k_k_1_times_that_of_the_mean(random, k):
    z = random(7, k, 5)
    cosines = torch.nn.functional.cosine_similarity(z[:, :, None], z[:, None], dim=-1)
    summed = sum(float(cosines[t, e, v]) ** 2 for t in range(7) for e in range(k) for v in range(k) if e != v) / 7
    assert 2e-3 * k * (k - 1) * float(specialization_loss(z)) == pytest.approx(2e-3 * summed, rel=1e-12)


@pytest.mark.parametrize("k, dtype", [(2, torch.float64), (2, torch.float32), (8, torch.float64)])
def test_copies_of_an_expert_get_a_gradient_that_grows_with_their_noise(random, k, dtype):
    """Upcycled experts: the squared cosine is stationary at 1."""
    base, noise = random(64, 1, 1024), random(64, k, 1024)

    def gradient_norm(z):
        z = z.to(dtype)
        value, gradient = value_and_gradient(specialization_loss, z)
        # Of a vector of length 1, for each token: at most 1 for k = 2.
        return float(value), float((64 * gradient.norm(dim=-1) * z.norm(dim=-1)).mean())

    _, independent = gradient_norm(noise)
    value, copies = gradient_norm(base.expand(-1, k, -1))
    assert value == pytest.approx(1.0, rel=1e-6)
    assert copies < 10 * torch.finfo(dtype).eps
    noisy = [gradient_norm(base + relative * noise)[1] for relative in (1e-3, 1e-2, 1e-1)]
    ratios = [one / independent for one in (copies, *noisy)]
    print(f"gradient over that of independent vectors, k = {k}:", *(f"{ratio:.2g}" for ratio in ratios))
    assert ratios == sorted(ratios)
    assert noisy[1] == pytest.approx(10 * noisy[0], rel=0.01)  # in proportion to the noise, while that is small
    if k == 2:  # sin(2 angle), as docs/guide.md has it
        assert [float(f"{one:.1g}") for one in noisy[:2]] + [round(noisy[2], 2)] == [0.003, 0.03, 0.28]


def test_specialization_sends_no_gradient_to_router_probabilities(random):
    z, probs = random(9, 4, 12), torch.softmax(random(9, 4), dim=-1)
    _, gradient = value_and_gradient(lambda p: specialization_loss(p.unsqueeze(-1) * z), probs)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)


def test_specialization_ignores_order_of_experts_and_tokens(random):
    z, valid = random(11, 5, 6), random(11, 5) > -0.5
    slots = torch.stack([torch.randperm(5, generator=torch.Generator().manual_seed(t)) for t in range(11)])
    tokens = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    permuted_z = z.gather(1, slots.unsqueeze(-1).expand_as(z))[tokens]
    permuted_valid = valid.gather(1, slots)[tokens]
    expected = float(specialization_loss(z, valid))
    assert float(specialization_loss(permuted_z, permuted_valid)) == pytest.approx(expected, rel=1e-12)


def test_specialization_of_zero_vectors_is_zero_and_sends_no_gradient(random):
    z = random(4, 3, 6)
    z[0] = 0.0
    z[1, 1] = 0.0
    value, gradient = value_and_gradient(specialization_loss, z)
    assert float(value) == pytest.approx(specialization_by_loops(z), rel=1e-12)
    valid = z.abs().sum(dim=-1) > 0
    _, expected = value_and_gradient(lambda x: specialization_loss(x, valid), z)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)
    assert gradient[~valid].abs().max() == 0.0 and gradient[1, 0].norm() > 1e-4


def test_tokens_without_a_pair_add_nothing_and_count(random):
    z = random(8, 3, 6)
    valid = torch.ones(8, 3, dtype=torch.bool)
    valid[4:7] = torch.tensor([True, False, False])
    valid[7] = False
    value, gradient = value_and_gradient(lambda x: specialization_loss(x, valid), z)
    assert float(value) == pytest.approx(float(specialization_loss(z[:4])) / 2, rel=1e-12)
    assert gradient[4:].abs().max() == 0.0


@pytest.mark.parametrize("garbage", [7.0, 1e38, math.inf, math.nan])
def test_content_of_invalid_slots_does_not_matter(random, garbage):
    z, valid = random(6, 4, 5).float(), random(6, 4) > 0
    value, gradient = value_and_gradient(lambda x: specialization_loss(x, valid), z)
    filled = z.masked_fill(~valid.unsqueeze(-1), garbage)
    filled_value, filled_gradient = value_and_gradient(lambda x: specialization_loss(x, valid), filled)
    assert torch.equal(filled_value, value) and torch.equal(filled_gradient, gradient)


def test_specialization_of_no_tokens():
    value, gradient = value_and_gradient(specialization_loss, torch.zeros(0, 2, 4))
    assert float(value) == 0.0 and gradient.shape == (0, 2, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_specialization_of_half_precision_accumulates_in_fp32(random, dtype):
    z = random(600, 4, 100).to(dtype)
    value, gradient = value_and_gradient(specialization_loss, z)
    exact, exact_gradient = value_and_gradient(specialization_loss, z.double())
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    assert float(value) == pytest.approx(float(exact), rel=1e-5)
    # One rounding to the input's precision, or to the spacing of fp16's smallest numbers.
    spacing = 2.0**-24 if dtype == torch.float16 else 0.0
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=2 * torch.finfo(dtype).eps, atol=spacing + 1e-9)


@pytest.mark.parametrize(
    "arguments, name",
    [
        ((torch.zeros(4, 3),), "z"),
        ((torch.zeros(4, 2, 3, dtype=torch.long),), "z"),
        ((torch.zeros(4, 1, 3),), "z"),
        ((torch.zeros(4, 2, 3), torch.ones(4, 3, dtype=torch.bool)), "valid"),
        ((torch.zeros(4, 2, 3), torch.ones(4, 2)), "valid"),
    ],
)
def test_specialization_names_the_bad_argument(arguments, name):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        specialization_loss(*arguments)
