"""Routed mass and its gradient: the kernels against float64 and eager PyTorch, as in ``test_cosines.py``."""

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, assert_no_further

pytest.importorskip("triton", reason="triton is not installed")

from megatron_moe_spec.kernels import mass as mass_kernels
from megatron_moe_spec.losses.coupling import routed_mass
from megatron_moe_spec.losses.scores import normalized_scores, normalized_scores_gradient

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    # Numpy's, of the tests with infinite values.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


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
def test_extreme_logits(random, score_function, scale):
    logits, live = logits_and_map(random, 12, 10, "fp32", scale)
    exact = routed_mass(normalized_scores(logits.double(), score_function), live)
    torch.testing.assert_close(
        mass_kernels.routed_mass(logits, live, score_function)[0].double(), exact, rtol=1e-5, atol=1e-7
    )
    arguments = (live, score_function, [random(12)], 1.0)
    found = mass_kernels.add_mass_gradient(logits, *arguments, torch.zeros_like(logits))
    expected = eager_mass_gradient(logits.double(), *arguments, torch.zeros_like(logits).double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_worked_example():
    logits = torch.tensor([[1.0, 2.0, 5.0]], device=DEVICE).log()
    live = torch.tensor([[True, False, True]], device=DEVICE)
    mass, _ = mass_kernels.routed_mass(logits, live, "softmax")
    torch.testing.assert_close(mass, torch.tensor([0.75]), check_device=False)
    one, zeros = torch.ones(1, device=DEVICE), torch.zeros_like(logits)
    gradient = mass_kernels.add_mass_gradient(logits, live, "softmax", [one], 1.0, zeros)
    torch.testing.assert_close(gradient, torch.tensor([[0.03125, -0.1875, 0.15625]]), check_device=False)


def test_arguments_that_do_not_fit(random):
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
