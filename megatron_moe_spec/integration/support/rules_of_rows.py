"""Rules of losses of the rows that experts compute: their activations, and their outputs."""

from collections.abc import Callable
from typing import Any, Union

from megatron_moe_spec.integration.compat.experts import expert_down_projections
from megatron_moe_spec.integration.support.facts import ModelFacts
from megatron_moe_spec.integration.support.remedies import (
    is_set,
    with_alltoall,
    without_op_fuser,
    without_rank_capacity,
)
from megatron_moe_spec.integration.support.rule import Rule
from megatron_moe_spec.losses.base import ACTIVATIONS, OUTPUTS

_ROWS = (ACTIVATIONS, OUTPUTS)


def _is_flex(model: Any) -> bool:
    return getattr(model.transformer_config, "moe_token_dispatcher_type", "allgather") == "flex"


def _flex(name: str, why: str, remedy: Union[str, Callable[[Any], str]], when: Callable[[ModelFacts], bool]) -> Rule:
    message = f"{{loss.title}} cannot tell which token a row belongs to: {why}"
    return Rule(name, message, remedy, lambda model, loss: _is_flex(model) and when(model), _ROWS)


def _in_order(model: Any) -> str:
    remedy = f"{with_alltoall(model)}, or " if _is_flex(model) else ""
    return f"{remedy}set the coefficients of the losses of rows to 0"


# Raised by the taps.
DISORDERED = Rule(
    "rows in an unknown order",
    "MoE layer {model.moe_layer_index}: the rows that the {model.transformer_config.moe_token_dispatcher_type} "
    "dispatcher hands to the experts do not lie as expected, and cannot be told apart by token",
    _in_order,
    reads=_ROWS,
)

ROWS = (
    Rule(
        "legacy GroupedMLP",
        "the legacy GroupedMLP does not hand out the rows for {loss.title}",
        "remove --moe-use-legacy-grouped-gemm, or --moe-grouped-gemm",
        lambda model, loss: (
            is_set("moe_use_legacy_grouped_gemm", model) or not all(map(expert_down_projections, model.moe_layers))
        ),
        _ROWS,
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
        lambda model: is_set("moe_expert_rank_capacity_factor", model),
    ),
    DISORDERED,
    Rule(
        "--use-transformer-engine-op-fuser",
        "the fused experts do not hand out the activations for {loss.title}",
        lambda model: f"{without_op_fuser(model)}, or set {{loss.off}}",
        "use_transformer_engine_op_fuser",
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
