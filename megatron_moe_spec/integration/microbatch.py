"""Which micro-batch a layer is working on: in forward, in a checkpoint's first pass, and in its recomputation."""

import weakref
from collections import deque
from functools import partial
from typing import Optional

import torch
from torch import Tensor, nn

from megatron_moe_spec.integration.compat import stage_module


class MicroBatch:
    """What the MoE layers of a model chunk know of one micro-batch. Lives as long as its autograd graph.

    Attributes:
        number: counts the micro-batches of a training step from 0.
        routing: per MoE layer of the chunk, its ``LayerRouting``; None until the layer's router has run.
        before: that of the last MoE layer of the stages before; None if there is none, or it does not count.
        pull_after: what the loss of this chunk's last MoE layer and the next stage's first asks of this chunk, known
            once the gradient of the chunk's output is; None if there is no such loss.
    """

    def __init__(self, number: int, num_layers: int):
        self.number = number
        self.routing = [None] * num_layers
        self.before = None
        self.pull_after: Optional[Tensor] = None

    def previous(self, layer: int):
        return self.routing[layer - 1] if layer else self.before

    def following(self, layer: int):
        return self.routing[layer + 1] if layer + 1 < len(self.routing) else None


class MicroBatchTracker:
    """Tells a layer of one model chunk which micro-batch it serves, or that it should stay out.

    The chunk's forward opens a micro-batch. A layer that runs inside it without gradients is in the first pass
    of an activation checkpoint; one that runs outside it with gradients is being recomputed in backward, for
    the oldest micro-batch whose recomputation it still owes (Megatron's schedules are first in, first out for
    each chunk). Evaluation and passes without gradients open nothing.

    The schedule that overlaps a forward with another micro-batch's backward (``overlap_moe_expert_parallel_comm``)
    calls no chunk's forward: it builds a plan of its layers' parts and runs them. Building one opens a micro-batch,
    which is the current one until the next is built; layers are not recomputed then.

    Args:
        chunk: the module that is called for each micro-batch.
        num_layers: its number of MoE layers.
        carry: brings messages from and to other pipeline stages; None: no messages.
    """

    def __init__(self, chunk: nn.Module, num_layers: int, carry=None):
        self._num_layers = num_layers
        self._carry = carry
        self._current: Optional[MicroBatch] = None
        self._owed = [deque() for _ in range(num_layers)]
        self._started = 0
        self._hooks = [
            chunk.register_forward_pre_hook(self._open),
            chunk.register_forward_hook(self._close, always_call=True),
        ]
        self._stage = stage_module(chunk)
        self._build_plan = getattr(self._stage, "build_schedule_plan", None)
        if self._build_plan is not None:
            self._stage.build_schedule_plan = partial(_open_and_build_plan, self)

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._build_plan is not None:
            del self._stage.build_schedule_plan

    def start_step(self) -> None:
        """A training step begins."""
        self._current = None
        self._started = 0

    def _open(self, module, args=()) -> None:
        live = module.training and torch.is_grad_enabled()
        self._current = MicroBatch(self._started, self._num_layers) if live else None
        self._started += live
        if self._carry is not None:
            self._carry.open(self._current)

    def _close(self, module, args, output):
        micro_batch, self._current = self._current, None
        if self._carry is not None:
            output = self._carry.pack(output, micro_batch)
        node = _gradient_node(output)
        if node is not None and micro_batch is not None:
            # The layers' own references are weak, so that a micro-batch that never sees backward is forgotten.
            node.metadata["megatron_moe_spec"] = micro_batch
        return output

    def enter(self, layer: int, module: nn.Module) -> tuple[Optional[MicroBatch], bool]:
        """The micro-batch that a layer's router is called for (None: stay out), and whether it is recomputed.

        Raises:
            RuntimeError: the layer runs with gradients outside the forward of the attached model.
        """
        if not module.training:
            return None, False
        if self._current is not None:
            if not torch.is_grad_enabled():
                self._owed[layer].append(weakref.ref(self._current))
            return self._current, False
        if not torch.is_grad_enabled():
            return None, False
        while self._owed[layer]:
            micro_batch = self._owed[layer].popleft()()
            if micro_batch is not None:
                return micro_batch, True
        raise RuntimeError(
            "an MoE layer ran outside the forward of the model given to attach(): attach the module whose "
            "forward is called for each micro-batch"
        )


def _open_and_build_plan(tracker: MicroBatchTracker, *args, **kwargs):
    """Stands in for ``build_schedule_plan`` of a model."""
    tracker._open(tracker._stage)
    return tracker._build_plan(*args, **kwargs)


def _gradient_node(output):
    """The autograd node of the first tensor in a model's output that has one."""
    if isinstance(output, Tensor):
        return output.grad_fn
    if isinstance(output, dict):
        output = output.values()
    elif not isinstance(output, (tuple, list)):
        return None
    return next((node for node in map(_gradient_node, output) if node is not None), None)
