"""Megatron's fused SwiGLU, recognised by what it leaves in autograd's graph, and replaced there.

Suffixes: P rows, F size of z.
"""

import functools
import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_moe_spec.integration.hooks.injection import replace_swiglu

P, F = 6, 4


@pytest.fixture
def swiglu(megatron):
    from megatron.core.fusions import fused_bias_swiglu

    return fused_bias_swiglu


@pytest.fixture
def inputs_of(megatron):
    from megatron_moe_spec.integration.compat.experts import weighted_swiglu_inputs

    return weighted_swiglu_inputs


def leaves(dtype=torch.float32):
    """Inputs, first weight, probabilities."""
    generator = torch.Generator().manual_seed(0)
    shapes = (P, 5), (5, 2 * F), (P, 1)
    x, weight, probs = (torch.randn(*shape, generator=generator) for shape in shapes)
    return x.to(dtype), weight.to(dtype).requires_grad_(), probs.sigmoid().requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_inputs_are_found(swiglu, inputs_of, dtype):
    x, weight, leaf = leaves(dtype)
    y, probs = x @ weight, leaf * 1.0
    z = swiglu.weighted_bias_swiglu_impl(y, None, probs)
    found_y, found_probs = inputs_of(z)
    assert found_y.data_ptr() == y.data_ptr() and torch.equal(found_y, y)
    assert torch.equal(found_probs, probs) and found_probs.grad_fn is probs.grad_fn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("y_trained, probs_trained", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("keeps", [False, True])
def test_the_replacement_is_bitwise_the_same(swiglu, inputs_of, keeps, dtype, y_trained, probs_trained):
    """Gradients of y, of the probabilities and of a weight before, with Megatron's own function for the gradient."""
    results = []
    for replaced in (False, True):
        x, weight, leaf = leaves(dtype)
        y, probs = (x @ weight.requires_grad_(y_trained)), leaf.requires_grad_(probs_trained) * 1.0
        for tensor in (y, probs):
            if tensor.requires_grad:
                tensor.retain_grad()
        z = swiglu.weighted_bias_swiglu_impl(y, None, probs)
        if replaced:
            own, node, seen, value = z, weakref.ref(z.grad_fn), [], z.detach().clone()

            def gradient(y, probs, z, incoming, seen=seen, value=value):
                seen.append(incoming)
                assert torch.equal(z, value) if keeps else z is None
                return swiglu.weighted_swiglu_back(incoming, y, probs)

            z = replace_swiglu(z, inputs_of(z), gradient, keeps)
            assert torch.equal(z, own) and z.data_ptr() == own.data_ptr() and z.dtype == dtype
            del own
            gc.collect()
            assert node() is None
        z.float().square().sum().backward()
        results.append([y.grad, probs.grad, weight.grad, leaf.grad])
    assert len(seen) == 1
    for before, after in zip(*results):
        assert (before is None and after is None) or torch.equal(before, after)
    assert (results[1][0] is not None, results[1][1] is not None) == (y_trained, probs_trained)


def test_the_gradient_function_is_taken_once(swiglu, inputs_of):
    x, weight, probs = leaves()
    z = swiglu.weighted_bias_swiglu_impl(x @ weight, None, probs)

    def back(y, probs, z, incoming):
        return swiglu.weighted_swiglu_back(incoming, y, probs)

    gradient = functools.partial(back)
    alive = weakref.ref(gradient)
    z = replace_swiglu(z, inputs_of(z), gradient, keeps=False)
    del gradient
    assert alive() is not None
    z.sum().backward(retain_graph=True)
    assert alive() is None
    with pytest.raises(RuntimeError, match="backward ran twice"):
        z.sum().backward()


def _checkpointed(swiglu, y, probs):
    return checkpoint(swiglu.weighted_bias_swiglu_impl, y, None, probs, use_reentrant=False)


def _recomputed(swiglu, y, probs):
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    return CheckpointWithoutOutput().checkpoint(swiglu.weighted_bias_swiglu_impl, y, None, probs)


def _offloaded(swiglu, y, probs):
    def unpack(x):
        raise AssertionError("what is offloaded was looked at")

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
        return swiglu.weighted_bias_swiglu_impl(y, None, probs)


def _derived(swiglu, y, probs):
    class Other(swiglu.WeightedSwiGLUFunction):
        pass

    return Other.apply(y, probs, False)


OTHERS = {
    "no graph": lambda swiglu, y, probs: swiglu.weighted_bias_swiglu_impl(y.detach(), None, probs.detach()),
    "leaf": lambda swiglu, y, probs: swiglu.weighted_bias_swiglu_impl(y, None, probs).detach().requires_grad_(),
    "view": lambda swiglu, y, probs: swiglu.weighted_bias_swiglu_impl(y, None, probs)[:],
    "three dimensions": lambda swiglu, y, probs: swiglu.weighted_bias_swiglu_impl(y[None], None, probs),
    "copy": lambda swiglu, y, probs: swiglu.weighted_bias_swiglu_impl(y, None, probs).clone(),
    "in place": lambda swiglu, y, probs: swiglu.weighted_bias_swiglu_impl(y, None, probs).mul_(2.0),
    "not fused": lambda swiglu, y, probs: swiglu.weighted_swiglu(y, probs),
    "not weighted": lambda swiglu, y, probs: swiglu.bias_swiglu_impl(y, None),
    "fp8": lambda swiglu, y, probs: swiglu.weighted_bias_swiglu_impl(y, None, probs, True),
    "one probability": lambda swiglu, y, probs: swiglu.WeightedSwiGLUFunction.apply(y, probs[:1], False),
    "a probability each": lambda swiglu, y, probs: swiglu.WeightedSwiGLUFunction.apply(y, probs.expand(P, F), False),
    "derived": _derived,
    "checkpoint": _checkpointed,
    "recomputed": _recomputed,
    "offloaded": _offloaded,
}


@pytest.mark.parametrize("other", OTHERS)
def test_anything_else_is_left_alone(swiglu, inputs_of, other):
    x, weight, probs = leaves()
    assert inputs_of(OTHERS[other](swiglu, x @ weight, probs * 1.0)) is None


def test_hooks_that_the_replacement_would_run_into(swiglu, inputs_of):
    x, weight, probs = leaves()
    z = swiglu.weighted_bias_swiglu_impl(x @ weight, None, probs)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert inputs_of(z) is None
    assert inputs_of(z) is not None
