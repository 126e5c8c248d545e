"""CUDA graphs over routers: the taps run beside them.

A graph runs no Python when it is replayed. What the taps read of a router is read from the graph's outputs, and its
logits are computed again from the router's input: one small matrix product, and its backward.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Optional

from torch import Tensor, nn

from megatron_moe_spec.integration.compat.cuda_graphs import is_capturing, replay_of
from megatron_moe_spec.integration.compat.experts import has_adapter
from megatron_moe_spec.integration.compat.models import router_of
from megatron_moe_spec.integration.compat.settings import graphed_modules
from megatron_moe_spec.integration.hooks.injection import join
from megatron_moe_spec.integration.hooks.replacement import MethodReplacement
from megatron_moe_spec.integration.taps.base import ModelFacts

# The release decides whether --cuda-graph-scope is called --cuda-graph-modules; it takes the older name.
_REMEDY = "set --cuda-graph-impl transformer_engine with --cuda-graph-scope attn moe_router"


def is_router_graphed(transformer_config) -> bool:
    return "moe_router" in graphed_modules(transformer_config)


def stays_out_of_graphs(moe_layer: nn.Module) -> bool:
    """Whether the router runs to be captured: what its taps did would be replayed without them, or not at all.

    Raises:
        RuntimeError: there will be no way to run the taps on what the graph hands out.
    """
    if not is_capturing():
        return False
    if moe_layer.training and not is_router_graphed(moe_layer.config):
        raise RuntimeError(f"a CUDA graph over an MoE layer in training skips the auxiliary losses: {_REMEDY}")
    return True


def after_graph(moe_layer: nn.Module, route: Callable) -> MethodReplacement:
    """Has the taps of a layer run where a graph has run its router.

    Args:
        route: runs them around a router: logits, function of logits -> the router's decision; gives the decision.
    """
    return MethodReplacement(moe_layer, "preprocess", partial(_preprocess, moe_layer, route))


def _preprocess(
    moe_layer, route, preprocess, hidden_states: Tensor, probs: Tensor, routing_map: Optional[Tensor]
) -> tuple[Tensor, Tensor]:
    """Stands in for ``MoELayer.preprocess``.

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


def graph_problems(model: ModelFacts) -> Iterator[str]:
    """Yields why the taps cannot run beside a model's CUDA graphs, with the remedy."""
    transformer_config = model.transformer_config
    graphed = graphed_modules(transformer_config)
    if graphed == "everything" or "moe" in graphed:
        local = getattr(transformer_config, "cuda_graph_impl", None) == "local"
        if not (local and model.graphs_inference_alone):
            yield f"CUDA graphs over whole layers, experts or steps skip the hooks when they are replayed ({_REMEDY})"
        return
    if "moe_router" not in graphed:
        return
    if getattr(transformer_config, "moe_input_jitter_eps", None):
        yield (
            "what a router drew at random cannot be computed again beside a CUDA graph "
            f"(remove --moe-input-jitter-eps, or {_ATTENTION})"
        )
    if any(has_adapter(layer.router) for layer in model.moe_layers):
        yield f"the logits of an adapted router cannot be computed again beside a CUDA graph ({_ATTENTION})"
    if "moe_preprocess" in graphed:
        yield from _preprocess_problems(model)


_ATTENTION = "capture attention alone: --cuda-graph-scope attn"


def _preprocess_problems(model: ModelFacts) -> Iterator[str]:
    """What hides the router's input, or its decision, behind the dispatcher's preparations."""
    transformer_config = model.transformer_config
    alltoall = transformer_config.moe_token_dispatcher_type == "alltoall"
    hidden_by = {
        "--moe-latent-size": getattr(transformer_config, "moe_latent_size", None),
        "--moe-expert-capacity-factor": alltoall and transformer_config.moe_expert_capacity_factor is not None,
        "--moe-router-padding-for-quantization": alltoall
        and getattr(transformer_config, "moe_router_padding_for_quantization", False),
        "--expert-tensor-parallel-size": transformer_config.moe_token_dispatcher_type == "flex"
        and model.expert_tensor_size > 1,
    }
    for flag, hidden in hidden_by.items():
        if hidden:
            yield f"with {flag}, a CUDA graph over moe_preprocess does not hand out what the losses read ({_REMEDY})"
