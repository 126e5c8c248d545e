"""What the caller has switched on for its own tensors, and not for ours."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def _any_autocast() -> bool:
    return torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")


# The same in one call, where torch has it: it is asked for some ten times a layer.
is_any_autocast_enabled = getattr(torch._C, "_is_any_autocast_enabled", _any_autocast)


def without_autocast(function: Callable[..., Result], *args: Any) -> Result:
    """function(*args), which computes losses: the dtypes of these are their own."""
    if not is_any_autocast_enabled():
        return function(*args)
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        return function(*args)


@contextlib.contextmanager
def lasting_tensors() -> Iterator[None]:
    """Context, or decorator, of what makes tensors for later steps: those of inference mode could not be changed."""
    with torch.inference_mode(False), torch.no_grad():
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
