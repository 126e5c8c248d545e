"""Tells the micro-batch that a layer works on: in forward, in a checkpoint's first pass, and in its recomputation."""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, Optional, Protocol

import torch
from torch import Tensor, nn

from megatron_moe_spec.integration.compat.checkpoints import follow_checkpoints
from megatron_moe_spec.integration.compat.models import called_module, stage_module
from megatron_moe_spec.integration.hooks.modes import without_autocast
from megatron_moe_spec.integration.hooks.replacement import Hook, MethodReplacement
from megatron_moe_spec.integration.hooks.routing import LayerRouting


class Notes:
    """What is to be counted of a micro-batch once its backward pass begins.

    A forward that failed, or that nobody calls backward for, trains nothing, and does not count.
    """

    def __init__(self) -> None:
        self._waiting: Optional[list[tuple[Callable, tuple]]] = []

    def add(self, note: Callable, *args: Any) -> None:
        """Calls ``note(*args)``, which counts something; at once in the backward pass."""
        if self._waiting is None:
            note(*args)
        else:
            self._waiting.append((note, args))

    def take(self, *gradient: Tensor) -> None:
        """The backward pass begins."""
        notes, self._waiting = self._waiting or [], None
        without_autocast(_call, notes)


def _call(notes: list[tuple[Callable, tuple]]) -> None:
    for note, args in notes:
        note(*args)


@dataclass(eq=False)
class MicroBatch:
    """State of the MoE layers of a model chunk for one micro-batch. Lives as long as its autograd graph."""

    index: int  # among the micro-batches of a training step
    routing: list[Optional[LayerRouting]]  # per MoE layer of the chunk; None until the layer's router has run
    before: Optional[LayerRouting] = None  # of the last MoE layer of the stages before, if it counts
    # Takes ``before`` from what the previous stage sent, given this rank's number of tokens.
    take_before: Optional[Callable[[int], LayerRouting]] = None
    # What the loss of this chunk's last MoE layer and the next stage's first asks of this chunk, known once the
    # gradient of the chunk's output is; None if there is no such loss.
    grad_from_next: Optional[Tensor] = None
    etp_ep_group_count: Optional[Tensor] = None  # see ``ExpertWeightsTap``; known once a layer has asked
    notes: Notes = field(default_factory=Notes)

    def previous(self, index: int) -> Optional[LayerRouting]:
        return self.routing[index - 1] if index else self.before

    def following(self, index: int) -> Optional[LayerRouting]:
        return self.routing[index + 1] if index + 1 < len(self.routing) else None


class MicroBatchTracker:
    """Tells a layer of one model chunk which micro-batch it serves, or that it should stay out.

    The chunk's forward opens a micro-batch. A layer that runs inside it without gradients is in the first pass of an
    activation checkpoint, or else does not train. A checkpoint's recomputation belongs to the micro-batch that was
    open when the checkpoint was made, whatever ran between, and in whatever order backward passes come. Evaluation and
    passes without gradients open nothing.

    The schedule that overlaps a forward with another micro-batch's backward (``overlap_moe_expert_parallel_comm``)
    calls no chunk's forward: it builds a plan of its layers' parts and runs them. Building one opens a micro-batch,
    which is the current one until the next is built.

    Attributes:
        has_padding: whether the chunk was given a padding mask for the micro-batch that runs.

    Args:
        chunk: the module that is called for each micro-batch.
        num_layers: its number of MoE layers.
        on_open: called with each micro-batch that is opened; None: nothing is.
        begin_forward: called before each forward that trains.
        end_first_forward: called after the first of them.
    """

    def __init__(
        self,
        chunk: nn.Module,
        num_layers: int,
        on_open: Optional[Callable[[MicroBatch], None]],
        begin_forward: Callable[[], None],
        end_first_forward: Callable[[], None],
    ):
        self._begin_forward = begin_forward
        self._end_first_forward: Optional[Callable[[], None]] = end_first_forward
        self._num_layers, self._on_open = num_layers, on_open
        self._current: Optional[MicroBatch] = None
        self._checkpoints = 0  # whose first pass is running, one inside another
        self._recomputing = False
        self._opened_in = -1
        self.has_padding = False
        self._started = 0
        stage, called = stage_module(chunk), called_module(chunk)
        self._hooks = [
            called.register_forward_pre_hook(Hook(self._open), with_kwargs=True),
            called.register_forward_hook(Hook(self._close), always_call=True),
        ]
        self._watchers: list[Watcher] = []
        self._methods = []
        if hasattr(stage, "build_schedule_plan"):
            self._methods = [MethodReplacement(stage, "build_schedule_plan", self._open_and_build_plan)]
        _trackers.add(self)
        follow_checkpoints(_first_pass, _recomputation)

    def watch(self, watcher: "Watcher") -> None:
        """Has a layer told of the forwards that train."""
        self._watchers.append(watcher)

    def detach(self) -> None:
        self._watchers = []
        _trackers.discard(self)
        for hook in self._hooks:
            hook.remove()
        for method in self._methods:
            method.restore()

    def begin_step(self) -> None:
        self._current, self._started = None, 0

    def _open(self, module: nn.Module, args: tuple, kwargs: Mapping) -> None:
        self.has_padding = kwargs.get("padding_mask") is not None
        trains = module.training and torch.is_grad_enabled()
        if trains:
            self._begin_forward()
            if not self._started:
                for watcher in self._watchers:
                    watcher.begin_first_forward()
        self._current = MicroBatch(self._started, [None] * self._num_layers) if trains else None
        self._opened_in = _backward_pass()
        self._started += trains
        if self._on_open is not None and self._current is not None:
            self._on_open(self._current)

    def _open_and_build_plan(self, build: MethodType, *args: Any, **kwargs: Any) -> Any:
        """Stands in for ``build_schedule_plan`` of a model."""
        self._open(build.__self__, args, kwargs)
        if self._current is not None:
            self._current.notes.take()
        return build(*args, **kwargs)

    def _close(self, module: nn.Module, args: tuple, output: Any) -> None:
        micro_batch, self._current = self._current, None
        if micro_batch is None or output is None:  # None: it has failed
            return
        for watcher, routing in zip(self._watchers, micro_batch.routing, strict=True):
            if routing is None:
                watcher.miss()
        if self._end_first_forward is not None:
            self._end_first_forward()
            self._end_first_forward = None
        # Of another kind of output nobody tells what becomes of it.
        tensors = list(_tensors_with_gradient(output))
        for tensor in tensors:
            tensor.register_hook(micro_batch.notes.take)
        if not tensors:
            micro_batch.notes.take()

    def enter(self, module: nn.Module) -> tuple[Optional[MicroBatch], bool]:
        """The micro-batch that a layer's router is called for (None: stay out), and whether it is recomputed.

        A layer that is in evaluation mode by itself, as frozen ones may be, does in a forward that trains what the
        others do: gradients go through it, and its neighbours are coupled with it.

        Raises:
            RuntimeError: the layer runs with gradients outside the forward of the attached model, or is recomputed by
                a checkpoint that ``compat.follow_checkpoints`` does not know.
        """
        if self._current is None and not module.training:
            return None, False
        has_gradients = torch.is_grad_enabled()
        if has_gradients and not self._recomputing and _backward_pass() not in (-1, self._opened_in):
            raise RuntimeError(
                "an MoE layer is recomputed by a checkpoint that does not tell for which micro-batch: set "
                "use_reentrant=True in torch.utils.checkpoint, or use Megatron's --recompute-granularity; with a "
                "checkpoint of your own, attach() before its first forward"
            )
        if self._current is not None:
            trains = has_gradients or self._checkpoints or self._recomputing
            return (self._current, self._recomputing) if trains else (None, False)
        if not has_gradients:
            return None, False
        raise RuntimeError(
            "an MoE layer ran outside the forward of the model given to attach(): attach the module whose "
            "forward is called for each micro-batch"
        )


class Watcher(Protocol):
    """An MoE layer of a chunk; see ``MicroBatchTracker.watch``."""

    def begin_first_forward(self) -> None:
        """The first of a training step begins."""

    def miss(self) -> None:
        """One has ended, and the layer had no part in it."""


def _tensors_with_gradient(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        if x.requires_grad:
            yield x
    elif isinstance(x, (list, tuple, Mapping)):
        for one in x.values() if isinstance(x, Mapping) else x:
            yield from _tensors_with_gradient(one)


def _backward_pass() -> int:
    """Index of the backward pass that runs now; -1 outside of any."""
    return torch._C._current_graph_task_id()


# Checkpoints know nothing of models: each is followed for all trackers.
_trackers: "weakref.WeakSet[MicroBatchTracker]" = weakref.WeakSet()


@contextlib.contextmanager
def _first_pass(has_gradients: bool) -> Iterator[list]:
    """Around the first pass of a checkpoint, made with gradients or without; gives what the recomputation needs."""
    served = [(tracker, tracker._current) for tracker in _trackers if has_gradients and tracker._current is not None]
    for tracker, _ in served:
        tracker._checkpoints += 1
    try:
        yield served
    finally:
        for tracker, _ in served:
            tracker._checkpoints -= 1


@contextlib.contextmanager
def _recomputation(served: list) -> Iterator[None]:
    """Around the backward of a checkpoint, which recomputes first; ``served`` is from its first pass."""
    before = [(tracker, tracker._current, tracker._recomputing) for tracker, _ in served]
    for tracker, micro_batch in served:
        tracker._current, tracker._recomputing = micro_batch, True
    try:
        yield
    finally:
        for tracker, micro_batch, recomputing in before:
            tracker._current, tracker._recomputing = micro_batch, recomputing
