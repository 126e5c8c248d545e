"""Reductions and gathers over process groups, which cost nothing where a group has one rank."""

import torch
import torch.distributed as dist
from torch import Tensor


def all_reduce_sum(x: Tensor, group) -> Tensor:
    """Sum of x over a group's ranks, on all of them; x itself stays as it is."""
    return _all_reduce(x, group, dist.ReduceOp.SUM)


def all_reduce_max(x: Tensor, group) -> Tensor:
    """Maximum of x over a group's ranks, on all of them; x itself stays as it is."""
    return _all_reduce(x, group, dist.ReduceOp.MAX)


def all_gather(x: Tensor, group) -> Tensor:
    """The ranks' [n, ...], which have the same n, one after another: [ranks * n, ...]."""
    if group.size() == 1:
        return x
    output = x.new_empty(group.size() * len(x), *x.shape[1:])
    # Gloo takes no bool.
    as_bytes = (output.view(torch.uint8), x.contiguous().view(torch.uint8)) if x.dtype == torch.bool else (output, x)
    dist.all_gather_into_tensor(*as_bytes, group=group)
    return output


def _all_reduce(x: Tensor, group, operation) -> Tensor:
    if group.size() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x, op=operation, group=group)
    return x
