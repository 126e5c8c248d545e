"""Tap of the routing of adjacent MoE layers, from the values that each layer leaves behind.

A layer's gradient needs only its neighbours' values, so no autograd edge joins two layers: checkpointed layers
and overlapped schedules need nothing special. Suffixes: T tokens, E experts.
"""

from collections.abc import Sequence
from functools import partial
from typing import Optional

from torch import Tensor

from megatron_moe_spec.integration.hooks.injection import add_gradient
from megatron_moe_spec.integration.hooks.routing import LayerRouting
from megatron_moe_spec.integration.hooks.scaling import gradient_weight
from megatron_moe_spec.integration.taps.base import RouterCall, Tap, TappedLayer
from megatron_moe_spec.kernels import choose, module
from megatron_moe_spec.losses import Coupling, coupling
from megatron_moe_spec.parallel.collectives import all_reduce_sum


class PairsTap(Tap[Coupling]):
    """Couples a layer with the one before it, in its chunk or in the stage before.

    Type pathway: one all-reduce of E x E numbers a pair, in forward.
    """

    def __init__(self, losses: Sequence[Coupling], layer: TappedLayer):
        super().__init__(losses, layer)
        (self._loss,) = losses
        self._in_fp64 = layer.transformer_config.moe_router_dtype == "fp64"

    def records(self) -> set[tuple[str, int]]:
        from_before = self._loss.carries_messages and self.layer.moe_layer_index > 0
        has_previous = self.layer.index_in_chunk > 0 or from_before
        return {(self._loss.name, self.layer.moe_layer_index - 1)} if has_previous else set()

    def tap_logits(self, logits: Tensor, call: RouterCall) -> Tensor:
        return add_gradient(logits, partial(self._add_gradient, call)) if self.trained else logits

    def observe(self, call: RouterCall) -> None:
        if not self.computed_losses():
            return
        layer, routing, micro_batch = self.layer, call.routing, call.micro_batch
        if layer.index_in_chunk == 0 and micro_batch.take_before is not None:
            micro_batch.before, micro_batch.take_before = micro_batch.take_before(routing.active_TE.shape[0]), None
        previous = micro_batch.previous(layer.index_in_chunk)
        observe = self._observe_mass if self._loss.kind == "mass" else self._observe_pathway
        observe(previous, call)
        if previous is not None and layer.clock.measuring:
            what = layer.moe_layer_index - 1, previous.active_TE, routing.active_TE
            layer.diagnostics.measure_pair(*what, when=micro_batch.notes.add)

    def _observe_mass(self, previous: Optional[LayerRouting], call: RouterCall) -> None:
        """Leaves the layer's message, and records the loss of it and of the layer before."""
        layer, routing, function = self.layer, call.routing, self.layer.score_function
        before_T = None if previous is None else previous.message
        if self._is_fused(call):
            fused_mass = module("mass").routed_mass
            routing.message, products = fused_mass(call.logits_TE, routing.active_TE, function, before_T)
        else:
            routing.message = coupling.routed_mass(routing.scores(call.logits_TE, function), routing.active_TE)
            products = None if before_T is None else before_T * routing.message
        if products is not None:
            share = 1.0 / layer.tp_cp_group.size()
            what = self._loss.name, layer.moe_layer_index - 1, products, routing.tokens, -1.0, share
            call.micro_batch.notes.add(layer.losses.record_mean, *what)

    def _observe_pathway(self, previous: Optional[LayerRouting], call: RouterCall) -> None:
        """The same; notes the pathways between the two layers, of the tokens of all ranks, in ``previous``."""
        layer, routing = self.layer, call.routing
        routing.message = routing.scores(call.logits_TE, layer.score_function)
        if previous is None:
            return
        joint_EE = coupling.joint_scores(previous.message, routing.message, routing.tokens.divisor)
        everywhere_EE = all_reduce_sum(joint_EE, layer.tp_cp_group)
        previous.successors_EE = coupling.strongest_successors(everywhere_EE, layer.transformer_config.moe_router_topk)
        value = 1.0 / layer.tp_cp_group.size() - (joint_EE * previous.successors_EE).sum()
        what = self._loss.name, layer.moe_layer_index - 1, value, routing.tokens.counts
        call.micro_batch.notes.add(layer.losses.record_loss, *what)

    def _is_fused(self, call: RouterCall) -> bool:
        """Whether the kernels compute, in fp32."""
        return not self._in_fp64 and choose(self.layer.config.kernels, call.logits_TE.device)

    def _add_gradient(self, call: RouterCall, incoming: Tensor) -> Tensor:
        micro_batch, kind, index = call.micro_batch, self._loss.kind, self.layer.index_in_chunk
        routing = micro_batch.routing[index]
        assert routing is not None  # its router has run
        neighbor_grads = []
        if (previous := micro_batch.previous(index)) is not None:
            neighbor_grads.append(coupling.neighbor_grad_of_previous(kind, previous.message, previous.successors_EE))
        if (following := micro_batch.following(index)) is not None:
            neighbor_grads.append(coupling.neighbor_grad_of_following(kind, following.message, routing.successors_EE))
        elif micro_batch.grad_from_next is not None:
            neighbor_grads.append(micro_batch.grad_from_next)
        if not neighbor_grads:  # the only MoE layer of a stage, and pairs across stages are dropped
            return incoming
        config, logits_TE = self.layer.transformer_config, call.logits_TE
        factor, number = gradient_weight(config, -self._loss.coeff, routing.tokens)
        layer = logits_TE, routing.active_TE, self.layer.score_function
        if kind == "mass" and self._is_fused(call):
            add_gradient_of_mass, incoming_TE = (
                module("mass").add_mass_gradient,
                incoming.reshape(-1, logits_TE.shape[1]),
            )
            total_TE = add_gradient_of_mass(*layer, neighbor_grads, factor, incoming_TE, number)
            return total_TE.view_as(incoming)
        grad_TE = coupling.logits_grad(kind, *layer, neighbor_grads, factor * number)
        return incoming + grad_TE.view(incoming.shape).to(incoming.dtype)
