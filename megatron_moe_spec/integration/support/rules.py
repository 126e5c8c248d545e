"""What is not supported: the one list, from which attach(), the doctor and docs/unsupported.md have it."""

from collections.abc import Callable
from typing import Any

from megatron_moe_spec.integration.compat.experts import has_adapter
from megatron_moe_spec.integration.compat.models import main_part
from megatron_moe_spec.integration.compat.settings import graphed_modules, replaced_logits
from megatron_moe_spec.integration.support.facts import ModelFacts
from megatron_moe_spec.integration.support.remedies import is_set, with_experts
from megatron_moe_spec.integration.support.rule import Rule, any_set
from megatron_moe_spec.integration.support.rules_of_losses import PAIRS_OF_LAYERS, ROWS, WEIGHTS


def _lacks_pattern(model: ModelFacts) -> bool:
    flag, pattern = model.layer_pattern
    return bool(flag) and "E" not in main_part(pattern)


def _lacks_frequency(model: ModelFacts) -> bool:
    frequency = getattr(model.transformer_config, "moe_layer_freq", 1)
    return not model.layer_pattern[0] and not isinstance(frequency, int) and not any(frequency)


def _random_logits(flag: str) -> Rule:
    return Rule(
        flag,
        f"{flag} replaces the routers' logits by random ones, for benchmarks: no loss says anything of training",
        when=lambda model, loss: replaced_logits(model.transformer_config) == flag,
        refuses=False,
    )


# Raised by attach() before it knows the model.
SOME_CHUNKS = Rule(
    "some of a rank's model chunks",
    "attach() takes all model chunks of a rank at once, as get_model returns them: got {given} of {expected}",
    "{made_by}",
)

# The release decides whether --cuda-graph-scope is called --cuda-graph-modules; it takes the older name.
_ROUTERS = "set --cuda-graph-impl transformer_engine with --cuda-graph-scope attn moe_router"
_ATTENTION = "capture attention alone: --cuda-graph-scope attn"


def _graphs_layers(model: ModelFacts) -> bool:
    graphed = graphed_modules(model.transformer_config)
    return graphed == "everything" or "moe" in graphed


def _graphs(model: ModelFacts, *kinds: str) -> bool:
    """Whether graphs capture these, and no layers."""
    return not _graphs_layers(model) and set(kinds) <= set(graphed_modules(model.transformer_config))


def _inference_alone(model: ModelFacts) -> bool:
    return model.graphs_inference_alone and getattr(model.transformer_config, "cuda_graph_impl", None) == "local"


def _dispatches_by(kind: str, model: ModelFacts) -> bool:
    return model.transformer_config.moe_token_dispatcher_type == kind


def _hidden_by(flag: str, hides: Callable[[ModelFacts], Any]) -> Rule:
    """``hides``: whether the flag puts a router's input, or its decision, behind the dispatcher's preparations."""
    return Rule(
        f"CUDA graphs over moe_preprocess with {flag}",
        f"with {flag}, a CUDA graph over moe_preprocess does not hand out what the losses read",
        _ROUTERS,
        lambda model, loss: _graphs(model, "moe_router", "moe_preprocess") and hides(model),
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

RULES: tuple[Rule, ...] = (
    SOME_CHUNKS,
    Rule(
        "no E in the layer pattern",
        "the model has no MoE layer: {model.layer_pattern[0]} has no MoE layer (E) in its main part, before the first "
        "/",
        with_experts("add an E there"),
        lambda model, loss: _lacks_pattern(model),
        of_dense=True,
    ),
    Rule(
        "--moe-layer-freq without 1",
        "the model has no MoE layer: --moe-layer-freq selects none",
        with_experts("set --moe-layer-freq to 1 or to a list with a 1"),
        lambda model, loss: _lacks_frequency(model),
        of_dense=True,
    ),
    Rule(
        "no MoE layer",
        "the model has no MoE layer",
        "set --num-experts, or leave out {model.switched_on}",
        lambda model, loss: not _lacks_pattern(model) and not _lacks_frequency(model),
        of_dense=True,
    ),
    Rule(
        "--moe-spec-kernels triton where Triton cannot run",
        "the Triton kernels cannot run: {model.no_kernels}",
        "set --moe-spec-kernels to auto or torch",
        lambda model, loss: model.no_kernels,
    ),
    Rule(
        "inference layers",
        "inference layers are not for training",
        "set --transformer-impl transformer_engine",
        lambda model, loss: getattr(model.transformer_config, "transformer_impl", None) == "inference_optimized",
    ),
    Rule(
        "--hybrid-context-parallel",
        "each sample has context-parallel ranks of its own, over which the losses do not reduce",
        "remove --hybrid-context-parallel",
        any_set("hybrid_context_parallel", "dynamic_context_parallel"),
    ),
    Rule(
        "a frozen model",
        "the whole model is frozen",
        "attach to the one that is trained, or to the module that holds what is trained through it",
        lambda model, loss: model.is_frozen and model.spec.trained_losses,
    ),
    _random_logits("--moe-router-force-load-balancing"),
    _random_logits("--moe-router-force-biased"),
    Rule(
        "CUDA graphs over layers, experts or steps",
        "CUDA graphs over whole layers, experts or steps skip the hooks when they are replayed",
        _ROUTERS,
        lambda model, loss: _graphs_layers(model) and not _inference_alone(model),
    ),
    CAPTURED,
    Rule(
        "CUDA graphs over moe_router with --moe-input-jitter-eps",
        "what a router drew at random cannot be computed again beside a CUDA graph",
        f"remove --moe-input-jitter-eps, or {_ATTENTION}",
        lambda model, loss: _graphs(model, "moe_router") and model.transformer_config.moe_input_jitter_eps,
    ),
    Rule(
        "CUDA graphs over adapted routers",
        "the logits of an adapted router cannot be computed again beside a CUDA graph",
        _ATTENTION,
        lambda model, loss: _graphs(model, "moe_router") and any(has_adapter(one.router) for one in model.moe_layers),
    ),
    PADDED,
    _hidden_by("--moe-latent-size", lambda model: getattr(model.transformer_config, "moe_latent_size", None)),
    _hidden_by(
        "--moe-expert-capacity-factor",
        lambda model: _dispatches_by("alltoall", model) and is_set(model, "moe_expert_capacity_factor"),
    ),
    _hidden_by(
        "--moe-router-padding-for-quantization",
        lambda model: _dispatches_by("alltoall", model) and is_set(model, "moe_router_padding_for_quantization"),
    ),
    _hidden_by(
        "--expert-tensor-parallel-size", lambda model: _dispatches_by("flex", model) and model.expert_tensor_size > 1
    ),
    *PAIRS_OF_LAYERS,
    *ROWS,
    *WEIGHTS,
)
