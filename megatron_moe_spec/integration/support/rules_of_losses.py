"""Rules of the losses of pairs of layers, of the rows that experts compute, and of weights."""

from collections.abc import Callable
from functools import partial
from typing import Any, Union

from torch import nn

from megatron_moe_spec.integration.compat.experts import (
    expert_down_projections,
    expert_first_weights,
    has_adapted_weights,
    has_adapter,
)
from megatron_moe_spec.integration.support.facts import ModelFacts
from megatron_moe_spec.integration.support.remedies import (
    is_set,
    with_alltoall,
    without_op_fuser,
    without_overlap,
    without_quantized_weights,
    without_rank_capacity,
)
from megatron_moe_spec.integration.support.rule import Rule, any_set
from megatron_moe_spec.losses import Loss
from megatron_moe_spec.losses.base import ACTIVATIONS, EXPERT_WEIGHTS, OUTPUTS, PAIRS, ROUTER_WEIGHT

_of_pairs = partial(Rule, reads=(PAIRS,))
_of_rows = partial(Rule, reads=(ACTIVATIONS, OUTPUTS))
_of_expert_weights = partial(Rule, reads=(EXPERT_WEIGHTS,))

# Why a pipeline cannot carry the coupling of layers in different stages: setting -> (its name in documents and tests,
# message, remedy).
_OBSTACLES: dict[str, tuple[str, str, Callable[[Any], str]]] = {
    "mtp_standalone": (
        "stages of MTP layers alone",
        "stages with MTP layers of their own send tensors of another shape",
        lambda model: "leave MTP layers in the last stage (--pipeline-model-parallel-layout)",
    ),
    "overlap_moe_expert_parallel_comm": (
        "--overlap-moe-expert-parallel-comm",
        "the schedule of --overlap-moe-expert-parallel-comm hands gradients past what carries the coupling of "
        "layers in different pipeline stages",
        without_overlap,
    ),
}
_DROPPED = (
    "pairs of MoE layers in different pipeline stages ({model.pairs_across} of {model.pairs}) are neither trained on "
    "nor measured"
)


def obstacles(model: Any) -> list[str]:
    """Settings with which a pipeline's schedule carries no messages between stages."""
    return [setting for setting in _OBSTACLES if is_set(model, setting)]


def _drops_pairs(model: ModelFacts, loss: Loss) -> bool:
    return bool(model.stages.several_ranks and model.pairs_across and not loss.carries_messages)


def _lacks_pairs(model: ModelFacts, loss: Any) -> bool:
    numbers = model.stages.num_layers
    return loss.is_trained and loss.across_stages == "drop" and sum(numbers) > 1 and max(numbers) < 2


def _with_a_pair(model: ModelFacts) -> str:
    remedies = [f"{_OBSTACLES[setting][2](model)}, or set {{loss.flag}} to 0" for setting in obstacles(model)]
    return "; ".join(remedies) or "set --moe-coupling-across-stages exact"


def _refusal(setting: str) -> Rule:
    name, why, remedy = _OBSTACLES[setting]
    return _of_pairs(
        f"--moe-coupling-across-stages exact with {name}",
        why,
        lambda model: f"set --moe-coupling-across-stages auto or drop, or {remedy(model)}",
        lambda model, loss: loss.carries_messages and model.stages.several_ranks and is_set(model, setting),
    )


def _notice(setting: str) -> Rule:
    name, why, _ = _OBSTACLES[setting]
    return _of_pairs(
        f"--moe-coupling-across-stages auto or drop with {name}",
        f"{_DROPPED}: {why}",
        when=lambda model, loss: _drops_pairs(model, loss) and is_set(model, setting),
        refuses=False,
    )


PAIRS_OF_LAYERS = (
    _of_pairs(
        "one MoE layer",
        "coupling needs two MoE layers, the model has one",
        "set {loss.flag} to 0",
        lambda model, loss: loss.is_trained and sum(model.stages.num_layers) < 2,
    ),
    _of_pairs(
        "--moe-coupling-across-stages drop with one MoE layer in each stage",
        "no pipeline stage has two MoE layers, so no pair of layers is left for coupling",
        _with_a_pair,
        _lacks_pairs,
    ),
    _of_pairs(
        "--moe-router-dtype fp64 with --moe-spec-kernels triton",
        "the Triton kernels compute the coupling loss in fp32",
        "set --moe-router-dtype fp32, or --moe-spec-kernels to auto or torch",
        lambda model, loss: (
            loss.is_trained and model.spec.kernels == "triton" and model.transformer_config.moe_router_dtype == "fp64"
        ),
    ),
    *map(_refusal, _OBSTACLES),
    *map(_notice, _OBSTACLES),
    _of_pairs(
        "--moe-coupling-across-stages drop",
        _DROPPED,
        when=lambda model, loss: _drops_pairs(model, loss) and not obstacles(model),
        refuses=False,
    ),
)


def _is_flex(model: Any) -> bool:
    return getattr(model.transformer_config, "moe_token_dispatcher_type", "allgather") == "flex"


def _flex(name: str, why: str, remedy: Union[str, Callable[[Any], str]], when: Callable[[ModelFacts], bool]) -> Rule:
    message = f"{{loss.title}} cannot tell which token a row belongs to: {why}"
    return _of_rows(name, message, remedy, lambda model, loss: _is_flex(model) and when(model))


def _in_order(model: Any) -> str:
    remedy = f"{with_alltoall(model)}, or " if _is_flex(model) else ""
    return f"{remedy}set the coefficients of the losses of rows to 0"


# Raised by the taps.
DISORDERED = _of_rows(
    "rows in an unknown order",
    "MoE layer {model.moe_layer_index}: the rows that the {model.transformer_config.moe_token_dispatcher_type} "
    "dispatcher hands to the experts do not lie as expected, and cannot be told apart by token",
    _in_order,
)

ROWS = (
    _of_rows(
        "legacy GroupedMLP",
        "the legacy GroupedMLP does not hand out the rows for {loss.title}",
        "remove --moe-use-legacy-grouped-gemm, or --moe-grouped-gemm",
        lambda model, loss: (
            is_set(model, "moe_use_legacy_grouped_gemm") or not all(map(expert_down_projections, model.moe_layers))
        ),
    ),
    _flex(
        "--moe-flex-dispatcher-backend ncclep",
        "NCCL-EP does not tell the order of its rows",
        "set --moe-flex-dispatcher-backend deepep or hybridep",
        lambda model: (
            getattr(model.transformer_config, "moe_flex_dispatcher_backend", "deepep") not in ("deepep", "hybridep")
        ),
    ),
    _flex(
        "expert tensor parallelism with --moe-token-dispatcher-type flex",
        "the flex dispatcher sends it to all of {model.expert_tensor_size} expert-tensor-parallel ranks",
        "set --expert-tensor-parallel-size 1",
        lambda model: model.expert_tensor_size > 1,
    ),
    _flex(
        "--moe-expert-rank-capacity-factor",
        "the dispatcher drops rows unseen",
        without_rank_capacity,
        lambda model: is_set(model, "moe_expert_rank_capacity_factor"),
    ),
    DISORDERED,
    Rule(
        "--use-transformer-engine-op-fuser",
        "the fused experts do not hand out the activations for {loss.title}",
        lambda model: f"{without_op_fuser(model)}, or set {{loss.off}}",
        any_set("use_transformer_engine_op_fuser"),
        (ACTIVATIONS,),
    ),
    Rule(
        "more expert-tensor-parallel than tensor-parallel ranks",
        "{loss.title} needs experts to be split over ranks that share their tokens: --expert-tensor-parallel-size "
        "{model.expert_tensor_size} is larger than --tensor-model-parallel-size {model.tensor_size}",
        "set it to {model.tensor_size} or less",
        lambda model, loss: model.expert_tensor_size > model.tensor_size,
        (ACTIVATIONS,),
    ),
    Rule(
        "expert tensor parallelism",
        "{loss.title} needs whole expert outputs, of which expert tensor parallelism leaves a rank one summand",
        "--expert-tensor-parallel-size is {model.expert_tensor_size}; set it to 1",
        lambda model, loss: model.expert_tensor_size > 1,
        (OUTPUTS,),
    ),
)


def _adapted(what: str, reads: str, is_adapted: Callable[[nn.Module], bool]) -> Rule:
    return Rule(
        f"adapters around {what}",
        f"{{loss.title}} is a loss of the model's own weights, which adapters around {what} leave as they are",
        "set {loss.off}, or adapt other modules",
        lambda model, loss: any(map(is_adapted, model.moe_layers)),
        (reads,),
    )


def _joins_weights(model: ModelFacts) -> bool:
    joining = "moe_single_grouped_weight", "moe_use_legacy_grouped_gemm"
    return model.transformer_config.moe_grouped_gemm and is_set(model, *joining)


# Raised by the taps too, for adapters that are added after attach().
ADAPTED_ROUTER = _adapted("the router", ROUTER_WEIGHT, lambda moe_layer: has_adapter(moe_layer.router))
ADAPTED_WEIGHTS = _adapted("the router or linear_fc1", EXPERT_WEIGHTS, has_adapted_weights)

WEIGHTS = (
    Rule(
        "FSDP",
        "{loss.title} reads whole weights, of which FSDP leaves a rank shards",
        "set {loss.off}",
        lambda model, loss: model.shards_weights,
        (ROUTER_WEIGHT, EXPERT_WEIGHTS),
    ),
    ADAPTED_ROUTER,
    ADAPTED_WEIGHTS,
    _of_expert_weights(
        "one weight for all experts",
        "{loss.title} needs a weight of its own for every expert",
        "remove --moe-single-grouped-weight and --moe-use-legacy-grouped-gemm",
        lambda model, loss: _joins_weights(model) or not all(map(expert_first_weights, model.moe_layers)),
    ),
    _of_expert_weights(
        "--expert-tensor-parallel-num-weight-shards",
        "{loss.title} reads whole weights, of which a rank has shards between passes",
        "remove --expert-tensor-parallel-num-weight-shards, or set {loss.off}",
        lambda model, loss: getattr(model.transformer_config, "expert_gtp_weight_remat_size", 1) > 1,
    ),
    _of_expert_weights(
        "--overlap-moe-expert-parallel-comm",
        "{loss.title} joins a router to its experts in one backward pass, which the schedule of "
        "--overlap-moe-expert-parallel-comm splits",
        lambda model: f"{without_overlap(model)}, or set {{loss.off}}",
        any_set("overlap_moe_expert_parallel_comm"),
    ),
    _of_expert_weights(
        "delayed weight gradients",
        "{loss.title} cannot add to weight gradients that are computed apart from the backward pass",
        "remove --delay-wgrad-compute and --overlap-dispatch-backward-with-experts-wgrad",
        any_set("delay_wgrad_compute", "overlap_dispatch_backward_with_experts_wgrad"),
    ),
    _of_expert_weights(
        "--fp8-param-gather, --fp4-param-gather",
        "{loss.title} reads weights that are not quantized",
        lambda model: f"{without_quantized_weights(model)}, or set {{loss.off}}",
        any_set("fp8_param", "fp4_param"),
    ),
)
