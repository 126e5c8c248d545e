"""What the caller has switched on for its own tensors, and not for ours."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch


def without_autocast() -> AbstractContextManager:
    """Context for what the losses compute, whose dtypes are their own. Costs next to nothing where autocast is off."""
    if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        return _without_autocast()
    return _NOTHING


_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def _without_autocast() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for device in ("cuda", "cpu"):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextlib.contextmanager
def lasting_tensors() -> Iterator[None]:
    """Context, or decorator, of what makes tensors for later steps: those of inference mode could not be changed."""
    with torch.inference_mode(False), torch.no_grad(), without_autocast():
        yield
