"""Rules of losses of the weights of routers and experts."""

from collections.abc import Callable

from torch import nn

from megatron_moe_spec.integration.compat.experts import (
    delays_weight_gradients,
    divides_expert_weights,
    expert_first_weights,
    has_adapted_weights,
    has_adapter,
    joins_expert_weights,
)
from megatron_moe_spec.integration.support.remedies import without_overlap, without_quantized_weights
from megatron_moe_spec.integration.support.rule import Rule
from megatron_moe_spec.losses.base import EXPERT_WEIGHTS, ROUTER_WEIGHT


def _adapted(what: str, reads: str, is_adapted: Callable[[nn.Module], bool]) -> Rule:
    return Rule(
        f"adapters around {what}",
        f"{{loss.title}} is a loss of the model's own weights, which adapters around {what} leave as they are",
        "set {loss.off}, or adapt other modules",
        lambda model, loss: any(map(is_adapted, model.moe_layers)),
        (reads,),
    )


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
    Rule(
        "one weight for all experts",
        "{loss.title} needs a weight of its own for every expert",
        "remove --moe-single-grouped-weight and --moe-use-legacy-grouped-gemm",
        lambda model, loss: (
            joins_expert_weights(model.transformer_config) or not all(map(expert_first_weights, model.moe_layers))
        ),
        (EXPERT_WEIGHTS,),
    ),
    Rule(
        "--expert-tensor-parallel-num-weight-shards",
        "{loss.title} reads whole weights, of which a rank has shards between passes",
        "remove --expert-tensor-parallel-num-weight-shards, or set {loss.off}",
        lambda model, loss: divides_expert_weights(model.transformer_config),
        (EXPERT_WEIGHTS,),
    ),
    Rule(
        "--overlap-moe-expert-parallel-comm",
        "{loss.title} joins a router to its experts in one backward pass, which the schedule of "
        "--overlap-moe-expert-parallel-comm splits",
        lambda model: f"{without_overlap(model)}, or set {{loss.off}}",
        "overlap_moe_expert_parallel_comm",
        (EXPERT_WEIGHTS,),
    ),
    Rule(
        "delayed weight gradients",
        "{loss.title} cannot add to weight gradients that are computed apart from the backward pass",
        "remove --delay-wgrad-compute and --overlap-dispatch-backward-with-experts-wgrad",
        lambda model, loss: delays_weight_gradients(model.transformer_config),
        (EXPERT_WEIGHTS,),
    ),
    Rule(
        "--fp8-param-gather, --fp4-param-gather",
        "{loss.title} reads weights that are not quantized",
        lambda model: f"{without_quantized_weights(model)}, or set {{loss.off}}",
        lambda model, loss: without_quantized_weights(model),
        (EXPERT_WEIGHTS,),
    ),
)
