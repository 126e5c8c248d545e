"""Gloo in the place of NCCL, with the collectives that it lacks.

all_gather and reduce_scatter of tensors that differ in shape, as Megatron's all-to-all dispatcher uses them with expert
tensor parallelism; and those of one tensor for all ranks whatever its shape, such as [ranks, n, m] for [n, m].
"""

import functools
import inspect
import os
import warnings
from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from megatron_moe_spec.cpu.cuda_api import constant

Group = Optional[dist.ProcessGroup]
_all_gather = dist.all_gather
_reduce_scatter = dist.reduce_scatter
# Names of two functions, in different releases of torch.
_OF_ONE_TENSOR = (
    "all_gather_into_tensor", "_all_gather_base", "all_gather_single",
    "reduce_scatter_tensor", "_reduce_scatter_base", "reduce_scatter_single",
)  # fmt: skip
_warned = False


class _Done:
    """The work handle of a collective that has run already."""

    wait = is_completed = constant(True)


def replace() -> None:
    """Replaces those of ``torch.distributed`` by the functions below."""
    replacements: dict[str, Callable[..., Any]] = {"all_gather": all_gather, "reduce_scatter": reduce_scatter}
    for names, change in ((_OF_ONE_TENSOR, _flatten), (("init_process_group", "new_group"), _use_gloo)):
        for name in names:
            if hasattr(distributed_c10d, name):
                replacements[name] = _with_arguments(getattr(distributed_c10d, name), change)
    for name, function in replacements.items():
        setattr(dist, name, function)
        setattr(distributed_c10d, name, function)


def _with_arguments(function: Callable[..., Any], change: Callable[[dict[str, Any]], None]) -> Callable[..., Any]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def changed(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        change(call.arguments)
        return function(*call.args, **call.kwargs)

    return changed


def _flatten(arguments: dict[str, Any]) -> None:
    # NCCL counts elements; gloo wants shapes that are concatenated.
    output, input = list(arguments)[:2]
    arguments[output] = arguments[output].view(-1)
    arguments[input] = arguments[input].reshape(-1)


def _use_gloo(arguments: dict[str, Any]) -> None:
    global _warned
    backend = str(arguments.get("backend")).lower()
    if "nccl" in backend:
        if not _warned and os.environ.get("RANK", "0") == "0":
            warnings.warn(f"on CPU, process groups use gloo where the script asks for {backend}", stacklevel=3)
        _warned = True
        arguments["backend"] = "gloo"
        # They are NCCL's.
        arguments.pop("pg_options", None)
        arguments.pop("device_id", None)


def all_gather(tensor_list: list[Tensor], tensor: Tensor, group: Group = None, async_op: bool = False) -> Any:
    """``torch.distributed.all_gather``, for any shapes: all ranks pad to the largest."""
    if len({output.shape for output in tensor_list}) <= 1:
        return _all_gather(tensor_list, tensor, group=group, async_op=async_op)
    padded = tensor.new_zeros(max(output.numel() for output in tensor_list))
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
    if len({tensor.shape for tensor in input_list}) <= 1:
        return _reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)
    for rank, tensor in enumerate(input_list):
        reduced = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(reduced, op=op, group=group)
        if rank == dist.get_rank(group):
            output.copy_(reduced)
    return _Done() if async_op else None
