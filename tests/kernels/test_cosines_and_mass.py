"""The Triton kernels against float64 and against eager PyTorch: forward and backward, and the extremes.

Runs under Triton's interpreter on CPU; with TRITON_INTERPRET=0, on the GPU. What a kernel allocates is filled with NaN
first. Suffixes: P rows, F row size, T tokens, K experts of a token, E experts.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="triton is not installed")

from megatron_moe_spec.kernels import choose, interpreted
from megatron_moe_spec.kernels import cosines as row_kernels
from megatron_moe_spec.kernels import mass as mass_kernels
from megatron_moe_spec.losses import orthogonality_loss, specialization_loss
from megatron_moe_spec.losses.coupling import routed_mass
from megatron_moe_spec.losses.scores import normalized_scores, normalized_scores_gradient
from megatron_moe_spec.losses.vectors import inverse as inverse_of
from megatron_moe_spec.losses.vectors import mixed, mixing_of, packed, pair_cosines, unit_vectors, unpacked

# Numpy's, of the tests with infinite values.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
DEVICE = "cpu" if interpreted() else "cuda"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# By how much a kernel may be further from float64 than eager is, relative to the largest magnitude.
HAIR = 1e-5

# (T, K, F, rows of no token): full and ragged tiles of tokens, rows shorter and longer than a block
SHAPES = [
    (1, 2, 1, 0),
    (9, 2, 300, 3),
    (5, 3, 40, 0),
    (4, 4, 128, 17),
    (3, 6, 130, 1),
    (5, 8, 257, 2),
    (2, 16, 96, 5),
    (1, 16, 33, 0),
    (2, 22, 36, 4),
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))


@pytest.fixture
def random():
    """A seeded torch.randn, of fp32 numbers on the device."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)


def tokens_of_rows(num_tokens, k, spare=0, seed=0, valid=0.8):
    """Each token's row numbers, scattered over all rows, -1 where it has none; and which rows are of a token."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(num_tokens * k + spare, generator=generator)[: num_tokens * k].view(num_tokens, k)
    rows = rows.masked_fill(torch.rand(num_tokens, k, generator=generator) >= valid, -1).to(DEVICE, torch.int32)
    return rows, covered_by(rows, num_tokens * k + spare)


def covered_by(rows, num_rows):
    return torch.zeros(num_rows, dtype=torch.bool, device=DEVICE).index_fill_(0, rows[rows >= 0].long(), True)


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


def assert_no_further(found, eager, exact, at_least=0.0):
    """``found`` is as near to the float64 values as ``eager`` is, plus a hair of these, or of what they cancel from."""
    assert found.isfinite().all()
    scale = max(float(exact.abs().max()), at_least) if exact.numel() else 0.0
    error = float((found.double() - exact).abs().max()) if exact.numel() else 0.0
    allowed = float((eager.double() - exact).abs().max()) if exact.numel() else 0.0
    assert error <= allowed + HAIR * scale, f"error {error:.2e}, eager {allowed:.2e}, scale {scale:.2e}"


def work_of(monkeypatch, module, operation):
    """How often the operation launches a kernel of the module, and the names of what else it asks the device for."""
    launches, others = [], set()

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **options: launches.append(grid)

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if not function.is_view:
                others.add(function.name())
            return function(*args, **(kwargs or {}))

    with monkeypatch.context() as patches, Mode():
        for name in dir(module):
            if name.endswith("_kernel"):
                patches.setattr(module, name, Recorder())
        operation()
    return len(launches), others


# Rows


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
    for operation in (
        lambda: row_kernels.row_cosines(z, rows),
        lambda: row_kernels.row_products(z, rows),
        lambda: row_kernels.add_mixed(z, rows, used, mixing, inverse, weight, z, factor=3.0),
        lambda: row_kernels.add_squares_gradient(z, rows, used, cosines, inverse, weight, z, factor=3.0),
    ):
        assert work_of(monkeypatch, row_kernels, operation) == (1, {"aten::empty.memory_format"})


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


# Coupling


def logits_and_map(random, num_tokens, num_experts, dtype, scale=3.0):
    logits = (random(num_tokens, num_experts) * scale).to(DTYPES[dtype])
    top = logits.float().topk(min(2, num_experts), dim=1).indices
    live = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, top, True)
    live[1::3] = False  # padding, or dropped by every expert
    return logits, live


def eager_mass_gradient(logits, live, score_function, neighbor_grads, weight, incoming):
    gradient = normalized_scores_gradient(logits, score_function, live * sum(neighbor_grads).unsqueeze(-1) * weight)
    return incoming + gradient.to(incoming.dtype)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens, num_experts", [(1, 2), (300, 8), (35, 60), (17, 64), (9, 256), (5, 512), (0, 8)])
def test_mass(random, score_function, dtype, num_tokens, num_experts):
    logits, live = logits_and_map(random, num_tokens, num_experts, dtype)
    found, products = mass_kernels.routed_mass(logits, live, score_function)
    eager, exact = (routed_mass(normalized_scores(x, score_function), live) for x in (logits, logits.double()))
    assert_no_further(found, eager, exact)
    assert products is None
    assert not found[1::3].any()
    previous, others, incoming = random(num_tokens), random(num_tokens), random(*logits.shape).to(DTYPES[dtype])
    again, products = mass_kernels.routed_mass(logits, live, score_function, previous)
    assert torch.equal(found, again)
    torch.testing.assert_close(products.sum(), (previous * found).sum(), rtol=1e-4, atol=1e-5)
    one = (live, score_function, [previous], -0.5)
    gradient = mass_kernels.add_mass_gradient(logits, *one, incoming)
    assert_no_further(gradient, *(eager_mass_gradient(x, *one, y) for x, y in in_both(logits, incoming)))
    assert torch.equal(gradient[1::3], incoming[1::3])
    weight = torch.tensor([-0.25], device=DEVICE)
    assert torch.equal(
        gradient, mass_kernels.add_mass_gradient(logits, live, score_function, [previous], weight, incoming, 2.0)
    )
    apart = torch.stack([previous, others], dim=1)  # as messages of other pipeline stages come
    two = (live, score_function, [previous, others], -0.5)
    assert torch.equal(products, mass_kernels.routed_mass(logits, live, score_function, apart[:, 0])[1])
    assert torch.equal(
        mass_kernels.add_mass_gradient(logits, live, score_function, apart.unbind(dim=1), -0.5, incoming),
        mass_kernels.add_mass_gradient(logits, *two, incoming),
    )
    gradient = mass_kernels.add_mass_gradient(logits, *two, incoming)
    assert_no_further(gradient, *(eager_mass_gradient(x, *two, y) for x, y in in_both(logits, incoming)))


def in_both(*tensors):
    """The tensors as they are, and in float64."""
    return tensors, tuple(x.double() for x in tensors)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 30.0, 1e4])
def test_mass_of_extreme_logits(random, score_function, scale):
    logits, live = logits_and_map(random, 12, 10, "fp32", scale)
    exact = routed_mass(normalized_scores(logits.double(), score_function), live)
    torch.testing.assert_close(
        mass_kernels.routed_mass(logits, live, score_function)[0].double(), exact, rtol=1e-5, atol=1e-7
    )
    arguments = (live, score_function, [random(12)], 1.0)
    found = mass_kernels.add_mass_gradient(logits, *arguments, torch.zeros_like(logits))
    expected = eager_mass_gradient(logits.double(), *arguments, torch.zeros_like(logits).double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_mass_worked_example():
    logits = torch.tensor([[1.0, 2.0, 5.0]], device=DEVICE).log()
    live = torch.tensor([[True, False, True]], device=DEVICE)
    mass, _ = mass_kernels.routed_mass(logits, live, "softmax")
    torch.testing.assert_close(mass, torch.tensor([0.75]), check_device=False)
    one, zeros = torch.ones(1, device=DEVICE), torch.zeros_like(logits)
    gradient = mass_kernels.add_mass_gradient(logits, live, "softmax", [one], 1.0, zeros)
    torch.testing.assert_close(gradient, torch.tensor([[0.03125, -0.1875, 0.15625]]), check_device=False)


def test_mass_arguments_that_do_not_fit(random):
    logits, live = logits_and_map(random, 6, 4, "fp32")
    for name, arguments in {
        "logits_TE": (logits.double(), live, "softmax"),
        "active_TE": (logits, live[:, :3], "softmax"),
        "score_function": (logits, live, "tanh"),
    }.items():
        with pytest.raises(ValueError, match=name):
            mass_kernels.routed_mass(*arguments)
    with pytest.raises(ValueError, match="neighbor_grads"):
        mass_kernels.add_mass_gradient(logits, live, "softmax", [random(6), random(5)], 1.0, logits)
    with pytest.raises(ValueError, match="previous_T"):
        mass_kernels.routed_mass(logits, live, "softmax", random(6).half())
    with pytest.raises(ValueError, match="incoming_TE"):
        mass_kernels.add_mass_gradient(logits, live, "softmax", [random(6)], 1.0, logits.half())


# Choice


def test_choice(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("triton", cpu) and not choose("auto", cpu) and not choose("torch", cpu)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    choose.cache_clear()
    assert not choose("auto", cpu)
    with pytest.raises(ValueError, match="--moe-spec-kernels"):
        choose("triton", cpu)
    choose.cache_clear()
