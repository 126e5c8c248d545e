"""Cosines between the rows of each token, and gradients through them: the kernels against float64 and eager PyTorch.

Runs under Triton's interpreter on CPU; with TRITON_INTERPRET=0, on the GPU. Suffixes: P rows, F row size, T tokens, K
experts of a token.
"""

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, SHAPES, assert_no_further, covered_by, tokens_of_rows, work_of

pytest.importorskip("triton", reason="triton is not installed")

from megatron_moe_spec.kernels import cosines as row_kernels
from megatron_moe_spec.losses import orthogonality_loss, specialization_loss
from megatron_moe_spec.losses.vectors import inverse as inverse_of
from megatron_moe_spec.losses.vectors import mixed, mixing_of, packed, pair_cosines, unit_vectors, unpacked

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    # Numpy's, of the tests with infinite values.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


def row_cosines(z, rows):
    """[T, K, K] cosines, and inverse lengths."""
    cosines, inverse, _ = row_kernels.row_cosines(z, rows)
    return unpacked(cosines, rows.shape[1]), inverse


def mixing_of_squares(cosines):
    """That of the sum of the squared cosines over ordered pairs, whose gradient with respect to them is 2 cos."""
    no_lengths = torch.zeros_like(cosines[:, 0])
    return mixing_of(cosines, no_lengths, 2.0 * cosines, no_lengths)


def eager_vectors(z, rows):
    """Unit vectors and inverse lengths."""
    return unit_vectors(z[rows.clamp_min(0)], rows >= 0)


def eager_cosines(z, rows):
    units, inverse = eager_vectors(z, rows)
    return pair_cosines(units), inverse


def eager_gradient(z, rows, weight, incoming):
    """Incoming plus gradient, each rounded as the eager hooks round them."""
    units, inverse = eager_vectors(z, rows)
    gradient = mixed(mixing_of_squares(pair_cosines(units)), units, inverse) * weight
    valid = rows >= 0
    total = gradient.new_zeros(z.shape).index_add_(0, rows[valid], gradient[valid])
    return incoming + total.to(incoming.dtype)


def test_packed_and_unpacked(random):
    packed_cosines = torch.tensor([[1.0, 2.0, 3.0]])
    matrix = torch.tensor([[[0.0, 1.0, 2.0], [1.0, 0.0, 3.0], [2.0, 3.0, 0.0]]])
    assert torch.equal(unpacked(packed_cosines, 3), matrix)
    assert torch.equal(packed(matrix), packed_cosines)
    for num_tokens, k in ((0, 2), (3, 2), (2, 7), (4, 1)):
        cosines = random(num_tokens, k * (k - 1) // 2)
        assert unpacked(cosines, k).shape == (num_tokens, k, k)
        assert torch.equal(packed(unpacked(cosines, k)), cosines)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens, k, F, spare", SHAPES)
def test_cosines(random, dtype, num_tokens, k, F, spare):
    z = random(num_tokens * k + spare, F).to(DTYPES[dtype])
    rows, _ = tokens_of_rows(num_tokens, k, spare)
    cosines, inverse, squares = row_kernels.row_cosines(z, rows)
    eager, exact = eager_cosines(z, rows), eager_cosines(z.double(), rows)
    assert_no_further(cosines, packed(eager[0]), packed(exact[0]))
    assert_no_further(inverse, eager[1], exact[1])
    torch.testing.assert_close(squares.double().sum(), exact[0].square().sum(), rtol=1e-4, atol=1e-5)
    tokens_of_a_tile = max(16 // (1 << (k - 1).bit_length()), 1)
    assert squares.shape == (-(-num_tokens // tokens_of_a_tile),)
    for tile, part in zip(squares, cosines.split(tokens_of_a_tile), strict=True):
        torch.testing.assert_close(tile, 2.0 * part.square().sum())
    again = row_kernels.row_cosines(z, rows)
    assert all(torch.equal(x, y) for x, y in zip((cosines, inverse, squares), again))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens, k, F, spare", SHAPES)
@pytest.mark.parametrize("weight", [0.3, torch.tensor([-2.0])])
@pytest.mark.parametrize("of_squares", [False, True])
def test_cosine_gradient(random, dtype, num_tokens, k, F, spare, weight, of_squares):
    z, incoming = (random(num_tokens * k + spare, F).to(DTYPES[dtype]) for _ in range(2))
    weight = weight.to(DEVICE) if isinstance(weight, torch.Tensor) else weight
    rows, used = tokens_of_rows(num_tokens, k, spare)
    cosines, inverse, _ = row_kernels.row_cosines(z, rows)
    if of_squares:
        operation, of_loss = row_kernels.add_squares_gradient, cosines
    else:
        operation, of_loss = row_kernels.add_mixed, mixing_of_squares(unpacked(cosines, k))
    before = incoming.clone()
    found = operation(z, rows, used, of_loss, inverse, weight, incoming)
    eager = eager_gradient(z, rows, weight, incoming)
    exact = eager_gradient(z.double(), rows, weight, incoming.double())
    assert found.dtype == z.dtype
    assert_no_further(found, eager, exact)
    assert torch.equal(incoming, before)
    assert torch.equal(found[~used], incoming[~used])
    alone = operation(z, rows, used, of_loss, inverse, weight)
    eager, exact = (eager_gradient(x, rows, weight, torch.zeros_like(x)) for x in (z, z.double()))
    assert_no_further(alone, eager, exact, at_least=float(inverse.max()))
    assert torch.equal(found, operation(z, rows, used, of_loss, inverse, weight, incoming))
    assert torch.equal(found, operation(z, rows, used, of_loss, inverse, weight * 0.5, incoming, factor=2.0))


def test_gradient_of_squares_is_that_of_its_mixing(random):
    z, incoming = random(30, 40), random(30, 40)
    rows, used = tokens_of_rows(5, 6)
    cosines, inverse, _ = row_kernels.row_cosines(z, rows)
    mixing = mixing_of_squares(unpacked(cosines, 6))
    found = row_kernels.add_squares_gradient(z, rows, used, cosines, inverse, 0.7, incoming)
    expected = row_kernels.add_mixed(z, rows, used, mixing, inverse, 0.7, incoming)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_worked_example():
    z = torch.tensor([[4.0, 3.0], [3.0, 4.0]], device=DEVICE)
    rows, used = torch.tensor([[1, 0]], dtype=torch.int32, device=DEVICE), torch.ones(2, dtype=bool, device=DEVICE)
    cosines, inverse, squares = row_kernels.row_cosines(z, rows)
    close = dict(rtol=1e-6, atol=1e-7, check_device=False)
    torch.testing.assert_close(cosines, torch.tensor([[0.96]]), **close)
    torch.testing.assert_close(inverse, torch.tensor([[0.2, 0.2]]), **close)
    torch.testing.assert_close(squares, torch.tensor([1.8432]), **close)
    mixing = mixing_of_squares(unpacked(cosines, 2))
    torch.testing.assert_close(mixing, torch.tensor([[[-3.6864, 3.84], [3.84, -3.6864]]]), **close)
    expected = torch.tensor([[-0.129024, 0.172032], [0.172032, -0.129024]])
    gradient = row_kernels.add_mixed(z, rows, used, mixing, inverse, 1.0)
    torch.testing.assert_close(gradient, expected, **close)
    gradient = row_kernels.add_squares_gradient(z, rows, used, cosines, inverse, 1.0)
    torch.testing.assert_close(gradient, expected, **close)


def test_kernels_give_the_loss_and_its_autograd_gradient(random):
    z = random(7 * 4, 50)
    rows, used = tokens_of_rows(7, 4)
    leaf = z.clone().requires_grad_()
    loss = specialization_loss(leaf[rows.clamp_min(0)], rows >= 0)
    loss.backward()
    mean = 1.0 / (7 * 4 * 3)
    cosines, inverse, squares = row_kernels.row_cosines(z, rows)
    assert float(squares.sum() * mean) == pytest.approx(float(loss.detach()), rel=1e-5)
    found = row_kernels.add_squares_gradient(z, rows, used, cosines, inverse, mean)
    torch.testing.assert_close(found, leaf.grad, rtol=1e-4, atol=1e-7)


def test_kernels_give_a_loss_of_lengths_and_its_autograd_gradient(random):
    """Orthogonality, through what the taps make of a loss: gradients with respect to cosines and lengths."""
    x = random(6 * 3, 40)
    rows, used = tokens_of_rows(6, 3)
    leaf = x.clone().requires_grad_()
    loss = orthogonality_loss(leaf[rows.clamp_min(0)], rows >= 0)
    loss.backward()
    cosines, inverse = row_cosines(x, rows)
    lengths = inverse_of(inverse)
    value = (cosines * lengths[:, :, None]).square().sum() / (6 * 3 * 2)
    assert float(value) == pytest.approx(float(loss.detach()), rel=1e-5)
    of_cosines = 2.0 * cosines * lengths[:, :, None].square()
    of_lengths = 2.0 * lengths * cosines.square().sum(dim=2)
    mixing = mixing_of(cosines, lengths, of_cosines, of_lengths)
    found = row_kernels.add_mixed(x, rows, used, mixing, inverse, 1.0 / (6 * 3 * 2))
    torch.testing.assert_close(found, leaf.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-35, 1e-30, 1e-20, 1e18, 1e30, 1e38])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_tiny_and_huge_rows(random, dtype, scale):
    """Beside rows of ordinary size, in the same token and in the same tile."""
    z = random(18, 70).clamp(-3, 3)
    factors = torch.where(torch.arange(18, device=DEVICE) % 2 == 0, scale, 1.0)[:, None]
    z = (z * factors).to(DTYPES[dtype])
    rows, used = tokens_of_rows(6, 3, valid=1.0)
    cosines, inverse = row_cosines(z, rows)
    exact, exact_inverse = eager_cosines(z.double(), rows)
    torch.testing.assert_close(cosines.double(), exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(inverse.double(), exact_inverse, rtol=1e-5, atol=0)
    # Of the cosines, times a power of ten, so that the gradient of neither row leaves the range of its dtype.
    found = row_kernels.add_mixed(z, rows, used, mixing_of_squares(cosines), inverse, min(scale, 1.0))
    expected = eager_gradient(z.double(), rows, min(scale, 1.0), torch.zeros_like(z).double())
    for part in (slice(0, None, 2), slice(1, None, 2)):
        size = float(expected[part].abs().max())
        if size > 1e-36:
            assert float((found[part].double() - expected[part]).abs().max()) <= 1e-2 * size


def test_zero_rows_have_no_cosine_and_get_no_gradient(random):
    z = random(12, 24)
    rows, used = tokens_of_rows(4, 3, valid=1.0)
    z[rows[0]] = 0.0
    z[rows[1, 2]] = 0.0
    cosines, inverse = row_cosines(z, rows)
    eager, eager_inverse = eager_cosines(z, rows)
    torch.testing.assert_close(cosines, eager, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(inverse, eager_inverse)
    incoming = random(12, 24)
    found = row_kernels.add_squares_gradient(z, rows, used, packed(cosines), inverse, 1.0, incoming)
    zero = torch.cat([rows[0], rows[1, 2:]])
    assert torch.equal(found[zero], incoming[zero])


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("others", ["ordinary", "zero", "missing"])
@pytest.mark.parametrize("of_squares", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_and_nan_rows_spoil_their_own_token_only(random, dtype, of_squares, others, bad):
    """Whatever the other rows of their token are."""
    z = random(12, 24).to(DTYPES[dtype])
    rows, _ = tokens_of_rows(4, 3, valid=1.0)
    z[rows[2, 1], 5] = bad
    if others == "zero":
        z[rows[2, [0, 2]]] = 0.0
    elif others == "missing":
        rows[2, [0, 2]] = -1
    used = covered_by(rows, 12)
    cosines, inverse = row_cosines(z, rows)
    assert not inverse[2, 1] > 0.0
    eager, _ = eager_cosines(z, rows)
    off_diagonal = ~torch.eye(3, dtype=torch.bool, device=DEVICE).expand(4, 3, 3)
    assert eager[2, 1, 0].isnan()
    torch.testing.assert_close(cosines[off_diagonal], eager[off_diagonal], rtol=1e-4, atol=1e-5, equal_nan=True)
    if of_squares:
        found = row_kernels.add_squares_gradient(z, rows, used, packed(cosines), inverse, 1.0)
    else:
        found = row_kernels.add_mixed(z, rows, used, mixing_of_squares(cosines), inverse, 1.0)
    assert found[rows[2][rows[2] >= 0]].isnan().all()
    good = rows[[0, 1, 3]].flatten()
    eager = eager_gradient(z, rows, 1.0, torch.zeros_like(z))[good]
    torch.testing.assert_close(found[good], eager, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("num_tokens, k, num_rows", [(0, 2, 0), (0, 4, 7), (3, 2, 0), (20, 2, 7)])
def test_no_tokens_and_no_rows(random, num_tokens, k, num_rows):
    """A rank whose experts got nothing; tokens that none of them got."""
    z, incoming = random(num_rows, 10), random(num_rows, 10)
    rows = torch.full((num_tokens, k), -1, dtype=torch.int32, device=DEVICE)
    used = covered_by(rows, num_rows)
    cosines, inverse, squares = row_kernels.row_cosines(z, rows)
    assert cosines.shape == (num_tokens, k * (k - 1) // 2) and inverse.shape == (num_tokens, k)
    assert not cosines.any() and not inverse.any() and not squares.any()
    found = row_kernels.add_mixed(z, rows, used, torch.zeros(num_tokens, k, k), inverse, 1.0, incoming)
    assert torch.equal(found, incoming)
    assert torch.equal(row_kernels.add_squares_gradient(z, rows, used, cosines, inverse, 1.0, incoming), incoming)


def test_every_layout_of_rows(random):
    """Rows apart, transposed, and gradients that autograd has expanded."""
    rows, used = tokens_of_rows(5, 4)
    dense = random(20, 33)
    expected = row_kernels.row_cosines(dense, rows)
    apart, transposed = torch.zeros(20, 50, device=DEVICE), torch.zeros(33, 20, device=DEVICE).T
    for z in (apart[:, 7:40], transposed):
        z.copy_(dense)
        torch.testing.assert_close(row_kernels.row_cosines(z, rows), expected, rtol=1e-5, atol=1e-6)
        for incoming in (random(20, 1).expand(20, 33), random(1, 33).expand(20, 33), random(33, 20).T):
            found, dense_found = (
                row_kernels.add_squares_gradient(x, rows, used, *expected[:2], 1.0, y)
                for x, y in ((z, incoming), (dense, incoming.contiguous()))
            )
            torch.testing.assert_close(found, dense_found, rtol=1e-5, atol=1e-6)


def test_offsets_past_two_to_the_31(random):
    """Three rows that lie 2^30 + 8 elements apart; only the pages that they touch become real memory."""
    apart = 2**30 + 8
    memory = torch.zeros(1, dtype=torch.float16).new_empty(2 * apart + 24, device=DEVICE)
    z = memory.as_strided((3, 24), (apart, 1))
    dense = random(3, 24).half()
    z.copy_(dense)
    rows = torch.tensor([[2, 0]], dtype=torch.int32, device=DEVICE)
    used = covered_by(rows, 3)
    found, expected = (row_kernels.row_cosines(x, rows) for x in (z, dense))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    gradients = (row_kernels.add_squares_gradient(x, rows, used, *found[:2], 1.0, x) for x in (z, dense))
    torch.testing.assert_close(*gradients, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (1e-25, 1.0, 1e22), (0.0, 1.0, 0.0), (0.0, 0.0, 0.0)])
def test_divided_columns(random, scales):
    """Columns over three ranks, each of another magnitude, one of them all zero."""
    z = random(20, 90)
    parts = [part * scale for part, scale in zip(z.split(30, dim=1), scales)]
    rows, _ = tokens_of_rows(5, 4)
    z = torch.cat(parts, dim=1)
    exact, exact_inverse = eager_cosines(z.double(), rows)
    products, units = zip(*(row_kernels.row_products(part, rows) for part in parts))
    common = torch.stack(units).amax(dim=0)
    total = sum(row_kernels.in_units(p, u, common) for p, u in zip(products, units))
    cosines, inverse = row_kernels.cosines_from_products(total, common)
    torch.testing.assert_close(cosines.double(), exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(inverse.double(), exact_inverse, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weight", [0.5, torch.ones(()), torch.ones(1)])
def test_an_operation_is_one_launch(random, monkeypatch, weight):
    """And nothing else for the device; fp32, which the interpreter converts nothing of."""
    monkeypatch.undo()  # torch.empty fills nothing
    z, (rows, used) = random(12, 5), tokens_of_rows(4, 3)
    weight = weight.to(DEVICE) if isinstance(weight, torch.Tensor) else weight
    cosines, inverse, _ = row_kernels.row_cosines(z, rows)
    mixing = mixing_of_squares(unpacked(cosines, 3))
    kept = used, mixing, inverse, weight, z
    for operation, allocates in (
        (lambda: row_kernels.row_cosines(z, rows), "aten::empty.memory_format"),
        (lambda: row_kernels.row_products(z, rows), "aten::empty.memory_format"),
        (lambda: row_kernels.add_mixed(z, rows, *kept, factor=3.0), "aten::empty_like"),
        (lambda: row_kernels.add_squares_gradient(z, rows, used, cosines, *kept[2:], factor=3.0), "aten::empty_like"),
    ):
        assert work_of(monkeypatch, operation) == (1, {allocates})


def test_arguments_that_do_not_fit(random):
    z, (rows, used) = random(8, 5), tokens_of_rows(4, 2)
    cosines, inverse, _ = row_kernels.row_cosines(z, rows)
    with pytest.raises(ValueError, match="x_PD"):
        row_kernels.row_cosines(z.double(), rows)
    with pytest.raises(ValueError, match="rows_TK"):
        row_kernels.row_cosines(z, rows.long())
    for name, arguments in {
        "used_P": (z, rows, used[1:], cosines, inverse, 1.0),
        "cosines_TN": (z, rows, used, cosines[:2], inverse, 1.0),
        "inverse_lengths_TK": (z, rows, used, cosines, inverse.double(), 1.0),
        "weight": (z, rows, used, cosines, inverse, torch.ones(2)),
        "incoming_PD": (z, rows, used, cosines, inverse, 1.0, z.half()),
    }.items():
        with pytest.raises(ValueError, match=name):
            row_kernels.add_squares_gradient(*arguments)
    with pytest.raises(ValueError, match="mixing_TKK"):
        row_kernels.add_mixed(z, rows, used, cosines, inverse, 1.0)
