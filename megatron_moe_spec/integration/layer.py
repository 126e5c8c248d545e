"""Runs the taps of one MoE layer around its router."""

from functools import partial
from typing import Optional

import torch
from torch import Tensor, nn

from megatron_moe_spec.integration.compat.models import whole_weight
from megatron_moe_spec.integration.graphs import after_graph, is_router_graphed, stays_out_of_graphs
from megatron_moe_spec.integration.hooks import MethodReplacement
from megatron_moe_spec.integration.microbatch import MicroBatchTracker
from megatron_moe_spec.integration.recorder import Recorder
from megatron_moe_spec.integration.routing import read_routing, token_scores
from megatron_moe_spec.integration.taps import by_tap
from megatron_moe_spec.integration.taps.base import RouterCall, TappedLayer


class LayerTaps:
    """The taps that the computed losses need, on one MoE layer.

    Args:
        local_index, global_index: numbers of the layer in its model chunk, and in the model.
    """

    def __init__(
        self, local_index: int, global_index: int, module: nn.Module, tracker: MicroBatchTracker, recorder: Recorder
    ):
        self._layer = layer = TappedLayer(module, local_index, global_index, recorder)
        self._tracker, self._recorder = tracker, recorder
        self._taps = [tap(losses, layer) for tap, losses in by_tap(recorder.spec.computed_losses)]
        self._methods = [MethodReplacement(layer.router, "routing", partial(_route, self))]
        if is_router_graphed(layer.transformer_config):
            self._methods.append(after_graph(module, self._route_again))

    @property
    def moe_layer(self) -> nn.Module:
        return self._layer.module

    def measure_router(self) -> None:
        """Measures the router's weight, when a measured step has ended."""
        weight_EH = whole_weight(self._layer.router)
        if weight_EH is not None:
            self._recorder.measure_router(self._layer.global_index, weight_EH)

    def records(self) -> set[str]:
        """Names of the losses that this layer records."""
        return set().union(*(tap.records() for tap in self._taps))

    def detach(self) -> None:
        for tap in reversed(self._taps):  # which may have replaced the same method
            tap.detach()
        for method in self._methods:
            method.restore()

    def route(self, logits: Tensor, padding_mask: Optional[Tensor], route) -> tuple[Tensor, Tensor]:
        """Runs the router's own ``route(logits)`` between the taps."""
        for tap in self._taps:
            tap.forget()
        micro_batch, recomputed = self._tracker.enter(self._layer.router)
        if micro_batch is None or not self._recorder.active:
            return route(logits)
        call = RouterCall(micro_batch, logits.detach(), padding_mask)
        has_gradients = torch.is_grad_enabled()
        if has_gradients:
            for tap in self._taps:
                logits = tap.tap_logits(logits, call)
        probs, routing_map = route(logits)
        known = next(filter(None, micro_batch.routing), None)
        call.probs_TE, call.routing_map_TE = probs.detach(), routing_map
        call.routing = read_routing(call.probs_TE, routing_map, padding_mask, known, self._layer.token_group)
        if not recomputed:
            self._observe(call)
        if has_gradients:
            for tap in self._taps:
                probs = tap.tap_probs(probs, call)
        # Backward needs the call, but not these.
        call.probs_TE = call.routing_map_TE = None
        return probs, routing_map

    def _route_again(self, logits: Tensor, decided) -> tuple[Tensor, Tensor]:
        """Runs the taps around what a CUDA graph has ``decided``. It knows of no padding."""
        if self._tracker.has_padding:
            raise RuntimeError(
                "a router in a CUDA graph is given no padding mask, so that the auxiliary losses would count padding: "
                "capture attention alone (--cuda-graph-scope attn), or pass no padding_mask"
            )
        return self.route(logits, None, decided)

    def _observe(self, call: RouterCall) -> None:
        layer, routing = self._layer, call.routing
        if call.micro_batch.routing[layer.local_index] is not None:
            raise RuntimeError(f"MoE layer {layer.global_index} ran twice in one forward of the attached model")
        call.micro_batch.routing[layer.local_index] = routing
        if self._recorder.measuring:
            scores_TE = token_scores(call.logits, layer.transformer_config.moe_router_score_function, call.padding_mask)
            self._recorder.measure_routing(layer.global_index, scores_TE, routing.active_TE, routing.num_local_tokens)
        if self._recorder.tracer.tracing:
            shape = call.logits.shape  # [positions, sequences, E], as a rule
            sequences = shape[1] if len(shape) == 3 else None
            number = self._recorder.layer_numbers[layer.global_index]
            self._recorder.tracer.add(number, call.micro_batch.number, routing.active_TE, call.padding_mask, sequences)
        for tap in self._taps:
            tap.observe(call)


def _route(taps: LayerTaps, routing, logits: Tensor, *args, **kwargs):
    """Stands in for ``TopKRouter.routing(logits, padding_mask=None)``."""
    if stays_out_of_graphs(taps.moe_layer):
        return routing(logits, *args, **kwargs)
    padding_mask = kwargs.get("padding_mask", args[0] if args else None)
    return taps.route(logits, padding_mask, lambda x: routing(x, *args, **kwargs))
