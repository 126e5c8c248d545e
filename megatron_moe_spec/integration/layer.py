"""The taps on one MoE layer: its router's decision and its experts' activations."""

from functools import partial
from typing import Optional

import torch
from torch import Tensor, nn

from megatron_moe_spec.integration import coupling, score_variance
from megatron_moe_spec.integration.compat import column_group, expert_down_projections, router_of, token_group
from megatron_moe_spec.integration.dispatch import exchanges_rows, row_exchange
from megatron_moe_spec.integration.expert_router_coupling import WeightTap
from megatron_moe_spec.integration.hooks import Hook, MethodReplacement
from megatron_moe_spec.integration.injection import add_gradient
from megatron_moe_spec.integration.microbatch import MicroBatch, MicroBatchTracker
from megatron_moe_spec.integration.orthogonality import OutputTap
from megatron_moe_spec.integration.recorder import Recorder
from megatron_moe_spec.integration.scaling import gradient_factor
from megatron_moe_spec.integration.specialization import ExpertRows
from megatron_moe_spec.kernels import choose


class LayerTap:
    """Adds the losses' gradients to one MoE layer, and records their values.

    Values are recorded once a micro-batch: what the router decides in forward (in the first pass of a
    checkpoint), what needs z where gradients flow (in the recomputation of a checkpoint).
    """

    def __init__(
        self, index: int, number: int, moe_layer: nn.Module, tracker: MicroBatchTracker, recorder: Recorder
    ):
        self._index = index
        self._number = number
        self._tracker = tracker
        self._recorder = recorder
        self._config = moe_layer.config
        self._router = router_of(moe_layer)
        self._dispatcher = moe_layer.token_dispatcher
        self._token_group = token_group(moe_layer)
        self._fused = choose(recorder.config.kernels, self._router.weight.device)
        # The kernels compute in fp32.
        self._fused_coupling = self._fused and self._config.moe_router_dtype != "fp64"
        self._method = MethodReplacement(self._router, "routing", partial(_route, self))
        self._rows: Optional[ExpertRows] = None
        self._routing = None
        projections = expert_down_projections(moe_layer)
        self._num_parts = len(projections)
        self._hooks = [
            module.register_forward_pre_hook(Hook(partial(_tap_activation, self, part)))
            for part, module in enumerate(projections)
        ]
        settings = recorder.config
        self._outputs = self._weights = None
        if settings.orthogonality_loss_coeff:
            self._outputs = OutputTap(moe_layer, recorder)
        if settings.erc_loss_coeff:
            self._weights = WeightTap(number, moe_layer, recorder)

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for tap in (self._outputs, self._weights):
            if tap is not None:
                tap.detach()
        self._method.restore()

    def route(self, logits: Tensor, padding_mask: Optional[Tensor], route) -> tuple[Tensor, Tensor]:
        """Runs the router's own ``route(logits)`` with the gradients of the losses of its scores on its logits."""
        self._rows = None
        for tap in (self._outputs, self._weights):
            if tap is not None:
                tap.forget()
        micro_batch, recomputed = self._tracker.enter(self._router)
        if micro_batch is None or not self._recorder.active:
            return route(logits)
        values, settings, has_gradients = logits.detach(), self._recorder.config, torch.is_grad_enabled()
        if settings.coupling_loss_coeff and has_gradients:
            logits = add_gradient(logits, partial(self._add_coupling_gradient, micro_batch, values))
        if settings.score_variance_loss_coeff and has_gradients:
            logits = add_gradient(logits, partial(self._add_variance_gradient, micro_batch, values, padding_mask))
        probs, routing_map = route(logits)
        known = next(filter(None, micro_batch.routing), None)
        routing = coupling.read_routing(probs.detach(), routing_map, padding_mask, known, self._token_group)
        if not recomputed:
            self._observe(micro_batch, routing, values, padding_mask)
        if has_gradients and self._recorder.wants_specialization:
            self._rows = self._expected_rows(micro_batch, routing, routing_map)
            self._routing = routing
        if has_gradients and self._outputs is not None:
            self._outputs.expect(probs.detach(), routing_map, routing)
        if has_gradients and self._weights is not None:
            self._weights.expect(micro_batch, routing)
        return probs, routing_map

    def _observe(self, micro_batch: MicroBatch, routing, logits: Tensor, padding_mask: Optional[Tensor]) -> None:
        if micro_batch.routing[self._index] is not None:
            raise RuntimeError(f"MoE layer {self._number} ran twice in one forward of the attached model")
        micro_batch.routing[self._index] = routing
        function = self._config.moe_router_score_function
        wants_variance = self._recorder.config.score_variance_loss_coeff > 0
        if wants_variance or self._recorder.measuring:
            scores = coupling.token_scores(logits, function, padding_mask)
        if wants_variance:
            self._observe_variance(routing, scores, padding_mask)
        if self._recorder.measuring:
            self._recorder.record_routing(self._number, scores, routing.live_TE, routing.num_local_tokens)
        if not self._recorder.wants_coupling:
            return
        kind = self._recorder.config.coupling_type
        routing.message = coupling.coupling_message(
            kind, logits, function, padding_mask, routing.live_TE, self._fused_coupling
        )
        if self._index == 0 and micro_batch.take_before is not None:
            micro_batch.before, micro_batch.take_before = micro_batch.take_before(len(routing.live_TE)), None
        previous = micro_batch.previous(self._index)
        if previous is not None:
            loss = coupling.pair_loss(
                kind, previous, routing, self._config.moe_router_topk, self._token_group
            )
            self._recorder.record_pair(self._number - 1, previous.live_TE, routing.live_TE, loss, routing.counts)

    def _observe_variance(self, routing, scores: Tensor, padding_mask: Optional[Tensor]) -> None:
        routing.mean_scores_E = score_variance.mean_scores(scores, routing.divisor, self._token_group)
        loss = score_variance.loss_part(scores, routing.mean_scores_E, routing.divisor, padding_mask)
        self._recorder.record_loss("score_variance_loss", loss, routing.counts)

    def _add_variance_gradient(
        self, micro_batch: MicroBatch, logits: Tensor, padding_mask: Optional[Tensor], incoming: Tensor
    ) -> Tensor:
        routing = micro_batch.routing[self._index]
        gradient = score_variance.logits_gradient(
            logits, self._config.moe_router_score_function, routing.mean_scores_E, routing.divisor, padding_mask
        )
        coefficient = self._recorder.config.score_variance_loss_coeff
        factor = coefficient * gradient_factor(self._config, routing.num_tokens)
        return incoming + (gradient * factor).to(incoming.dtype)

    def _add_coupling_gradient(self, micro_batch: MicroBatch, logits: Tensor, incoming: Tensor) -> Tensor:
        settings = self._recorder.config
        kind, routing = settings.coupling_type, micro_batch.routing[self._index]
        pulls = []
        if (previous := micro_batch.previous(self._index)) is not None:
            pulls.append(coupling.pull_of_previous(kind, previous))
        if (following := micro_batch.following(self._index)) is not None:
            pulls.append(coupling.pull_of_following(kind, routing, following))
        elif micro_batch.pull_after is not None:
            pulls.append(micro_batch.pull_after)
        if not pulls:  # the only MoE layer of a stage, and pairs across stages are dropped
            return incoming
        factor = settings.coupling_loss_coeff * gradient_factor(self._config, routing.num_tokens)
        function = self._config.moe_router_score_function
        return coupling.add_logits_gradient(
            kind, routing, pulls, logits, function, factor, incoming, self._fused_coupling
        )

    def _expected_rows(self, micro_batch: MicroBatch, routing, routing_map: Tensor) -> ExpertRows:
        stride = self._recorder.config.specialization_token_stride
        tokens = slice((self._recorder.iteration + micro_batch.number) % stride, None, stride)
        top_k = self._config.moe_router_topk
        return ExpertRows(
            routing_map,
            routing.live_TE,
            top_k,
            tokens,
            self._num_parts,
            column_group(self._dispatcher),
            come_home=exchanges_rows(self._dispatcher),
            fused=self._fused,
        )

    def tap_activation(self, part: int, z: Tensor) -> Tensor:
        """Takes part of the layer's activations; returns what the down projection is to read instead."""
        rows, routing = self._rows, self._routing
        if rows is None:
            return z
        settings = self._recorder.config
        k = self._config.moe_router_topk
        # The mean over tokens and ordered pairs, whatever part of the tokens a stride leaves.
        mean = settings.specialization_token_stride / (routing.divisor * k * (k - 1))
        with torch.no_grad():
            if rows.add(z):
                exchange = row_exchange(self._dispatcher, rows.dispatched_TE, rows.num_rows)
                cosines, valid, total = rows.compare(exchange)
                self._recorder.record_cosines(self._number, cosines, valid, total * mean, routing.counts)
                self._rows = None
        if not settings.specialization_loss_coeff:
            return z
        return add_gradient(z, partial(self._add_specialization_gradient, rows, part, mean, routing.num_tokens))

    def _add_specialization_gradient(self, rows: ExpertRows, part: int, mean, num_tokens, incoming: Tensor) -> Tensor:
        coefficient = self._recorder.config.specialization_loss_coeff
        return rows.add_gradient(part, coefficient * mean * gradient_factor(self._config, num_tokens), incoming)


def _route(tap: LayerTap, routing, logits: Tensor, *args, **kwargs):
    """Stands in for ``TopKRouter.routing(logits, padding_mask=None)``."""
    padding_mask = kwargs.get("padding_mask", args[0] if args else None)
    return tap.route(logits, padding_mask, lambda x: routing(x, *args, **kwargs))


def _tap_activation(tap: LayerTap, part: int, module: nn.Module, args):
    """Forward pre-hook of ``linear_fc2``, whose first input is p * z, in permuted rows."""
    return (tap.tap_activation(part, args[0]), *args[1:])
