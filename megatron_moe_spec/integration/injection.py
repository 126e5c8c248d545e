"""Adding a gradient to a tensor without touching its value."""

from typing import Callable

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
