"""The SwiGLU's gradient kernel against float64 and against Megatron's own function, as in ``test_cosines.py``.

Suffixes: P rows, F size of z, T tokens, K experts of a token.
"""

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, SHAPES, assert_no_further, covered_by, tokens_of_rows, work_of

pytest.importorskip("triton", reason="triton is not installed")

from megatron_moe_spec.kernels.cosines import row_cosines
from megatron_moe_spec.kernels.swiglu import swiglu_gradient
from megatron_moe_spec.losses.vectors import pair_cosines, unit_vectors

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    # Numpy's, of the tests with infinite values.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
HALF_ULP = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-22}  # of the largest value, rounded once or twice


def weighted_swiglu(y, probs):
    gate, up = y.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up * probs.reshape(-1, 1)


def exact_gradients(y, probs, rows, weight, incoming):
    """Of y and probs, by autograd in float64; the loss's part of y's gradient."""
    y, probs = (x.double().requires_grad_() for x in (y, probs))
    z = weighted_swiglu(y, probs)
    of_loss = torch.zeros_like(y)
    if (rows >= 0).any():
        units, _ = unit_vectors(z[rows.clamp_min(0)], rows >= 0)
        loss = weight * pair_cosines(units).square().sum()
        (of_loss,) = torch.autograd.grad(loss, y, retain_graph=True)
    dy, dprobs = torch.autograd.grad(z, (y, probs), incoming.double())
    return dy, dprobs, of_loss


class Case:
    """Random inputs of a layer's experts, and what the forward pass gives of them."""

    def __init__(self, random, dtype="fp32", num_tokens=5, k=3, F=40, spare=2, probs_dtype=torch.float32):
        self.y = random(num_tokens * k + spare, 2 * F).to(DTYPES[dtype])
        self.incoming = random(num_tokens * k + spare, F).to(DTYPES[dtype])
        self.probs = (random(num_tokens * k + spare).sigmoid() + 0.1).to(probs_dtype)
        self.rows, self.used = tokens_of_rows(num_tokens, k, spare)

    def gradient(self, weight=1.0, **options):
        z = weighted_swiglu(self.y.float(), self.probs.float()).to(self.y.dtype)
        cosines, inverse, _ = row_cosines(z, self.rows)
        return swiglu_gradient(
            self.y, self.probs, self.rows, self.used, cosines, inverse, weight, self.incoming, **options
        )

    def exact(self, weight=1.0):
        return exact_gradients(self.y, self.probs, self.rows, weight, self.incoming)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens, k, F, spare", SHAPES[1:])
def test_gradients(random, dtype, num_tokens, k, F, spare):
    case = Case(random, dtype, num_tokens, k, F, spare)
    before = case.incoming.clone()
    dy, dprobs = case.gradient(0.7)
    exact_dy, exact_dprobs, of_loss = case.exact(0.7)
    exact = exact_dy + of_loss
    assert dy.dtype == case.y.dtype and dprobs.dtype == torch.float32 and dprobs.shape == case.probs.shape
    # Cosines and mixing are of z as it is rounded to its dtype, the gradient is rounded once.
    scale = HALF_ULP[dtype] * max(float(exact.abs().max()), float(of_loss.abs().max()))
    torch.testing.assert_close(dy.double(), exact, rtol=2 * HALF_ULP[dtype], atol=3 * scale)
    assert_no_further(dprobs, exact_dprobs, exact_dprobs)
    assert torch.equal(case.incoming, before)
    again = case.gradient(0.7)
    assert torch.equal(dy, again[0]) and torch.equal(dprobs, again[1])
    halves = case.gradient(torch.tensor([0.35], device=DEVICE), factor=2.0)
    torch.testing.assert_close(halves[0], dy, rtol=2 * HALF_ULP[dtype], atol=float(scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens, k, F, spare", SHAPES[1:])
def test_the_loss_is_apart(random, dtype, num_tokens, k, F, spare):
    """Its part is all that its weight changes, and only in y's gradient, and in rows of tokens."""
    case = Case(random, dtype, num_tokens, k, F, spare)
    case.incoming = case.incoming * 0.0
    exact_dy, _, of_loss = case.exact()
    dy, dprobs = case.gradient()
    scale = HALF_ULP[dtype] * float(of_loss.abs().max())
    torch.testing.assert_close(dy.double(), of_loss, rtol=2 * HALF_ULP[dtype], atol=3 * scale + 1e-6)
    assert not dy[~case.used].any() and not dprobs.any()
    case = Case(random, dtype, num_tokens, k, F, spare)
    results = [case.gradient(weight) for weight in (0.0, 1.0, -300.0)]
    assert all(torch.equal(dprobs, results[0][1]) for _, dprobs in results)
    assert all(torch.equal(dy[~case.used], results[0][0][~case.used]) for dy, _ in results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens, k, F, spare", SHAPES)
def test_without_weight_it_is_megatrons(megatron, random, dtype, num_tokens, k, F, spare):
    """No further from float64 than Megatron's, and within the rounding of its dtype, in which Megatron multiplies."""
    from megatron.core.fusions.fused_bias_swiglu import weighted_swiglu_back

    case = Case(random, dtype, num_tokens, k, F, spare)
    dy, dprobs = case.gradient(0.0)
    own = weighted_swiglu_back(case.incoming, case.y, case.probs[:, None])
    exact_dy, exact_dprobs, _ = case.exact(0.0)
    assert_no_further(dy, own[0], exact_dy)
    assert_no_further(dprobs, own[1].squeeze(1), exact_dprobs)
    size = HALF_ULP[dtype] * float(exact_dy.abs().max())
    torch.testing.assert_close(dy, own[0], rtol=8 * HALF_ULP[dtype], atol=size)


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
@pytest.mark.parametrize("probs_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_probabilities_of_any_dtype(random, shape, probs_dtype):
    case = Case(random, "bf16", probs_dtype=probs_dtype)
    case.probs = case.probs.view(shape)
    _, dprobs = case.gradient()
    assert dprobs.dtype == probs_dtype and dprobs.shape == case.probs.shape
    torch.testing.assert_close(dprobs.double(), case.exact()[1].view(shape), rtol=1e-2, atol=1e-3)


def test_worked_example():
    y = torch.tensor([[20.0, 20.0, 0.4, 0.3], [20.0, 20.0, 0.3, 0.4]], device=DEVICE)
    probs, incoming = torch.full((2,), 0.5, device=DEVICE), torch.ones(2, 2, device=DEVICE)
    rows = torch.tensor([[1, 0]], dtype=torch.int32, device=DEVICE)
    used = covered_by(rows, 2)
    cosines, inverse, _ = row_cosines(weighted_swiglu(y, probs), rows)
    of_loss, _ = swiglu_gradient(y, probs, rows, used, cosines, inverse, 1.0, incoming * 0.0)
    close = dict(rtol=1e-5, atol=1e-6, check_device=False)
    torch.testing.assert_close(of_loss[1], torch.tensor([0.0258048, -0.0258048, 1.72032, -1.29024]), **close)
    dy, dprobs = swiglu_gradient(y, probs, rows, used, cosines, inverse, 1.0, incoming)
    torch.testing.assert_close((dy - of_loss)[1], torch.tensor([0.15, 0.2, 10.0, 10.0]), **close)
    torch.testing.assert_close(dprobs, torch.tensor([14.0, 14.0]), **close)


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), "beyond"])
def test_infinite_and_nan_rows_spoil_their_own_token_only(random, dtype, bad, k):
    case = Case(random, dtype, 4, k, 24, 0)
    case.rows, case.used = tokens_of_rows(4, k, valid=1.0)
    reference, _ = case.gradient()
    gate = torch.finfo(DTYPES[dtype]).max if bad == "beyond" else bad
    case.y[case.rows[2, 1], 5] = gate
    case.y[case.rows[2, 1], 29] = 30.0 if bad == "beyond" else 1.0  # z overflows
    dy, dprobs = case.gradient()
    good = case.rows[[0, 1, 3]].flatten()
    assert torch.equal(dy[good], reference[good]) and dprobs[good].isfinite().all()
    assert dy[case.rows[2]].isnan().any(dim=1).all()


@pytest.mark.parametrize("k", [2, 3])
def test_zero_rows_and_zero_probabilities_get_the_swiglus_gradient(random, k):
    case = Case(random, "fp32", 4, k, 24, 0)
    case.rows, case.used = tokens_of_rows(4, k, valid=1.0)
    case.probs[case.rows[0]] = 0.0
    case.probs[case.rows[1, k - 1]] = 0.0
    case.y[case.rows[3, 0], 24:] = 0.0
    dy, dprobs = case.gradient()
    without_loss, dprobs_without_loss = case.gradient(0.0)
    zero = torch.cat([case.rows[0], case.rows[1, k - 1 :], case.rows[3, :1]])
    assert torch.equal(dy[zero], without_loss[zero]) and torch.equal(dprobs, dprobs_without_loss)
    assert not dy[case.rows[0]].any() and dprobs[case.rows[0]].all()
    assert not torch.equal(dy[case.rows[2]], without_loss[case.rows[2]])


@pytest.mark.parametrize("k", [2, 3])
def test_rows_of_tiny_magnitude(random, k):
    """The product of two inverse lengths is beyond the largest fp32 number."""
    case = Case(random, "fp32", 4, k, 24, 0)
    case.probs *= 1e-24
    case.rows, case.used = tokens_of_rows(4, k, valid=1.0)
    exact_dy, _, of_loss = case.exact(1e-4)
    dy, _ = case.gradient(1e-4)
    torch.testing.assert_close(dy.double(), exact_dy + of_loss, rtol=1e-5, atol=1e-6 * float(of_loss.abs().max()))


@pytest.mark.parametrize("num_tokens, k, num_rows", [(0, 2, 0), (0, 4, 7), (3, 2, 0), (20, 2, 7)])
def test_no_tokens_and_no_rows(random, num_tokens, k, num_rows):
    case = Case(random, "fp32", num_rows, 1, 10, 0)
    case.rows = torch.full((num_tokens, k), -1, dtype=torch.int32, device=DEVICE)
    case.used = covered_by(case.rows, num_rows)
    dy, dprobs = case.gradient()
    exact_dy, exact_dprobs, _ = case.exact()
    torch.testing.assert_close(dy.double(), exact_dy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dprobs.double(), exact_dprobs, rtol=1e-5, atol=1e-6)


def test_every_layout_of_rows(random):
    """Rows apart, transposed, and gradients that autograd has expanded."""
    case = Case(random, "fp32", 5, 4, 33, 0)
    dense_y, dense = case.y, case.incoming
    expected = case.gradient()
    apart, transposed = torch.zeros(20, 90, device=DEVICE), torch.zeros(66, 20, device=DEVICE).T
    for y in (apart[:, 7:73], transposed):
        case.y = y.copy_(dense_y)
        for incoming in (torch.zeros(20, 40, device=DEVICE)[:, 3:36], torch.zeros(33, 20, device=DEVICE).T):
            case.incoming = incoming.copy_(dense)
            assert all(torch.equal(a, b) for a, b in zip(case.gradient(), expected))
    case.y, case.incoming = dense_y, random(20, 1).expand(20, 33)
    found = case.gradient()
    case.incoming = case.incoming.contiguous()
    assert all(torch.equal(a, b) for a, b in zip(case.gradient(), found))


def test_offsets_past_two_to_the_31(random):
    """Rows that lie 2^30 + 8 elements apart; only the pages that they touch become real memory."""
    case = Case(random, "fp16", 1, 2, 12, 1)
    case.rows = torch.tensor([[2, 0]], dtype=torch.int32, device=DEVICE)
    case.used = covered_by(case.rows, 3)
    expected = case.gradient()
    apart = 2**30 + 8
    memory = torch.zeros(1, dtype=torch.float16).new_empty(2 * apart + 24, device=DEVICE)
    case.y = memory.as_strided((3, 24), (apart, 1)).copy_(case.y)
    assert all(torch.equal(a, b) for a, b in zip(case.gradient(), expected))


@pytest.mark.parametrize("weight", [0.5, torch.ones(())])
def test_it_is_one_launch(random, monkeypatch, weight):
    monkeypatch.undo()  # torch.empty fills nothing
    case = Case(random)
    weight = weight.to(DEVICE) if isinstance(weight, torch.Tensor) else weight
    cosines, inverse, _ = row_cosines(weighted_swiglu(case.y, case.probs), case.rows)
    inputs = case.y, case.probs, case.rows, case.used, cosines, inverse, weight, case.incoming
    work = work_of(monkeypatch, lambda: swiglu_gradient(*inputs, factor=3.0))
    assert work == (1, {"aten::empty_like"})


def test_arguments_that_do_not_fit(random):
    case = Case(random, "fp32", 4, 2, 6, 0)
    cosines, inverse, _ = row_cosines(weighted_swiglu(case.y, case.probs), case.rows)
    inputs = [case.y, case.probs, case.rows, case.used, cosines, inverse, 1.0, case.incoming]
    for index, name, wrong in (
        (0, "y_PU", case.y.double()),
        (0, "y_PU", case.y[:, 1:]),
        (1, "probs_P", case.probs[1:]),
        (1, "probs_P", case.probs.int()),
        (2, "rows_TK", case.rows.long()),
        (3, "used_P", case.used[1:]),
        (4, "cosines_TN", cosines[:2]),
        (5, "inverse_lengths_TK", inverse[:2]),
        (6, "weight", torch.ones(2)),
        (7, "incoming_PF", case.incoming.half()),
    ):
        arguments = [*inputs[:index], wrong, *inputs[index + 1 :]]
        with pytest.raises(ValueError, match=name):
            swiglu_gradient(*arguments)
