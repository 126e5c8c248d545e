"""Base class of taps: places in Megatron where losses read a quantity of an MoE layer, and add its gradient."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, Optional, TypeVar, Union

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.hooks import RemovableHandle

from megatron_moe_spec.config import SpecConfig
from megatron_moe_spec.integration.compat.groups import tp_cp_group
from megatron_moe_spec.integration.compat.models import router_of
from megatron_moe_spec.integration.compat.protocols import TokenDispatcher, TransformerConfig
from megatron_moe_spec.integration.hooks.micro_batch import MicroBatch
from megatron_moe_spec.integration.hooks.replacement import Hook
from megatron_moe_spec.integration.hooks.routing import LayerRouting
from megatron_moe_spec.integration.step.clock import StepClock
from megatron_moe_spec.integration.step.diagnostics import StepDiagnostics
from megatron_moe_spec.integration.step.losses import StepLosses
from megatron_moe_spec.integration.step.tracer import Tracer
from megatron_moe_spec.losses import Loss

L = TypeVar("L", bound=Loss)
TokensPerExpert = Union[Tensor, Sequence[int]]  # of the local experts: on the host, or on the device


@dataclass(frozen=True)
class TappedLayer:
    """An MoE layer with losses, and what all layers of the model share."""

    module: nn.Module  # Megatron's MoELayer
    name: str  # in the model chunk
    index_in_chunk: int  # among the MoE layers of the chunk
    moe_layer_index: int  # among the model's MoE layers
    layer_index: int  # among all layers of the model
    config: SpecConfig  # of the losses
    clock: StepClock
    losses: StepLosses
    diagnostics: StepDiagnostics
    tracer: Tracer

    @property
    def transformer_config(self) -> TransformerConfig:
        return self.module.config

    @property
    def score_function(self) -> str:
        return self.module.config.moe_router_score_function

    @cached_property
    def router(self) -> nn.Module:
        return router_of(self.module)

    @property
    def dispatcher(self) -> TokenDispatcher:
        return self.module.token_dispatcher

    @cached_property
    def tp_cp_group(self) -> ProcessGroup:
        """The ranks that share a micro-batch."""
        return tp_cp_group(self.module)


@dataclass
class RouterCall:
    """One run of a layer's router in training."""

    micro_batch: MicroBatch
    logits_TE: Tensor  # detached
    num_sequences: Optional[int]  # of the micro-batch, if known
    routing: LayerRouting = field(init=False)  # what it decided; once it has run
    probs_TE: Tensor = field(init=False)  # its results, for ``observe`` and ``tap_probs``
    routing_map_TE: Tensor = field(init=False)


class Tap(Generic[L]):
    """Serves the losses that read one thing of one layer: adds their gradients, and records their values.

    Values are recorded once a micro-batch: what the router decides in forward (in the first pass of a checkpoint), what
    needs the experts' rows where gradients flow (in the recomputation of a checkpoint). The methods from ``forget`` on
    are called in the order in which they stand here, each for all taps of a layer; a tensor that one returns has the
    values of the one it is given, and replaces it.

    Attributes:
        hooks: its own; on the experts, from ``hook_inputs``, ``hook_activations`` and ``hook_outputs``.
        last_hooks: those of them that are to run after other people's.
    """

    def __init__(self, losses: Sequence[L], layer: TappedLayer):
        self.losses, self.layer = losses, layer
        self.trained = [loss for loss in losses if loss.is_trained]
        self._in_measured_steps = [loss for loss in losses if loss.is_trained or loss.measured]
        self.hooks: list[RemovableHandle] = []
        self.last_hooks: list[RemovableHandle] = []

    def records(self) -> set[tuple[str, int]]:
        """Name of each loss that it records, and of which layer, or first of a pair of layers, of the model."""
        return {(loss.name, self.layer.moe_layer_index) for loss in self.losses}

    def hooked(self) -> Iterator[tuple[str, Any, nn.Module]]:
        """Yields (name, module that the layer runs now, the one with the tap's hooks); see ``compat.models.runs``."""
        return iter(())

    def forget(self) -> None:
        """The router has its logits, of a new run: a run of the experts that no router announces is left alone."""

    def tap_logits(self, logits: Tensor, call: RouterCall) -> Tensor:
        """Before the router decides by its logits [..., E]; called where gradients flow."""
        return logits

    def observe(self, call: RouterCall) -> None:
        """Records values after the router has decided; called once a micro-batch."""

    def tap_probs(self, probs: Tensor, call: RouterCall) -> Tensor:
        """After the router has decided, with its probabilities [T, E]; called where gradients flow."""
        return probs

    def tap_inputs(self, inputs_PH: Tensor, tokens_per_expert: TokensPerExpert) -> Tensor:
        """Before the local experts run on rows of tokens, ordered by expert; if hooked."""
        return inputs_PH

    def tap_activations(self, part: int, activations_PF: Tensor, tokens_per_expert: TokensPerExpert) -> Tensor:
        """Before a down projection, the ``part``-th of the layer's; if hooked.

        Args:
            activations_PF: p z, of one expert, or of all.
            tokens_per_expert: how many rows of each expert these are, padding included.
        """
        return activations_PF

    def tap_outputs(self, outputs_PH: Tensor) -> Tensor:
        """After the experts have run, with p x: as many rows as came in; if hooked."""
        return outputs_PH

    def hook_inputs(self) -> RemovableHandle:
        """The experts are called with the permuted rows, and their numbers."""
        hook = Hook(lambda module, args: (self.tap_inputs(args[0], args[1]), *args[1:]))
        return self.layer.module.experts.register_forward_pre_hook(hook)

    def hook_activations(self, part: int, projection: nn.Module) -> RemovableHandle:
        """``linear_fc2`` is called with p z, and with the numbers of rows where it serves all experts."""

        def tap(module: nn.Module, args: tuple) -> tuple:
            tokens_per_expert = args[1] if len(args) > 1 else [len(args[0])]
            return (self.tap_activations(part, args[0], tokens_per_expert), *args[1:])

        return projection.register_forward_pre_hook(Hook(tap))

    def hook_outputs(self) -> RemovableHandle:
        """The experts return (p x, no bias)."""
        hook = Hook(lambda module, args, outputs: (self.tap_outputs(outputs[0]), *outputs[1:]))
        return self.layer.module.experts.register_forward_hook(hook)

    def detach(self) -> None:
        """Removes its hooks."""
        for hook in self.hooks:
            hook.remove()

    def computed_losses(self) -> list[L]:
        """The losses to compute in this step, see ``StepClock.is_computed``."""
        return self._in_measured_steps if self.layer.clock.measuring else self.trained
