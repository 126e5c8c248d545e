"""Coupling across pipeline stages.

The routing of a stage's last MoE layer goes to the next stage with the hidden states; what the loss of the two layers
needs of it comes back with their gradient.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Optional

from torch import nn

from megatron_moe_spec.config import SpecConfig
from megatron_moe_spec.integration.compat.groups import sequence_ranks
from megatron_moe_spec.integration.compat.schedules import around_schedules, leave_schedules, with_received_shapes
from megatron_moe_spec.integration.hooks.micro_batch import MicroBatch
from megatron_moe_spec.integration.pipeline.message_format import MessageFormat
from megatron_moe_spec.integration.pipeline.stage_messages import StageMessages
from megatron_moe_spec.integration.pipeline.stages import Stages
from megatron_moe_spec.losses.coupling import Coupling


class CrossStageCoupling:
    """The messages of a model's chunks on this rank, and what connects them to Megatron's schedules.

    Attributes:
        on_open: for each chunk, what is to be called with each micro-batch that it opens; None without messages.
    """

    def __init__(self, chunks: list[nn.Module], stages: Stages, spec: SpecConfig):
        self.on_open: list[Optional[Callable[[MicroBatch], None]]] = [None] * len(chunks)
        self._messages: list[StageMessages] = []
        if not stages.several_ranks or not spec.carries_messages:
            return
        (loss,) = (loss for loss in spec.losses if isinstance(loss, Coupling))
        self._format = MessageFormat(loss.kind, stages.num_experts, spec.metrics_interval > 0)
        last = len(stages.num_layers) - 1
        self._messages = [
            StageMessages(chunk, self._format, stage == last, stages.num_layers[stage] > 0, first > 0)
            for chunk, stage, first in zip(chunks, stages.own, stages.first_layers)
        ]
        for messages in self._messages:
            messages.owner = self  # which lives as long as the model has its losses, whoever keeps the handle
        self.on_open = [messages.open for messages in self._messages]
        around_schedules(self, CrossStageCoupling._around_schedule)

    def detach(self) -> None:
        leave_schedules(self)
        for messages in self._messages:
            messages.detach()
        self._messages = []

    def check(self) -> None:
        """See ``StageMessages.check``."""
        for messages in self._messages:
            messages.check()

    @contextlib.contextmanager
    def _around_schedule(self, name: str, arguments: dict) -> Iterator[dict]:
        model = arguments["model"]
        models = list(model) if isinstance(model, (list, tuple, nn.ModuleList)) else [model]
        of_chunks = {id(chunk): found for chunk in models if (found := self._messages_of(chunk)) is not None}
        trains = bool(of_chunks) and not arguments.get("forward_only", False)
        with contextlib.ExitStack() as stack:
            for messages in self._messages:
                stack.enter_context(messages.schedule(trains))
            yield self._with_messages(name, arguments, of_chunks) if trains else arguments

    def _messages_of(self, chunk: Any) -> Optional[StageMessages]:
        modules = set(chunk.modules()) if isinstance(chunk, nn.Module) else ()
        return next((messages for messages in self._messages if messages.stage in modules), None)

    def _with_messages(self, name: str, arguments: dict, of_chunks: dict[int, StageMessages]) -> dict:
        step_function = arguments["forward_step_func"]

        def forward_step(data_iterator: Any, chunk: Any, *args: Any, **kwargs: Any) -> tuple:
            return of_chunks[id(chunk)].run_step(step_function, data_iterator, chunk, *args, **kwargs)

        stage = self._messages[0].stage
        return with_received_shapes(
            name,
            {**arguments, "forward_step_func": forward_step},
            stage.config,
            sequence_ranks(stage),
            self._format.packed_shape,
        )
