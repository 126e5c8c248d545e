"""The exchange of rows between the ranks of experts and of tokens: their order, their number, and fp8."""

import itertools

import pytest
import torch
from forks import ranks

from megatron_moe_spec.losses import specialization_loss
from megatron_moe_spec.parallel.row_exchange import FP8, Pending, RowExchange, dequantized, quantized
from megatron_moe_spec.parallel.row_indices import rows_by_source


@pytest.mark.slow
def test_rows_come_to_their_tokens_and_go_back():
    """For every dispatcher and random maps, and in fp8; with the number of host synchronisations."""
    ranks(4, "row_exchanges.py")


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (1, 1), (4, 1), (1, 4)])
def test_order_by_source(shape):
    for seed in range(20):
        sizes = torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(seed))
        places = itertools.product(*map(range, shape))
        sources = [place[-1] for place in places for _ in range(sizes[place])]
        expected = sorted(range(len(sources)), key=lambda row: sources[row])
        assert rows_by_source(sizes, len(sources))[0].tolist() == expected


def test_every_number_of_e4m3_survives():
    numbers = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    row = numbers[numbers.isfinite()]
    for scale in (1.0, 3.0, 2.0**-100, 2.0**100):
        found = dequantized(quantized((row * scale).view(1, -1)), torch.float32)
        torch.testing.assert_close(found, (row * scale).view(1, -1), rtol=1e-6, atol=0)


def test_rounding_is_to_the_nearest():
    numbers = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    numbers = numbers[numbers.isfinite()].unique()
    x = torch.cat([torch.tensor([448.0]), torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 50])
    found = dequantized(quantized(x.view(1, -1)), torch.float32)[0]
    nearest = (x.view(-1, 1) - numbers).abs().amin(dim=1)
    torch.testing.assert_close((x - found).abs(), nearest, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_of_zeros_tiny_huge_and_not_finite(dtype):
    limits = torch.finfo(dtype)
    largest = min(limits.max, torch.finfo(torch.float32).max)
    x = torch.tensor([[0, 0, 0], [1, 2, limits.tiny], [largest, -largest, 0], [torch.inf, 1, 0], [torch.nan, 1, 0]])
    x = torch.cat([x.to(dtype), torch.full((1, 3), max(limits.tiny, 1e-37), dtype=dtype)])
    bytes_PQ = quantized(x)
    assert bytes_PQ.dtype == torch.uint8 and bytes_PQ.shape == (6, 7)
    found = dequantized(bytes_PQ, dtype)
    assert found.dtype == dtype
    assert found[3:5].isnan().all()
    assert torch.equal(found[0], x[0])
    torch.testing.assert_close(found[[1, 2, 5]], x[[1, 2, 5]], rtol=2**-4, atol=2.0 / 448 / 2**9)


def test_gradient_of_specialization_in_fp8():
    """Rows and gradients both: noise/signal some 0.001, and a slope against the exact gradient of some 0.998."""
    random = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, 300, 8, 768, generator=random)
    shared = torch.randn(300, 1, 768, generator=random)
    z = (torch.nn.functional.silu(1.5 * gate) * up + 0.3 * shared).to(torch.bfloat16)

    def gradient(z):
        z = z.double().requires_grad_()
        return torch.autograd.grad(specialization_loss(z), z)[0]

    def sent(x):
        return dequantized(quantized(x.flatten(0, 1)), torch.bfloat16).view(x.shape)

    exact = gradient(z)
    found = sent(gradient(sent(z)).to(torch.bfloat16)).double()
    assert (found - exact).square().sum() / exact.square().sum() < 0.002
    assert (found * exact).sum() / exact.square().sum() == pytest.approx(0.998, abs=0.001)


def test_options():
    with pytest.raises(ValueError, match="same, fp8; got 'fp4'"):
        RowExchange(None, 0, [0], [0], None, "fp4")
    with pytest.raises(RuntimeError, match="of 2 rows of experts, 1 are"):
        RowExchange(None, 2, [1], [1], None)
    pending = Pending(lambda: 3)
    assert pending.wait() == 3
    with pytest.raises(RuntimeError, match="before"):
        pending.wait()
