"""Activation checkpoints: what runs in their first pass, and in their recomputation."""

import functools
import sys
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor


def follow_checkpoints(first_pass: Callable, recomputation: Callable) -> None:
    """Tells what runs in a reentrant checkpoint: Megatron's, Transformer Engine's and torch's own.

    Each is an autograd Function; its forward is the first pass, its backward recomputes it. A second call looks for
    checkpoints that were imported since. There is no way back, and no need for one: without trackers, nothing happens.

    Args:
        first_pass: whether the checkpoint was made with gradients -> context manager around the first pass, which gives
            a value for the recomputation.
        recomputation: that value -> context manager around the backward.
    """
    for module_name, name in _CHECKPOINTS:
        function = getattr(sys.modules.get(module_name), name, None)
        if function is not None and not hasattr(function, "megatron_moe_spec"):
            _follow(function, first_pass, recomputation)
            function.megatron_moe_spec = True


_CHECKPOINTS = (
    ("megatron.core.tensor_parallel.random", "CheckpointFunction"),
    ("torch.utils.checkpoint", "CheckpointFunction"),
    ("transformer_engine.pytorch.distributed", "_CheckpointFunction"),
)


def _follow(function: Any, first_pass: Callable, recomputation: Callable) -> None:
    forward, backward = function.forward, function.backward
    has_gradients = [False]  # forward itself always runs without

    def followed_apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        has_gradients.append(torch.is_grad_enabled())
        try:
            return super(function, cls).apply(*args, **kwargs)
        finally:
            has_gradients.pop()

    @functools.wraps(forward)
    def followed_forward(ctx: Any, *args: Any, **kwargs: Any) -> Any:
        with first_pass(has_gradients[-1]) as ctx.megatron_moe_spec:
            return forward(ctx, *args, **kwargs)

    @functools.wraps(backward)
    def followed_backward(ctx: Any, *gradients: Optional[Tensor]) -> Any:
        with recomputation(getattr(ctx, "megatron_moe_spec", [])):
            return backward(ctx, *gradients)

    function.apply = classmethod(followed_apply)
    function.forward, function.backward = staticmethod(followed_forward), staticmethod(followed_backward)
