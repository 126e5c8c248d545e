"""Megatron's pipeline schedules, and the loss scale that they set."""

import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import Union

from torch import Tensor


def around_schedules(owner, enter: Callable) -> None:
    """Has a context manager around every run of Megatron's schedules, whichever model they run, while ``owner`` lives.

    They are looked up in their module by ``get_forward_backward_func`` at each call.

    Args:
        enter: owner, the schedule's name, its keyword arguments -> context manager, which gives them as they are to be.
    """
    from megatron.core.pipeline_parallel import schedules

    for name in _SCHEDULES:
        schedule = getattr(schedules, name)
        if not hasattr(schedule, _MARK):
            setattr(schedules, name, _surrounded(schedule))
    _around_schedules[owner] = enter


def leave_schedules(owner) -> None:
    """Undoes ``around_schedules``."""
    _around_schedules.pop(owner, None)


_MARK = "megatron_moe_spec_around"
_SCHEDULES = (
    "forward_backward_no_pipelining",
    "forward_backward_pipelining_with_interleaving",
    "forward_backward_pipelining_without_interleaving",
)
_around_schedules: "weakref.WeakKeyDictionary[object, Callable]" = weakref.WeakKeyDictionary()


def _surrounded(schedule: Callable) -> Callable:
    @functools.wraps(schedule)
    def run(**arguments):
        with contextlib.ExitStack() as stack:
            for owner, enter in list(_around_schedules.items()):
                arguments = stack.enter_context(enter(owner, schedule.__name__, arguments))
            return schedule(**arguments)

    setattr(run, _MARK, True)
    return run


def with_received_shapes(name: str, arguments: dict, transformer_config, num_ranks: int, change: Callable) -> dict:
    """A schedule's keyword arguments, by which stages receive tensors of another shape from each other.

    Nothing changes where shapes travel with the tensors (``variable_seq_lengths``).

    Args:
        name, arguments: of the schedule, see ``around_schedules``.
        transformer_config: the model's TransformerConfig.
        num_ranks: that a sequence is divided over.
        change: shape [sequence, batch, hidden] of this rank, dtype -> shape.
    """
    if transformer_config.variable_seq_lengths:
        return arguments
    dtype = transformer_config.pipeline_dtype
    if name != "forward_backward_pipelining_with_interleaving":
        adjust = arguments.get("adjust_tensor_shapes_fn")

        def adjust_tensor_shapes(receive, send):
            if adjust is not None:
                receive, send = adjust(receive, send)
            return tuple([change(shape, dtype) for shape in shapes] for shapes in (receive, send))

        return {**arguments, "adjust_tensor_shapes_fn": adjust_tensor_shapes}
    # This schedule takes no such function. All that it does with the length is to compute the shape.
    shape = arguments["seq_length"] // num_ranks, arguments["micro_batch_size"], transformer_config.hidden_size
    return {**arguments, "seq_length": change(shape, dtype)[0] * num_ranks}


def backward_loss_scale() -> Union[Tensor, float]:
    """The factor that Megatron applies to auxiliary losses in this backward pass.

    Loss scaling may be dynamic and the schedules set it after each forward: read it in backward.
    """
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    scale = MoEAuxLossAutoScaler.main_loss_backward_scale
    return 1.0 if scale is None else scale
