"""Collectives that NCCL has and gloo lacks.

all_gather and reduce_scatter of tensors that differ in shape, as Megatron's all-to-all dispatcher uses them with expert
tensor parallelism; and those of one tensor for all ranks whatever its shape, such as [ranks, n, m] for [n, m].
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

Group = Optional[dist.ProcessGroup]
_all_gather = dist.all_gather
_reduce_scatter = dist.reduce_scatter
# Names of two functions, in different releases of torch.
_OF_ONE_TENSOR = (
    "all_gather_into_tensor", "_all_gather_base", "all_gather_single",
    "reduce_scatter_tensor", "_reduce_scatter_base", "reduce_scatter_single",
)  # fmt: skip


class _Done:
    """The work handle of a collective that has run already."""

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def replace() -> None:
    """Replaces those of ``torch.distributed`` by the functions below."""
    for module in (dist, distributed_c10d):
        module.all_gather = all_gather
        module.reduce_scatter = reduce_scatter
    for name in _OF_ONE_TENSOR:
        if hasattr(distributed_c10d, name):
            collective = _of_flat_tensors(getattr(distributed_c10d, name))
            for module in (dist, distributed_c10d):
                setattr(module, name, collective)


def _of_flat_tensors(collective: Callable[..., Any]) -> Callable[..., Any]:
    # NCCL counts elements; gloo wants shapes that are concatenated.
    signature = inspect.signature(collective)
    output, input = list(signature.parameters)[:2]

    @functools.wraps(collective)
    def flat_collective(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.arguments[output] = call.arguments[output].view(-1)
        call.arguments[input] = call.arguments[input].reshape(-1)
        return collective(*call.args, **call.kwargs)

    return flat_collective


def all_gather(tensor_list: list[Tensor], tensor: Tensor, group: Group = None, async_op: bool = False) -> Any:
    """``torch.distributed.all_gather``, for any shapes: all ranks pad to the largest."""
    if _same_shapes(tensor_list):
        return _all_gather(tensor_list, tensor, group=group, async_op=async_op)
    size = max(t.numel() for t in tensor_list)
    padded = tensor.new_zeros(size)
    padded[: tensor.numel()] = tensor.reshape(-1)
    gathered = [torch.empty_like(padded) for _ in tensor_list]
    _all_gather(gathered, padded, group=group)
    for output, flat in zip(tensor_list, gathered):
        output.copy_(flat[: output.numel()].view_as(output))
    return _Done() if async_op else None


def reduce_scatter(
    output: Tensor, input_list: list[Tensor], op: Any = dist.ReduceOp.SUM, group: Group = None, async_op: bool = False
) -> Any:
    """``torch.distributed.reduce_scatter``, for any shapes: one reduction per rank."""
    if _same_shapes(input_list):
        return _reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)
    for rank, tensor in enumerate(input_list):
        reduced = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(reduced, op=op, group=group)
        if rank == dist.get_rank(group):
            output.copy_(reduced)
    return _Done() if async_op else None


def _same_shapes(tensors: list[Tensor]) -> bool:
    return len({t.shape for t in tensors}) <= 1
