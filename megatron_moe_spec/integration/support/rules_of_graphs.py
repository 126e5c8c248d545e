"""Rules of CUDA graphs."""

from collections.abc import Callable
from typing import Any

from megatron_moe_spec.integration.compat.experts import has_adapter
from megatron_moe_spec.integration.compat.settings import graphed_modules
from megatron_moe_spec.integration.support.facts import ModelFacts
from megatron_moe_spec.integration.support.remedies import is_set
from megatron_moe_spec.integration.support.rule import Rule

# The release decides whether --cuda-graph-scope is called --cuda-graph-modules; it takes the older name.
_ROUTERS = "set --cuda-graph-impl transformer_engine with --cuda-graph-scope attn moe_router"
_ATTENTION = "capture attention alone: --cuda-graph-scope attn"


def _over_layers(model: ModelFacts) -> bool:
    graphed = graphed_modules(model.transformer_config)
    return graphed == "everything" or "moe" in graphed


def _in_training(model: ModelFacts) -> bool:
    local = getattr(model.transformer_config, "cuda_graph_impl", None) == "local"
    return not (local and model.graphs_inference_alone)


def _over(model: ModelFacts, *kinds: str) -> bool:
    """Whether graphs capture these, and no layers."""
    return not _over_layers(model) and set(kinds) <= set(graphed_modules(model.transformer_config))


def _dispatches_by(kind: str, model: ModelFacts) -> bool:
    return model.transformer_config.moe_token_dispatcher_type == kind


def _hidden_by(flag: str, hides: Callable[[ModelFacts], Any]) -> Rule:
    """``hides``: whether the flag puts a router's input, or its decision, behind the dispatcher's preparations."""
    return Rule(
        f"CUDA graphs over moe_preprocess with {flag}",
        f"with {flag}, a CUDA graph over moe_preprocess does not hand out what the losses read",
        _ROUTERS,
        lambda model, loss: _over(model, "moe_router", "moe_preprocess") and hides(model),
    )


# Raised by the taps.
CAPTURED = Rule(
    "CUDA graphs over MoE layers, made by no setting",
    "a CUDA graph over an MoE layer in training skips the auxiliary losses",
    _ROUTERS,
)
PADDED = Rule(
    "CUDA graphs over moe_router with a padding mask",
    "a router in a CUDA graph is given no padding mask, so that the auxiliary losses would count padding",
    f"{_ATTENTION}, or pass no padding_mask",
)

GRAPHS = (
    Rule(
        "CUDA graphs over layers, experts or steps",
        "CUDA graphs over whole layers, experts or steps skip the hooks when they are replayed",
        _ROUTERS,
        lambda model, loss: _over_layers(model) and _in_training(model),
    ),
    CAPTURED,
    Rule(
        "CUDA graphs over moe_router with --moe-input-jitter-eps",
        "what a router drew at random cannot be computed again beside a CUDA graph",
        f"remove --moe-input-jitter-eps, or {_ATTENTION}",
        lambda model, loss: _over(model, "moe_router") and model.transformer_config.moe_input_jitter_eps,
    ),
    Rule(
        "CUDA graphs over adapted routers",
        "the logits of an adapted router cannot be computed again beside a CUDA graph",
        _ATTENTION,
        lambda model, loss: _over(model, "moe_router") and any(has_adapter(layer.router) for layer in model.moe_layers),
    ),
    PADDED,
    _hidden_by("--moe-latent-size", lambda model: getattr(model.transformer_config, "moe_latent_size", None)),
    _hidden_by(
        "--moe-expert-capacity-factor",
        lambda model: _dispatches_by("alltoall", model) and is_set("moe_expert_capacity_factor", model),
    ),
    _hidden_by(
        "--moe-router-padding-for-quantization",
        lambda model: _dispatches_by("alltoall", model) and is_set("moe_router_padding_for_quantization", model),
    ),
    _hidden_by(
        "--expert-tensor-parallel-size", lambda model: _dispatches_by("flex", model) and model.expert_tensor_size > 1
    ),
)
