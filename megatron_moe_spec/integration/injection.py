"""Adding a gradient to a tensor without touching its value."""

from typing import Callable, Sequence

import torch
from torch import Tensor


class _AddGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gradient):
        ctx.gradient = gradient
        return x

    @staticmethod
    def backward(ctx, incoming):
        # Dropped at once: it holds activations that must not outlive this node's turn.
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("the auxiliary loss's gradient was already used: backward ran twice on one graph")
        return incoming + gradient().to(incoming.dtype), None


def add_gradient(x: Tensor, gradient: Callable[[], Tensor]) -> Tensor:
    """Returns x unchanged; in backward, ``gradient()`` (shaped like x) is added to what flows into x.

    The result must be used in place of x: what follows then depends on this node, which makes it right under
    recomputation too, where x's memory is filled again only before the backward of what follows.
    """
    return _AddGradient.apply(x, gradient)


class _AddWeightGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gradients, *weights):
        ctx.gradients = gradients
        return x

    @staticmethod
    def backward(ctx, incoming):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the auxiliary loss's gradient was already used: backward ran twice on one graph")
        return incoming, None, *gradients()


def add_weight_gradients(x: Tensor, weights: Sequence[Tensor], gradients: Callable[[], Sequence]) -> Tensor:
    """Returns x unchanged; in the backward pass through x, ``gradients()`` are added to those of ``weights``.

    The edge to each weight makes its gradient wait for this one, and with it all that is hooked on the gradient being
    complete. A gradient may be None.
    """
    return _AddWeightGradients.apply(x, gradients, *weights)
