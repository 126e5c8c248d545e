"""Adding a gradient to a tensor without touching its value."""

from typing import Callable

import torch
from torch import Tensor


class _AddGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, accumulate):
        ctx.accumulate = accumulate
        return x

    @staticmethod
    def backward(ctx, incoming):
        # Dropped at once: it holds activations that must not outlive this node's turn.
        accumulate, ctx.accumulate = ctx.accumulate, None
        if accumulate is None:
            raise RuntimeError("the auxiliary loss's gradient was already used: backward ran twice on one graph")
        return accumulate(incoming), None


def add_gradient(x: Tensor, accumulate: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns x unchanged; in backward, ``accumulate(incoming)`` takes the place of the gradient that flows into x.

    It adds the auxiliary gradient in the incoming one's dtype, and leaves the incoming tensor as it is.
    The result must be used in place of x: what follows then depends on this node, which makes it right under
    recomputation too, where x's memory is filled again only before the backward of what follows.
    """
    return _AddGradient.apply(x, accumulate)
