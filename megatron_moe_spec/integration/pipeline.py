"""Coupling across pipeline stages.

The routing of a stage's last MoE layer goes to the next stage with the hidden states; what the loss of the two layers
asks of it comes back with their gradient. Suffixes: T tokens, E experts, W numbers of a message per token.
"""

from dataclasses import dataclass
from functools import partial
from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_moe_spec.config import SpecConfig
from megatron_moe_spec.integration.compat import change_received_shapes, pipeline_group, stage_module
from megatron_moe_spec.integration.coupling import LayerRouting, pull_of_following
from megatron_moe_spec.integration.microbatch import MicroBatch
from megatron_moe_spec.parallel.carry import (
    Append,
    Strip,
    bits_to_numbers,
    decode,
    encode,
    numbers_to_bits,
    packed_length,
    sequence_length,
)


@dataclass(frozen=True)
class Stages:
    """The MoE layers of a model's (virtual) pipeline stages, in the order in which the model runs them.

    Attributes:
        num_layers: number of MoE layers of every stage.
        own: which stages this rank's model chunks are.
        num_experts: of a layer.
    """

    num_layers: list[int]
    own: list[int]
    num_experts: int

    @classmethod
    def of_model(cls, chunks: list[nn.Module], layers_of_chunks: list[int], model_settings) -> "Stages":
        """A collective over the pipeline group where there is more than one stage.

        Args:
            chunks: all model chunks of this rank.
            layers_of_chunks: number of MoE layers of each.
            model_settings: the model's TransformerConfig; None where it has no MoE layer.
        """
        num_experts = getattr(model_settings, "num_moe_experts", None) or 0
        num_stages = getattr(model_settings, "pipeline_model_parallel_size", 1)
        if num_stages == 1:
            return cls(layers_of_chunks, list(range(len(chunks))), num_experts)
        expected = model_settings.virtual_pipeline_model_parallel_size or 1
        if len(chunks) != expected:
            raise ValueError(
                f"attach() takes all model chunks of a rank at once, as get_model returns them: got {len(chunks)} of "
                f"{expected} (--num-layers-per-virtual-pipeline-stage, --num-virtual-stages-per-pipeline-rank)"
            )
        group = pipeline_group(chunks[0])
        gathered = [None] * num_stages
        dist.all_gather_object(gathered, layers_of_chunks, group=group)
        num_layers = [number for numbers in zip(*gathered) for number in numbers]
        return cls(num_layers, [chunk * num_stages + group.rank() for chunk in range(len(chunks))], num_experts)

    @property
    def first_layers(self) -> list[int]:
        """Number of MoE layers before each of this rank's chunks."""
        return [sum(self.num_layers[:stage]) for stage in self.own]


@dataclass(frozen=True)
class MessageForm:
    """What a message holds for each token: m (mass) or its scores (pathway), and, where routing is to be measured,
    the experts that it was dispatched to, eight in a number."""

    kind: str
    num_experts: int
    with_live: bool

    @property
    def scores_width(self) -> int:
        return 1 if self.kind == "mass" else self.num_experts

    @property
    def width(self) -> int:
        return self.scores_width + (-(-self.num_experts // 8) if self.with_live else 0)

    def packed_shape(self, shape, dtype: torch.dtype) -> tuple[int, int, int]:
        """Of hidden states [sequence, batch, hidden] with a message."""
        sequence, batch, hidden_size = shape
        return packed_length(sequence, hidden_size, dtype, self.width), batch, hidden_size

    def of_routing(self, routing: LayerRouting) -> Tensor:
        parts = [routing.message.reshape(-1, self.scores_width).float()]
        if self.with_live:
            parts.append(bits_to_numbers(routing.live_TE))
        return torch.cat(parts, dim=1)

    def to_routing(self, message_TW: Tensor) -> LayerRouting:
        live_TE = None
        if self.with_live:
            live_TE = numbers_to_bits(message_TW[:, self.scores_width :], self.num_experts)
        return LayerRouting(live_TE, 0, 0, message=self.to_pull(message_TW))

    def of_pull(self, pull: Tensor) -> Tensor:
        pull_TW = pull.reshape(-1, self.scores_width).float()
        return torch.nn.functional.pad(pull_TW, (0, self.width - self.scores_width))

    def to_pull(self, message_TW: Tensor) -> Tensor:
        """[T] (mass) or [T, E] (pathway)."""
        return message_TW[:, 0] if self.kind == "mass" else message_TW[:, : self.scores_width]


class StageCarry:
    """Packs and unpacks the messages of one model chunk.

    Megatron hands a stage its input by ``set_input_tensor`` just before it calls the chunk, and takes the chunk's
    output to send. Both have extra rows in every pass, evaluation included, for shapes are agreed on beforehand.

    Args:
        chunk: the chunk.
        form: what messages hold.
        has_layers_before: whether an earlier stage has an MoE layer.
    """

    def __init__(self, chunk: nn.Module, form: MessageForm, has_layers_before: bool):
        self._stage = stage_module(chunk)
        self._form = form
        self._has_layers_before = has_layers_before
        self._arrival: Optional[_Arrival] = None
        self._set_input_tensor = self._stage.set_input_tensor
        self._stage.set_input_tensor = partial(_set_input_tensor, self)
        self._restore_shapes = change_received_shapes(self._stage.config, form.packed_shape)

    def detach(self) -> None:
        del self._stage.set_input_tensor
        self._restore_shapes()

    def unpack(self, packed: Tensor) -> Tensor:
        """The hidden states of what the previous stage sent; keeps its message for the micro-batch that opens next."""
        batch, hidden_size = packed.shape[1:]
        length = sequence_length(len(packed), hidden_size, packed.dtype, self._form.width)
        if packed_length(length, hidden_size, packed.dtype, self._form.width) != len(packed):
            raise RuntimeError(
                "a pipeline stage received hidden states without the coupling loss's message: attach the losses on "
                "every stage, or set --moe-coupling-across-stages drop"
            )
        message = decode(packed.detach()[length:], length * batch, self._form.width)
        self._arrival = _Arrival(self._form, message)
        return Strip.apply(packed, length, self._arrival.answer)

    def open(self, micro_batch: Optional[MicroBatch]) -> None:
        """The chunk's forward begins; None: without gradients."""
        arrival, self._arrival = self._arrival, None
        if arrival is not None and micro_batch is not None:
            arrival.micro_batch = micro_batch
            if self._has_layers_before:
                micro_batch.before = self._form.to_routing(arrival.message)

    def pack(self, output, micro_batch: Optional[MicroBatch]):
        """The chunk's output with the message for the next stage; as it is on the last stage."""
        if self._stage.post_process or not isinstance(output, Tensor):
            return output
        message = None
        if micro_batch is not None:
            last = micro_batch.routing[-1] if micro_batch.routing else micro_batch.before
            if last is not None and last.message is not None:
                message = self._form.of_routing(last)
        rows = encode(message, output.detach(), self._form.width)
        num_tokens = output.shape[0] * output.shape[1]

        def receive(gradient_rows: Tensor) -> None:
            if micro_batch is not None:
                micro_batch.pull_after = self._form.to_pull(decode(gradient_rows, num_tokens, self._form.width))

        return Append.apply(output, rows, receive)


class _Arrival:
    """A message from the previous stage, and the micro-batch it belongs to once that has opened."""

    def __init__(self, form: MessageForm, message: Tensor):
        self.message = message
        self.micro_batch: Optional[MicroBatch] = None
        self._form = form

    def answer(self, like: Tensor) -> Tensor:
        pull = self._pull()
        return encode(None if pull is None else self._form.of_pull(pull), like, self._form.width)

    def _pull(self) -> Optional[Tensor]:
        micro_batch = self.micro_batch
        if micro_batch is None or micro_batch.before is None:
            return None
        if not micro_batch.routing:
            return micro_batch.pull_after
        first = micro_batch.routing[0]
        return None if first.message is None else pull_of_following(self._form.kind, micro_batch.before, first)


def carries_of_chunks(chunks: list[nn.Module], stages: Stages, config: SpecConfig) -> list[Optional[StageCarry]]:
    """One for each of this rank's chunks; None where nothing is to travel between stages."""
    if len(stages.num_layers) <= len(chunks) or not config.carries_messages:
        return [None] * len(chunks)
    form = MessageForm(config.coupling_type, stages.num_experts, config.metrics_interval > 0)
    return [StageCarry(chunk, form, first > 0) for chunk, first in zip(chunks, stages.first_layers)]


def _set_input_tensor(carry: StageCarry, input_tensor) -> None:
    tensors = input_tensor if isinstance(input_tensor, list) else [input_tensor]
    unpacked = [carry.unpack(x) if x is not None else None for x in tensors]
    carry._set_input_tensor(unpacked if isinstance(input_tensor, list) else unpacked[0])
