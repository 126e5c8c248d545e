"""Adding a gradient to a tensor without touching its value."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import Tensor

from megatron_moe_spec.integration.hooks.modes import without_autocast


def _take_callback(ctx: Any) -> Callable:
    """A node's callback, for the only time: it holds activations that must not outlive the node's turn."""
    callback, ctx.callback = ctx.callback, None
    if callback is None:
        raise RuntimeError("the auxiliary loss's gradient was already used: backward ran twice on one graph")
    return callback


class _AddGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, accumulate: Callable, kept: Sequence[Tensor]) -> Tensor:
        ctx.callback = accumulate
        if kept:
            ctx.save_for_backward(*kept)
        return x.detach()  # x itself would be a view, and other people's hooks may work in place on what is returned

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None, None]:
        return without_autocast(_take_callback(ctx), incoming), None, None


def add_gradient(x: Tensor, accumulate: Callable[[Tensor], Tensor], kept: Sequence[Tensor] = ()) -> Tensor:
    """Returns x unchanged; in backward, ``accumulate(incoming)`` takes the place of the gradient that flows into x.

    It adds the auxiliary gradient in the incoming one's dtype, and leaves the incoming tensor as it is.
    The result must be used in place of x: what follows then depends on this node, which makes it right under
    recomputation too, where x's memory is filled again only before the backward of what follows.

    Args:
        kept: tensors that ``accumulate`` needs, see ``kept_by``. They are kept as autograd keeps its own: hooks on
            saved tensors may take them elsewhere until then.
    """
    return _AddGradient.apply(x, accumulate, kept)


def kept_by(x: Tensor, kept: Tensor) -> Callable[[], Tensor]:
    """Gives, in backward, what ``x = add_gradient(..., [kept])`` keeps, without keeping it, too."""
    if x.grad_fn is None:  # no gradient flows
        return lambda: kept
    node = weakref.ref(x.grad_fn)

    def saved() -> Tensor:
        found = node()
        if found is None:
            raise RuntimeError("a part of what the experts computed was dropped before the backward pass of the others")
        return found.saved_tensors[0].detach()

    return saved


class _AddWeightGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gradients: Callable, *weights: Tensor) -> Tensor:
        ctx.callback = gradients
        return x.detach()  # as above

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple:
        return incoming, None, *without_autocast(_take_callback(ctx))


def add_weight_gradients(
    x: Tensor, weights: Sequence[Tensor], gradients: Callable[[], Sequence[Optional[Tensor]]]
) -> Tensor:
    """Returns x unchanged; in the backward pass through x, ``gradients()`` are added to those of ``weights``.

    The edge to each weight makes its gradient wait for this one, and with it all that is hooked on the gradient being
    complete. A gradient may be None.
    """
    return _AddWeightGradients.apply(x, gradients, *weights)


def join(x: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Returns x unchanged; the backward pass through x goes through ``others`` too, with a gradient of zero."""
    return add_weight_gradients(x, others, lambda: [None] * len(others))


class _ReplaceSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, probs: Tensor, results: list[Tensor], gradient: Callable, keeps: bool) -> Tensor:
        ctx.save_for_backward(y, probs, results[0] if keeps else None)
        ctx.callback = gradient
        return results[0]

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple:
        y_gradient, probs_gradient = without_autocast(_take_callback(ctx), *ctx.saved_tensors, incoming)
        of_y, of_probs, *_ = ctx.needs_input_grad
        return y_gradient if of_y else None, probs_gradient if of_probs else None, None, None, None


def replace_swiglu(
    z: Tensor,
    inputs: tuple[Tensor, Tensor],
    gradient: Callable[[Tensor, Tensor, Optional[Tensor], Tensor], tuple[Tensor, Tensor]],
    keeps: bool,
) -> Tensor:
    """Returns z with another backward function of the inputs (y, probs) that it was made of.

    In backward, ``gradient(y, probs, z, incoming)`` returns the gradients of y and of the probabilities. The result
    must be used in place of z, whose own node is then freed; both keep the same tensors.

    Args:
        keeps: whether the node keeps z, too; else ``gradient`` gets None for it.
    """
    # In a list: as an input it would become a view.
    return _ReplaceSwiGLU.apply(*inputs, [z.detach()], gradient, keeps)


@contextmanager
def separate_graph() -> Iterator[None]:
    """Context to differentiate a loss in: gradients on, hooks on saved tensors of the surrounding code off.

    Those belong to checkpoints that are not reentrant, or to offloading.
    """
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        yield
