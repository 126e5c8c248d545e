"""CUDA graphs over routers: the taps run beside them.

A graph runs no Python when it is replayed. What the taps read of a router is read from the graph's outputs, and its
logits are computed again from the router's input: one small matrix product, and its backward.
"""

from collections.abc import Callable
from typing import Optional

from torch import Tensor, nn

from megatron_moe_spec.integration.compat.cuda_graphs import is_capturing, replay_of
from megatron_moe_spec.integration.compat.models import router_of
from megatron_moe_spec.integration.compat.settings import graphed_modules
from megatron_moe_spec.integration.hooks.injection import join
from megatron_moe_spec.integration.support.rules import CAPTURED


def stays_out_of_graphs(moe_layer: nn.Module) -> bool:
    """Whether the router runs to be captured: what its taps did would be replayed without them, or not at all.

    Raises RuntimeError if there will be no way to run the taps on what the graph hands out.
    """
    if not is_capturing():
        return False
    if moe_layer.training and "moe_router" not in graphed_modules(moe_layer.config):
        raise RuntimeError(CAPTURED.text())
    return True


def beside_graph(
    moe_layer: nn.Module,
    route: Callable,  # runs the taps around a router: (logits, logits -> decision) -> decision
    preprocess: Callable,
    hidden_states: Tensor,
    probs: Tensor,
    routing_map: Optional[Tensor],
) -> tuple[Tensor, Tensor]:
    """Stands in for ``MoELayer.preprocess``: has the taps run where a graph has run the router.

    The taps' nodes are on the new logits and on the probabilities that the graph hands out. Neither is what the layer
    goes on with: backward comes to them by way of the hidden states that are dispatched.
    """
    replay = replay_of(moe_layer, hidden_states, probs, routing_map)
    if replay is None:
        return preprocess(hidden_states, probs, routing_map)
    tapped = []

    def decided(logits: Tensor) -> tuple[Tensor, Tensor]:
        tapped.append(logits)
        return replay.probs_TE, replay.routing_map_TE

    tapped_probs_TE, _ = route(router_of(moe_layer).gating(replay.hidden), decided)
    hidden_states, probs = preprocess(hidden_states, probs, routing_map)
    return join(hidden_states, [*tapped, tapped_probs_TE]), probs
