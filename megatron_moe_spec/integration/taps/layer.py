"""Runs the taps of one MoE layer around its router."""

from collections.abc import Callable
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor, nn

from megatron_moe_spec.integration.compat.models import follows_scores, is_model, runs, submodule, whole_weight
from megatron_moe_spec.integration.compat.settings import graphed_modules, replaced_logits
from megatron_moe_spec.integration.hooks.micro_batch import MicroBatchTracker
from megatron_moe_spec.integration.hooks.modes import without_autocast
from megatron_moe_spec.integration.hooks.replacement import MethodReplacement, keep_last
from megatron_moe_spec.integration.hooks.routing import read_routing
from megatron_moe_spec.integration.support.rules import PADDED
from megatron_moe_spec.integration.taps import by_tap
from megatron_moe_spec.integration.taps.base import RouterCall, Tap, TappedLayer
from megatron_moe_spec.integration.taps.cuda_graphs import beside_graph, stays_out_of_graphs

Decision = tuple[Tensor, Tensor]  # of a router: probabilities and routing map, [T, E]


class LayerTaps:
    """The taps that the computed losses need, on one MoE layer.

    Attributes:
        name: of the layer.
        follows_scores: see ``compat.models``; of the first micro-batch. A table may decide, or a replay.
        missed: why the layer had no part in a forward of this step that trains; None: it had.
    """

    def __init__(self, layer: TappedLayer, chunk: nn.Module, tracker: MicroBatchTracker):
        self._layer, self._chunk, self._tracker, self._experts = layer, chunk, tracker, layer.module.experts
        self.name = layer.name
        self.follows_scores: Optional[Tensor] = None
        self._is_first = not replaced_logits(layer.transformer_config)
        self.missed: Optional[str] = None
        self._stayed_out: Optional[str] = None
        tracker.watch(self)
        self._taps = [tap(losses, layer) for tap, losses in by_tap(layer.config.computed_losses)]
        self._forget, self._tap_logits = self._methods_of_taps("forget"), self._methods_of_taps("tap_logits")
        self._observers, self._tap_probs = self._methods_of_taps("observe"), self._methods_of_taps("tap_probs")
        self._methods = [MethodReplacement(layer.router, "routing", self._stand_in)]
        if "moe_router" in graphed_modules(layer.transformer_config):
            beside = partial(beside_graph, layer.module, self._route_again)
            self._methods.append(MethodReplacement(layer.module, "preprocess", beside))

    def _methods_of_taps(self, name: str) -> list[Callable]:
        """Of the taps that do something there, in each micro-batch."""
        return [getattr(tap, name) for tap in self._taps if getattr(type(tap), name) is not getattr(Tap, name)]

    def measure_router(self) -> None:
        """Measures the router's weight, when a measured step has ended."""
        weight_EH = whole_weight(self._layer.router)
        if weight_EH is not None:
            self._layer.diagnostics.measure_router(self._layer.moe_layer_index, weight_EH)

    def records(self) -> set[tuple[str, int]]:
        """What this layer records, see ``Tap.records``."""
        return set().union(*(tap.records() for tap in self._taps))

    def begin_step(self) -> None:
        self.missed = self._stayed_out = None

    def begin_first_forward(self) -> None:
        """Before a step's first forward: raises if the model no longer runs what the losses are hooked on."""
        layer, moe_layer = self._layer, self._layer.module
        places = [
            ("module", submodule(self._chunk, layer.name), moe_layer),
            ("router", moe_layer.router, layer.router),
            ("experts", moe_layer.experts, self._experts),
        ]
        for tap in self._taps:
            for hook in tap.last_hooks:
                keep_last(hook)
        for what, found, hooked in (*places, *(place for tap in self._taps for place in tap.hooked())):
            if not runs(found, hooked):
                raise RuntimeError(_replaced(layer.name, what))

    def miss(self) -> None:
        """Takes note that a forward that trains went past the layer; raises if its router's method was replaced."""
        if not self._layer.clock.active:
            return
        if self._methods[0].is_gone:
            raise RuntimeError(_replaced(self.name, "router's method routing"))
        self.missed = self._stayed_out or "it did not run"

    def detach(self) -> None:
        for tap in reversed(self._taps):  # which may have replaced the same method
            tap.detach()
        for method in self._methods:
            method.restore()

    def _stand_in(self, routing: Callable[..., Decision], logits: Tensor, *args: Any, **kwargs: Any) -> Decision:
        """Stands in for ``TopKRouter.routing(logits, padding_mask=None)``."""
        if stays_out_of_graphs(self._layer.module):
            return routing(logits, *args, **kwargs)
        padding_mask = kwargs.get("padding_mask", args[0] if args else None)
        return self._route(logits, padding_mask, lambda x: routing(x, *args, **kwargs))

    def _route_again(self, logits: Tensor, decided: Callable[[Tensor], Decision]) -> Decision:
        """Runs the taps around what a CUDA graph has ``decided``. It knows of no padding."""
        if self._tracker.has_padding:
            raise RuntimeError(PADDED.text())
        return self._route(logits, None, decided)

    def _route(self, logits: Tensor, padding_mask: Optional[Tensor], route: Callable[[Tensor], Decision]) -> Decision:
        """Runs the router's own ``route(logits)`` between the taps."""
        for forget in self._forget:
            forget()
        micro_batch, recomputed = self._tracker.enter(self._layer.router)
        if micro_batch is None or not self._layer.clock.active:
            if micro_batch is None:
                self._stayed_out = "it ran without gradients" if self._layer.router.training else "evaluation mode"
            return route(logits)
        num_sequences = logits.shape[1] if logits.dim() == 3 else None  # [positions, sequences, E], as a rule
        detached = logits.detach() if logits.requires_grad else logits
        call = RouterCall(micro_batch, detached.reshape(-1, logits.shape[-1]), num_sequences)
        if torch.is_grad_enabled():
            for tap in self._tap_logits:
                logits = tap(logits, call)
        probs, routing_map = route(logits)
        return without_autocast(self._read, call, padding_mask, probs, routing_map, recomputed), routing_map

    def _read(
        self, call: RouterCall, padding_mask: Optional[Tensor], probs: Tensor, routing_map: Tensor, recomputed: bool
    ) -> Tensor:
        """Runs the taps on what the router has decided; returns the probabilities to go on with."""
        call.probs_TE, call.routing_map_TE = probs, routing_map
        known = next(filter(None, call.micro_batch.routing), None)
        # In a recomputation, too: with delayed scaling in fp8, it may decide otherwise than the first pass.
        call.routing = read_routing(call.probs_TE, routing_map, padding_mask, known, self._layer.tp_cp_group)
        if not recomputed:
            self._observe(call)
        if torch.is_grad_enabled():
            for tap in self._tap_probs:
                probs = tap(probs, call)
        # Backward needs the call, but not these.
        del call.probs_TE, call.routing_map_TE
        return probs

    def _observe(self, call: RouterCall) -> None:
        layer, routing = self._layer, call.routing
        if call.micro_batch.routing[layer.index_in_chunk] is not None:
            is_inside = None not in call.micro_batch.routing and not is_model(self._chunk)
            inside = "give it the model inside, whose own forward runs each layer once"
            looped = "the losses know no looped layers (set their coefficients to 0)"
            text = f"MoE layer {self.name} ran twice in one forward of the module given to attach(): "
            raise RuntimeError(text + (inside if is_inside else looped))
        call.micro_batch.routing[layer.index_in_chunk] = routing
        if self._is_first:
            self._is_first = False
            self.follows_scores = follows_scores(layer.router, call.logits_TE, routing.active_TE)
        if layer.clock.measuring:
            scores_TE = routing.scores(call.logits_TE, layer.score_function)
            what = layer.moe_layer_index, scores_TE, routing.active_TE, routing.tokens.local
            layer.diagnostics.measure_routing(*what, when=call.micro_batch.notes.add)
        if layer.clock.tracing:
            traced = layer.layer_index, call.micro_batch.index, routing.active_TE, routing.padding_mask
            call.micro_batch.notes.add(layer.tracer.add, *traced, call.num_sequences)
        for observe in self._observers:
            observe(call)


def _replaced(layer: str, what: str) -> str:
    return (
        f"MoE layer {layer}: its {what} was replaced after attach(), and runs without the losses (call attach() after "
        "what replaces it; or detach() before, and attach() again after it)"
    )
