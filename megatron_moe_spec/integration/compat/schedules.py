"""Megatron's pipeline schedules, and the loss scale that they set."""

import contextlib
import functools
import inspect
import itertools
import weakref
from collections.abc import Callable
from types import FunctionType
from typing import Any, Optional, Union

from torch import Tensor

from megatron_moe_spec.integration.compat.protocols import TransformerConfig


def around_schedules(owner: object, enter: Callable) -> None:
    """Has a context manager around every run of Megatron's schedules, whichever model they run, while ``owner`` lives.

    It does not matter when ``get_forward_backward_func`` was called: training loops keep what it returned.

    Args:
        enter: owner, the schedule's name, its keyword arguments -> context manager, which gives them as they are to be.
    """
    follow_schedules()
    _around_schedules[owner] = enter


def training_schedule() -> Optional[int]:
    """Index of the run of a schedule that trains, in which the caller is; None outside of any.

    Runs are counted from the first ``follow_schedules`` on.
    """
    return _running[-1] if _running else None


def follow_schedules() -> None:
    """Has runs of Megatron's schedules counted. A second call does nothing."""
    from megatron.core.pipeline_parallel import schedules

    for name in _SCHEDULES:
        # Inside what another package may have put around it.
        schedule = inspect.unwrap(getattr(schedules, name), stop=lambda one: hasattr(one, _MARK))
        if not hasattr(schedule, _MARK):
            _surround(schedule)


def leave_schedules(owner: object) -> None:
    """Undoes ``around_schedules``."""
    _around_schedules.pop(owner, None)


_SCHEDULES = (
    "forward_backward_no_pipelining",
    "forward_backward_pipelining_with_interleaving",
    "forward_backward_pipelining_without_interleaving",
)
_MARK = "megatron_moe_spec_original"
_originals: list[FunctionType] = []
_runs = itertools.count()
_running: list[Optional[int]] = []  # one inside another
_around_schedules: "weakref.WeakKeyDictionary[object, Callable]" = weakref.WeakKeyDictionary()


def _surround(schedule: FunctionType) -> None:
    """Has a schedule call ``_run``, whoever holds it: the function stays, and gets other code."""
    original = FunctionType(
        schedule.__code__, schedule.__globals__, schedule.__name__, schedule.__defaults__, schedule.__closure__
    )
    original.__kwdefaults__ = schedule.__kwdefaults__
    schedule.__wrapped__ = original  # type: ignore[attr-defined]  # its signature
    names: dict = {}
    exec(_GATE.format(module=__name__, name=schedule.__name__, index=len(_originals)), names)
    _originals.append(original)
    setattr(schedule, _MARK, original)
    schedule.__code__ = names[schedule.__name__].__code__
    schedule.__defaults__ = schedule.__kwdefaults__ = None


_GATE = """
def {name}(**arguments):
    from {module} import _run

    return _run({index}, arguments)
"""


def _run(index: int, arguments: dict) -> Any:
    original = _originals[index]
    _running.append(None if arguments.get("forward_only", False) else next(_runs))
    try:
        with contextlib.ExitStack() as stack:
            for owner, enter in list(_around_schedules.items()):
                arguments = stack.enter_context(enter(owner, original.__name__, arguments))
            return original(**arguments)
    finally:
        _running.pop()


def with_received_shapes(
    name: str, arguments: dict, transformer_config: TransformerConfig, num_ranks: int, change: Callable
) -> dict:
    """A schedule's keyword arguments, by which stages receive tensors of another shape from each other.

    Nothing changes where shapes travel with the tensors (``variable_seq_lengths``).

    Args:
        num_ranks: that a sequence is divided over.
        change: shape [sequence, batch, hidden] of this rank, dtype -> shape.
    """
    if transformer_config.variable_seq_lengths:
        return arguments
    dtype = transformer_config.pipeline_dtype
    if name != "forward_backward_pipelining_with_interleaving":
        adjust = arguments.get("adjust_tensor_shapes_fn")

        def adjust_tensor_shapes(receive: list, send: list) -> tuple:
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
    scale = _aux_loss_scaler().main_loss_backward_scale
    return 1.0 if scale is None else scale


@functools.cache  # asked for by every layer
def _aux_loss_scaler() -> Any:
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    return MoEAuxLossAutoScaler
