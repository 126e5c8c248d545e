"""Reduction of a step's values over the ranks that hold the model."""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor


def reduced(
    x: Tensor, groups: Sequence[dist.ProcessGroup], operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Tensor:
    """x over one process group after another, which is over all ranks; x itself stays as it is. A collective."""
    x = x.clone()
    for group in groups:
        try:
            dist.all_reduce(x, op=operation, group=group)
        except RuntimeError as error:
            raise RuntimeError(
                "the values to be logged could not be reduced: call end_step() on every rank of the model's "
                "process groups, or give attach() the ranks that hold it, attach(model, config, group=...)"
            ) from error
    return x
