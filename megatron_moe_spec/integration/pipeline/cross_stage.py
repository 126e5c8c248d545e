"""Coupling across pipeline stages.

The routing of a stage's last MoE layer goes to the next stage with the hidden states; what the loss of the two layers
asks of it comes back with their gradient. Suffixes: T tokens, E experts, W numbers of a message per token.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Optional

import torch
from torch import Tensor, nn

from megatron_moe_spec.config import SpecConfig
from megatron_moe_spec.integration.compat.groups import sequence_ranks
from megatron_moe_spec.integration.compat.models import stage_module
from megatron_moe_spec.integration.compat.schedules import around_schedules, leave_schedules, with_received_shapes
from megatron_moe_spec.integration.hooks.micro_batch import MicroBatch
from megatron_moe_spec.integration.hooks.replacement import MethodReplacement
from megatron_moe_spec.integration.hooks.routing import LayerRouting, TokenCount
from megatron_moe_spec.integration.pipeline.stages import Stages
from megatron_moe_spec.integration.taps.pairs import neighbor_grad_of_following
from megatron_moe_spec.losses.coupling import Coupling
from megatron_moe_spec.parallel.messages import (
    Append,
    Strip,
    bits_to_numbers,
    decode,
    encode,
    is_marked,
    numbers_to_bits,
    packed_length,
    sequence_length,
)


@dataclass(frozen=True)
class MessageForm:
    """Layout of a message for each token: m (mass) or its scores (pathway), and, where routing is to be measured,
    the experts that it was dispatched to, eight in a number."""

    kind: str
    num_experts: int
    with_active: bool

    @property
    def scores_width(self) -> int:
        return 1 if self.kind == "mass" else self.num_experts

    @property
    def width(self) -> int:
        return self.scores_width + (-(-self.num_experts // 8) if self.with_active else 0)

    def packed_shape(self, shape, dtype: torch.dtype) -> tuple[int, int, int]:
        """Of hidden states [sequence, batch, hidden] with a message."""
        sequence, batch, hidden_size = shape
        return packed_length(sequence, hidden_size, dtype, self.width), batch, hidden_size

    def of_routing(self, routing: LayerRouting) -> Tensor:
        parts = [routing.message.reshape(-1, self.scores_width).float()]
        if self.with_active:
            parts.append(bits_to_numbers(routing.active_TE))
        return torch.cat(parts, dim=1)

    def to_routing(self, message_TW: Tensor) -> LayerRouting:
        active_TE = None
        if self.with_active:
            active_TE = numbers_to_bits(message_TW[:, self.scores_width :], self.num_experts)
        return LayerRouting(active_TE, TokenCount(0, 0), message=self.to_neighbor_grad(message_TW))

    def of_neighbor_grad(self, neighbor_grad: Tensor) -> Tensor:
        neighbor_grad_TW = neighbor_grad.reshape(-1, self.scores_width).float()
        return torch.nn.functional.pad(neighbor_grad_TW, (0, self.width - self.scores_width))

    def to_neighbor_grad(self, message_TW: Tensor) -> Tensor:
        """[T] (mass) or [T, E] (pathway)."""
        return message_TW[:, 0] if self.kind == "mass" else message_TW[:, : self.scores_width]


class StageMessages:
    """Packs and unpacks the messages of one model chunk, in the forward steps of a training schedule.

    Megatron's schedule hands a stage its input by ``set_input_tensor``, calls the step function, which runs the chunk,
    and sends what that returns. So a message is unpacked from what the schedule hands over, not from what the step
    function may set itself, and packed on what the step function returns, which may hold more than this chunk's hidden
    states. A step may run the chunk several times: their messages lie one after another.

    Args:
        chunk: the chunk.
        form: what messages hold.
        is_last: whether no stage follows.
        has_layers, has_layers_before: whether this stage, and an earlier one, has an MoE layer.
    """

    def __init__(self, chunk: nn.Module, form: MessageForm, is_last: bool, has_layers: bool, has_layers_before: bool):
        self.stage = stage_module(chunk)
        self.owner: Optional[CrossStageCoupling] = None
        self._form = form
        self._is_last, self._has_layers, self._has_layers_before = is_last, has_layers, has_layers_before
        self._training = False
        self._step: Optional[_Step] = None
        self._runs_step = False
        self._all_marked: Optional[Tensor] = None
        self._method = MethodReplacement(self.stage, "set_input_tensor", self._set_input_tensor)

    def detach(self) -> None:
        self._method.restore()

    @contextlib.contextmanager
    def schedule(self, trains: bool) -> Iterator[None]:
        """Around a run of a schedule; ``trains``: it is a training step of this chunk's model."""
        before, self._training, self._step = self._training, trains, None
        try:
            yield
        finally:
            self._training, self._step = before, None

    def run_step(self, step_function, *args, **kwargs):
        """Runs the step function of a training schedule on this chunk."""
        step = self._step or _Step(None)
        self._step, self._runs_step = step, True
        try:
            output, *others = step_function(*args, **kwargs)
            return (self._pack(output, step), *others)
        finally:
            self._step, self._runs_step = None, False

    def open(self, micro_batch: MicroBatch) -> None:
        """The chunk's forward begins.

        Raises:
            RuntimeError: it is not run by a schedule that carries messages.
        """
        if not (self._training and self._runs_step):
            raise RuntimeError(
                "a pipeline stage trains outside of Megatron's schedule, which carries the coupling of layers in "
                "different stages (train by what get_forward_backward_func() returns, or set "
                "--moe-coupling-across-stages drop)"
            )
        step = self._step
        step.micro_batches.append(micro_batch)
        if step.message_TW is not None and self._has_layers_before:
            micro_batch.take_before = functools.partial(_take, step, self._form)

    def check(self) -> None:
        """A training step ends. Synchronises with the device.

        Raises:
            RuntimeError: something that arrived in it was no message.
        """
        if self._all_marked is not None:
            _raise_unless(bool(self._all_marked))

    def _set_input_tensor(self, original, input_tensor):
        if not self._training or self._runs_step:
            return original(input_tensor)
        tensors = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        if any(x is not None for x in tensors):
            if len(tensors) != 1 or not isinstance(tensors[0], Tensor):
                raise RuntimeError(_NOT_ONE_TENSOR)
            tensors = [self._unpack(tensors[0])]
        return original(tensors if isinstance(input_tensor, list) else tensors[0])

    def _unpack(self, packed: Tensor) -> Tensor:
        """Returns the output of the previous stage's step, without the message."""
        batch, hidden_size = packed.shape[1:]
        width = self._form.width
        length = sequence_length(len(packed), hidden_size, packed.dtype, width)
        _raise_unless(packed_length(length, hidden_size, packed.dtype, width) == len(packed))
        rows = packed.detach()[length:]
        self._note_mark(rows)
        self._step = step = _Step(decode(rows, length * batch, width))
        return Strip.apply(packed, length, functools.partial(self._answer, step))

    def _pack(self, output, step: "_Step"):
        """Returns the step's output with the message for the next stage; unchanged on the last stage."""
        if self._is_last:
            return output
        if not isinstance(output, Tensor) or output.dim() != 3:
            raise RuntimeError(_NOT_ONE_TENSOR)
        num_tokens = output.shape[0] * output.shape[1]
        message_TW = step.message(self._form) if self._has_layers else step.message_TW
        if message_TW is None:  # nobody may take one for a message
            message_TW = output.new_full((num_tokens, self._form.width), torch.nan, dtype=torch.float32)
        if len(message_TW) > num_tokens:
            raise RuntimeError(
                f"a step returned {num_tokens} tokens for the next pipeline stage, and ran the model on "
                f"{len(message_TW)}: its coupling cannot go with them (set --moe-coupling-across-stages drop)"
            )
        rows = encode(message_TW, output.detach(), self._form.width)

        def receive(gradient_rows: Tensor) -> None:
            self._note_mark(gradient_rows)
            step.take_neighbor_grad(decode(gradient_rows, num_tokens, self._form.width), self._form, self._has_layers)

        return Append.apply(output, rows, receive)

    def _answer(self, step: "_Step", like: Tensor) -> Tensor:
        """Rows for the previous stage: what the losses here ask of it."""
        return encode(step.neighbor_grad_before(self._form, self._has_layers), like, self._form.width)

    def _note_mark(self, rows: Tensor) -> None:
        marked = is_marked(rows)
        if self._all_marked is None:  # the first: before anything is computed of it
            _raise_unless(bool(marked))
            self._all_marked = marked
        else:
            self._all_marked &= marked


@dataclass
class _Step:
    """One forward step of a chunk, and its backward.

    Attributes:
        message_TW: from the previous stage; None if there is none.
        micro_batches: that were opened in it, in their order.
        num_taken: tokens of the message that have found their micro-batch.
        neighbor_grad_TW: from the next stage, on a stage without MoE layers, which only passes it on.
    """

    message_TW: Optional[Tensor]
    micro_batches: list[MicroBatch] = field(default_factory=list)
    num_taken: int = 0
    neighbor_grad_TW: Optional[Tensor] = None

    def message(self, form: MessageForm) -> Optional[Tensor]:
        """Of the chunk's last MoE layer, in one micro-batch after another; None where there is no micro-batch."""
        if any(m.routing[-1] is None for m in self.micro_batches):
            raise RuntimeError(
                "the last MoE layer of a pipeline stage ran without gradients or in evaluation mode in a forward that "
                "trains: its coupling with the next stage is unknown (set --moe-coupling-across-stages drop)"
            )
        messages = [form.of_routing(m.routing[-1]) for m in self.micro_batches]
        return torch.cat(messages) if messages else None

    def take_neighbor_grad(self, neighbor_grad_TW: Tensor, form: MessageForm, has_layers: bool) -> None:
        if not has_layers:
            self.neighbor_grad_TW = neighbor_grad_TW
            return
        start = 0
        for micro_batch in self.micro_batches:
            end = start + len(micro_batch.routing[-1].active_TE)
            micro_batch.grad_from_next = form.to_neighbor_grad(neighbor_grad_TW[start:end])
            start = end

    def neighbor_grad_before(self, form: MessageForm, has_layers: bool) -> Optional[Tensor]:
        if not has_layers:
            return self.neighbor_grad_TW
        coupled = [m for m in self.micro_batches if m.before is not None]
        if coupled and len(coupled) < len(self.micro_batches):
            raise RuntimeError(
                "the first MoE layer of a pipeline stage ran without gradients or in evaluation mode in one of the "
                "forwards of a step: their coupling cannot be told apart (set --moe-coupling-across-stages drop)"
            )
        grads = [neighbor_grad_of_following(form.kind, m.before, m.routing[0]) for m in coupled]
        return torch.cat([form.of_neighbor_grad(grad) for grad in grads]) if grads else None


def _take(step: _Step, form: MessageForm, num_tokens: int) -> LayerRouting:
    """The next micro-batch's part of a step's message."""
    start, step.num_taken = step.num_taken, step.num_taken + num_tokens
    if step.num_taken > len(step.message_TW):
        raise RuntimeError(
            f"a pipeline stage ran the model on {step.num_taken} tokens, of which the stage before sent "
            f"{len(step.message_TW)} (set --moe-coupling-across-stages drop)"
        )
    return form.to_routing(step.message_TW[start : step.num_taken])


_NOT_ONE_TENSOR = (
    "pipeline stages of this model do not send one tensor [sequence, batch, hidden] each, which could carry the "
    "coupling of layers in different stages (set --moe-coupling-across-stages drop)"
)


def _raise_unless(is_message: bool) -> None:
    if not is_message:
        raise RuntimeError(
            "a pipeline stage received hidden states without the coupling loss's message: attach the losses on every "
            "stage, or set --moe-coupling-across-stages drop"
        )


class CrossStageCoupling:
    """The carries of a model's chunks on this rank, and what connects them to Megatron's schedules.

    Args:
        chunks: the chunks.
        stages: of the whole model.
        spec: the losses.
    """

    def __init__(self, chunks: list[nn.Module], stages: Stages, spec: SpecConfig):
        self.of_chunks: list[Optional[StageMessages]] = [None] * len(chunks)
        self._cross_stage: list[StageMessages] = []
        if not stages.several_ranks or not spec.carries_messages:
            return
        (loss,) = (loss for loss in spec.losses if isinstance(loss, Coupling))
        self._form = MessageForm(loss.kind, stages.num_experts, spec.metrics_interval > 0)
        last = len(stages.num_layers) - 1
        self._cross_stage = self.of_chunks = [
            StageMessages(chunk, self._form, stage == last, stages.num_layers[stage] > 0, first > 0)
            for chunk, stage, first in zip(chunks, stages.own, stages.first_layers)
        ]
        for carry in self._cross_stage:
            carry.owner = self  # which lives as long as the model has its losses, whoever keeps the handle
        around_schedules(self, CrossStageCoupling._around_schedule)

    def detach(self) -> None:
        leave_schedules(self)
        for carry in self._cross_stage:
            carry.detach()
        self._cross_stage = []

    def check(self) -> None:
        """See ``StageMessages.check``."""
        for carry in self._cross_stage:
            carry.check()

    @contextlib.contextmanager
    def _around_schedule(self, name: str, arguments: dict) -> Iterator[dict]:
        model = arguments["model"]
        models = list(model) if isinstance(model, (list, tuple, nn.ModuleList)) else [model]
        carries = {id(chunk): carry for chunk in models if (carry := self._carry_in(chunk)) is not None}
        trains = bool(carries) and not arguments.get("forward_only", False)
        with contextlib.ExitStack() as stack:
            for carry in self._cross_stage:
                stack.enter_context(carry.schedule(trains))
            yield self._carrying(name, arguments, carries) if trains else arguments

    def _carry_in(self, chunk) -> Optional[StageMessages]:
        modules = set(chunk.modules()) if isinstance(chunk, nn.Module) else ()
        return next((carry for carry in self._cross_stage if carry.stage in modules), None)

    def _carrying(self, name: str, arguments: dict, carries: dict[int, StageMessages]) -> dict:
        step_function = arguments["forward_step_func"]

        def forward_step(data_iterator, chunk, *args, **kwargs):
            return carries[id(chunk)].run_step(step_function, data_iterator, chunk, *args, **kwargs)

        stage = self._cross_stage[0].stage
        return with_received_shapes(
            name,
            {**arguments, "forward_step_func": forward_step},
            stage.config,
            sequence_ranks(stage),
            self._form.packed_shape,
        )
