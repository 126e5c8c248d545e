"""Reductions and gathers over process groups, which cost nothing where a group has one rank."""

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")


def current_device() -> torch.device:
    """The device that this rank's collectives work on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def together(function: Callable[[], Result], groups: Sequence[dist.ProcessGroup], device: torch.device) -> Result:
    """What ``function`` returns; if it raises on one rank, all ranks raise: none waits for another that has stopped.

    Args:
        function: takes part in no collective.
        groups: process groups; a reduction over one, then over the next, is one over all ranks.
        device: that their back end reduces.

    Raises:
        Exception: what ``function`` raised here, or else what it raised on another rank, with that rank's number.
        RuntimeError: the other ranks do not take part.
    """
    result, error = None, None
    try:
        result = function()
    except Exception as raised:
        error = raised
    failed = torch.tensor(int(error is not None), device=device)
    try:
        for group in groups:
            failed = all_reduce_max(failed, group)
    except RuntimeError as unreached:
        raise error or RuntimeError(
            "other ranks of the model's process groups were not reached: call attach() on every rank that holds the "
            "model, or give it these ranks, attach(model, config, group=...)"
        ) from unreached
    if not failed:
        return cast(Result, result)
    found = [] if error is None else [(dist.get_rank(), type(error).__name__, str(error))]
    for group in groups:
        gathered: list = [None] * group.size()
        dist.all_gather_object(gathered, found, group=group)
        found = sorted(set(sum(gathered, [])))
    if error is not None:
        raise error
    rank, name, message = found[0]
    raise _RAISED.get(name, RuntimeError)(f"on rank {rank}: {message}")


_RAISED = {kind.__name__: kind for kind in (ImportError, OSError, TypeError, ValueError)}


def all_reduce_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum of x over a group's ranks, on all of them; x itself stays as it is."""
    return _all_reduce(x, group, dist.ReduceOp.SUM)


def all_reduce_max(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Maximum of x over a group's ranks, on all of them; x itself stays as it is."""
    return _all_reduce(x, group, dist.ReduceOp.MAX)


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The ranks' [n, ...], which have the same n, one after another: [ranks * n, ...]."""
    if group.size() == 1:
        return x
    output = x.new_empty(group.size() * len(x), *x.shape[1:])
    # Gloo takes no bool.
    as_bytes = (output.view(torch.uint8), x.contiguous().view(torch.uint8)) if x.dtype == torch.bool else (output, x)
    dist.all_gather_into_tensor(*as_bytes, group=group)
    return output


def _all_reduce(x: Tensor, group: dist.ProcessGroup, operation: dist.ReduceOp) -> Tensor:
    if group.size() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x, op=operation, group=group)
    return x
