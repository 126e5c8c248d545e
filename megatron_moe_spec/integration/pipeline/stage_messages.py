"""Messages of one model chunk to the stages around it. Suffixes: T tokens, W values of a message per token."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor, nn

from megatron_moe_spec.integration.compat.models import stage_module
from megatron_moe_spec.integration.hooks.micro_batch import MicroBatch
from megatron_moe_spec.integration.hooks.replacement import MethodReplacement
from megatron_moe_spec.integration.hooks.routing import LayerRouting
from megatron_moe_spec.integration.pipeline.message_format import MessageFormat
from megatron_moe_spec.losses.coupling import neighbor_grad_of_following
from megatron_moe_spec.parallel.messages import Append, Strip, decode, encode, is_marked, packed_length, sequence_length


class StageMessages:
    """Packs and unpacks the messages of one model chunk, in the forward steps of a training schedule.

    Megatron's schedule hands a stage its input by ``set_input_tensor``, calls the step function, which runs the chunk,
    and sends what that returns. So a message is unpacked from what the schedule hands over, not from what the step
    function may set itself, and packed on what the step function returns, which may hold more than this chunk's hidden
    states. A step may run the chunk several times: their messages lie one after another.

    Args:
        is_last: whether no stage follows.
        has_layers, has_layers_before: whether this stage, and an earlier one, has an MoE layer.
    """

    def __init__(
        self, chunk: nn.Module, message_format: MessageFormat, is_last: bool, has_layers: bool, has_layers_before: bool
    ):
        self.stage = stage_module(chunk)
        self.owner: Optional[object] = None
        self._format = message_format
        self._is_last, self._has_layers, self._has_layers_before = is_last, has_layers, has_layers_before
        self._training = False
        self._step: Optional[ForwardStep] = None
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

    def run_step(self, step_function: Callable, *args: Any, **kwargs: Any) -> tuple:
        """Runs the step function of a training schedule on this chunk."""
        step = self._step or ForwardStep(self._format, self._has_layers)
        self._step, self._runs_step = step, True
        try:
            output, *others = step_function(*args, **kwargs)
            return (self._pack(output, step), *others)
        finally:
            self._step, self._runs_step = None, False

    def open(self, micro_batch: MicroBatch) -> None:
        """The chunk's forward begins. Raises RuntimeError if no schedule that carries messages runs it."""
        step = self._step
        if step is None or not (self._training and self._runs_step):
            raise RuntimeError(
                "a pipeline stage trains outside of Megatron's schedule, which carries the coupling of layers in "
                "different stages (train by what get_forward_backward_func() returns, or set "
                "--moe-coupling-across-stages drop)"
            )
        step.micro_batches.append(micro_batch)
        if step.message_TW is not None and self._has_layers_before:
            micro_batch.take_before = partial(step.next_routing, step.message_TW)

    def check(self) -> None:
        """Raises RuntimeError if something that arrived in the step was no message. Synchronises with the device."""
        if self._all_marked is not None:
            _raise_unless(bool(self._all_marked))

    def _set_input_tensor(self, original: Callable, input_tensor: Any) -> None:
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
        width = self._format.width
        length = sequence_length(len(packed), hidden_size, packed.dtype, width)
        _raise_unless(packed_length(length, hidden_size, packed.dtype, width) == len(packed))
        rows = packed.detach()[length:]
        self._note_mark(rows)
        message_TW = decode(rows, length * batch, width)
        self._step = step = ForwardStep(self._format, self._has_layers, message_TW)
        # What the losses here ask of the previous stage goes back with the gradient.
        return Strip.apply(packed, length, lambda like: encode(step.grad_for_previous(), like, width))

    def _pack(self, output: Any, step: "ForwardStep") -> Any:
        """Returns the step's output with the message for the next stage; unchanged on the last stage."""
        if self._is_last:
            return output
        if not isinstance(output, Tensor) or output.dim() != 3:
            raise RuntimeError(_NOT_ONE_TENSOR)
        num_tokens = output.shape[0] * output.shape[1]
        message_TW = step.message_for_next()
        if message_TW is None:  # nobody may take one for a message
            message_TW = output.new_full((num_tokens, self._format.width), torch.nan, dtype=torch.float32)
        if len(message_TW) > num_tokens:
            raise RuntimeError(
                f"a step returned {num_tokens} tokens for the next pipeline stage, and ran the model on "
                f"{len(message_TW)}: its coupling cannot go with them (set --moe-coupling-across-stages drop)"
            )
        rows = encode(message_TW, output.detach(), self._format.width)

        def receive(gradient_rows: Tensor) -> None:
            self._note_mark(gradient_rows)
            step.receive_grad(decode(gradient_rows, num_tokens, self._format.width))

        return Append.apply(output, rows, receive)

    def _note_mark(self, rows: Tensor) -> None:
        marked = is_marked(rows)
        if self._all_marked is None:  # the first: before anything is computed of it
            _raise_unless(bool(marked))
            self._all_marked = marked
        else:
            self._all_marked &= marked


class ForwardStep:
    """One forward step of a chunk, and its backward."""

    def __init__(self, message_format: MessageFormat, has_layers: bool, message_TW: Optional[Tensor] = None):
        self._format, self._has_layers = message_format, has_layers
        self.message_TW = message_TW  # from the previous stage
        self.micro_batches: list[MicroBatch] = []  # those opened in it, in their order
        self._num_read = 0  # tokens of the message
        self._num_sent: list[int] = []  # tokens of each micro-batch
        self._neighbor_grad_TW: Optional[Tensor] = None  # of a stage without MoE layers, which passes it on

    def next_routing(self, message_TW: Tensor, num_tokens: int) -> LayerRouting:
        """The part of the received message that is the next micro-batch's."""
        start, self._num_read = self._num_read, self._num_read + num_tokens
        if self._num_read > len(message_TW):
            raise RuntimeError(
                f"a pipeline stage ran the model on {self._num_read} tokens, of which the stage before sent "
                f"{len(message_TW)} (set --moe-coupling-across-stages drop)"
            )
        return self._format.unpack(message_TW[start : self._num_read])

    def message_for_next(self) -> Optional[Tensor]:
        """Of the chunk's last MoE layer, by micro-batch; None without any. A stage without MoE layers passes it on."""
        if not self._has_layers:
            return self.message_TW
        routings = [routing for micro_batch in self.micro_batches if (routing := micro_batch.routing[-1]) is not None]
        if len(routings) < len(self.micro_batches):
            raise RuntimeError(
                "the last MoE layer of a pipeline stage ran without gradients or in evaluation mode in a forward that "
                "trains: its coupling with the next stage is unknown (set --moe-coupling-across-stages drop)"
            )
        self._num_sent = [len(routing.active_TE) for routing in routings]
        messages = [self._format.pack(routing.message, routing.active_TE) for routing in routings]
        return torch.cat(messages) if messages else None

    def receive_grad(self, neighbor_grad_TW: Tensor) -> None:
        """Takes what the next stage's losses send back."""
        if not self._has_layers:
            self._neighbor_grad_TW = neighbor_grad_TW
            return
        start = 0
        for micro_batch, num_tokens in zip(self.micro_batches, self._num_sent):
            part_TW = neighbor_grad_TW[start : start + num_tokens]
            micro_batch.grad_from_next = self._format.unpack_grad(part_TW)
            start += num_tokens

    def grad_for_previous(self) -> Optional[Tensor]:
        """What the losses here send back to the previous stage, for its ``receive_grad``."""
        if not self._has_layers:
            return self._neighbor_grad_TW
        pairs = [(m.before, m.routing[0]) for m in self.micro_batches if m.before is not None]
        if pairs and len(pairs) < len(self.micro_batches):
            raise RuntimeError(
                "the first MoE layer of a pipeline stage ran without gradients or in evaluation mode in one of the "
                "forwards of a step: their coupling cannot be told apart (set --moe-coupling-across-stages drop)"
            )
        grads = []
        for before, first in pairs:
            assert first is not None  # it has taken what came before
            grad = neighbor_grad_of_following(self._format.kind, first.message, before.successors_EE)
            grads.append(self._format.pack_grad(grad))
        return torch.cat(grads) if grads else None


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
