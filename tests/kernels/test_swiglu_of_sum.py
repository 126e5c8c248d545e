"""The SwiGLU's gradient for a sum of gradients, against float64 and against Megatron's own function of the sum.

Suffixes: P rows, F size of z, R rows that are added.
"""

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, assert_no_further, work_of

pytest.importorskip("triton", reason="triton is not installed")

from test_swiglu import HALF_ULP, weighted_swiglu

from megatron_moe_spec.kernels.swiglu import swiglu_gradient_of_sum

pytestmark = pytest.mark.usefixtures("poisoned")
SIZES = [(1, 1), (5, 40), (9, 256), (6, 300), (13, 129)]  # rows, F


class Case:
    """Random inputs of a layer's experts; ``places`` choose among two rows more than there are."""

    def __init__(self, random, dtype="fp32", P=9, F=40, chosen=True):
        self.y, self.incoming = random(P, 2 * F).to(DTYPES[dtype]), random(P, F).to(DTYPES[dtype])
        self.added = random(P + 2 * chosen, F).to(DTYPES[dtype])
        self.probs = random(P).sigmoid() + 0.1
        self.places = torch.randperm(P + 2)[:P].int().to(DEVICE) if chosen else None

    def gradient(self):
        return swiglu_gradient_of_sum(self.y, self.probs, self.incoming, self.added, self.places)

    def total(self, dtype=torch.float64):
        added = self.added if self.places is None else self.added[self.places.long()]
        return self.incoming.to(dtype) + added.to(dtype)

    def exact(self):
        """Of y for the sum, and of the probabilities for the incoming gradient alone; float64, by autograd."""
        y, probs = (x.double().requires_grad_() for x in (self.y, self.probs))
        z = weighted_swiglu(y, probs)
        (dy,) = torch.autograd.grad(z, y, self.total(), retain_graph=True)
        return dy, torch.autograd.grad(z, probs, self.incoming.double())[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("P, F", SIZES)
@pytest.mark.parametrize("chosen", [True, False])
def test_gradients(megatron, random, dtype, P, F, chosen):
    """No further from float64 than Megatron's of the rounded sum; inputs are left as they are."""
    from megatron.core.fusions.fused_bias_swiglu import weighted_swiglu_back

    case = Case(random, dtype, P, F, chosen)
    before = [x.clone() for x in (case.y, case.probs, case.incoming, case.added)]
    dy, dprobs = case.gradient()
    exact_dy, exact_dprobs = case.exact()
    own_dy, _ = weighted_swiglu_back(case.total(case.y.dtype), case.y, case.probs[:, None])
    _, own_dprobs = weighted_swiglu_back(case.incoming, case.y, case.probs[:, None])
    assert dy.dtype == case.y.dtype and dprobs.dtype == torch.float32 and dprobs.shape == (P,)
    assert_no_further(dy, own_dy, exact_dy)
    assert_no_further(dprobs, own_dprobs.squeeze(1), exact_dprobs)
    size = HALF_ULP[dtype] * float(exact_dy.abs().max())
    torch.testing.assert_close(dy.double(), exact_dy, rtol=2 * HALF_ULP[dtype], atol=size)
    assert all(torch.equal(x, old) for x, old in zip((case.y, case.probs, case.incoming, case.added), before))
    again = case.gradient()
    assert torch.equal(dy, again[0]) and torch.equal(dprobs, again[1])


def test_each_row_gets_its_own_and_nothing_else(random):
    """What is added to a row changes this row of y's gradient, and no probability's."""
    case = Case(random, P=6)
    dy, dprobs = case.gradient()
    case.added[case.places[4].long()] += 1.0
    other_dy, other_dprobs = case.gradient()
    assert [row for row in range(6) if not torch.equal(dy[row], other_dy[row])] == [4]
    assert torch.equal(dprobs, other_dprobs)
    case.added[:] = 0.0
    case.incoming[2] = float("nan")
    dy, dprobs = case.gradient()
    assert dy.isfinite().all(dim=1).tolist() == dprobs.isfinite().tolist() == [row != 2 for row in range(6)]


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
@pytest.mark.parametrize("probs_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_probabilities_of_any_dtype(random, shape, probs_dtype):
    case = Case(random, "bf16")
    case.probs = case.probs.to(probs_dtype)
    exact = case.exact()[1].view(shape)
    case.probs = case.probs.view(shape)
    _, dprobs = case.gradient()
    assert dprobs.dtype == probs_dtype and dprobs.shape == case.probs.shape
    torch.testing.assert_close(dprobs.double(), exact, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("chosen", [True, False])
def test_no_rows(random, chosen):
    case = Case(random, P=0, F=10, chosen=chosen)
    dy, dprobs = case.gradient()
    assert dy.shape == (0, 20) and dprobs.shape == (0,)


def test_every_layout_of_rows(random):
    """Rows apart, transposed, and gradients that autograd has expanded."""
    case = Case(random, F=33)
    expected = case.gradient()
    for name in ("y", "incoming", "added", "places"):
        dense = getattr(case, name)
        layouts = [dense.repeat_interleave(2, dim=0)[::2]]
        if dense.dim() == 2:
            layouts += [dense.T.contiguous().T, torch.cat([dense, dense], dim=1)[:, : dense.shape[1]]]
        for other in layouts:
            assert not other.is_contiguous() and torch.equal(other, dense)
            setattr(case, name, other)
            assert all(torch.equal(a, b) for a, b in zip(case.gradient(), expected))
        setattr(case, name, dense)
    case.incoming = random(9, 1).expand(9, 33)
    found = case.gradient()
    case.incoming = case.incoming.contiguous()
    assert all(torch.equal(a, b) for a, b in zip(case.gradient(), found))


@pytest.mark.parametrize("name", ["y", "added"])
def test_offsets_past_two_to_the_31(random, name):
    """Rows that lie 2^30 + 8 elements apart; only the pages that they touch become real memory."""
    case = Case(random, "fp16", P=3, F=12, chosen=False)
    expected, dense, apart = case.gradient(), getattr(case, name), 2**30 + 8
    memory = torch.zeros(1, dtype=torch.float16).new_empty(2 * apart + 24, device=DEVICE)
    setattr(case, name, memory.as_strided(dense.shape, (apart, 1)).copy_(dense))
    assert all(torch.equal(a, b) for a, b in zip(case.gradient(), expected))


def test_it_is_one_launch(random, monkeypatch):
    monkeypatch.undo()  # torch.empty fills nothing
    assert work_of(monkeypatch, Case(random).gradient) == (1, {"aten::empty_like"})


def test_arguments_that_do_not_fit(random):
    case = Case(random, P=8, F=6)
    inputs = [case.y, case.probs, case.incoming, case.added, case.places]
    for index, name, wrong in (
        (0, "y_PU", case.y.double()),
        (0, "y_PU", case.y[:, 1:]),
        (1, "probs_P", case.probs[1:]),
        (1, "probs_P", case.probs.int()),
        (2, "incoming_PF", case.incoming.half()),
        (2, "incoming_PF", case.incoming[1:]),
        (3, "added_RF", case.added.half()),
        (3, "added_RF", case.added[:, 1:]),
        (4, "places_P", case.places.long()),
        (4, "places_P", case.places[1:]),
        (4, "added_RF", None),
    ):
        with pytest.raises(ValueError, match=name):
            swiglu_gradient_of_sum(*inputs[:index], wrong, *inputs[index + 1 :])
