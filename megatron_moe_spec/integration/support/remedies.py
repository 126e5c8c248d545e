"""Remedies for what a loss cannot do with: all the flags to change, as Megatron refuses some of them without others.

A model is its ``ModelFacts``, or a layer.
"""

from collections.abc import Callable
from typing import Any


def is_set(model: Any, *settings: str) -> bool:
    """Whether one of these settings of the TransformerConfig is there, and neither None nor False."""
    values = (getattr(model.transformer_config, setting, None) for setting in settings)
    return any(value is not None and value is not False for value in values)


def with_experts(remedy: str) -> Callable[..., str]:
    """For a model without MoE layers: experts if it has none, and ``remedy``; or nothing to hook for."""

    def text(model: Any) -> str:
        experts = "" if getattr(model.transformer_config, "num_moe_experts", None) else "set --num-experts and "
        return f"{experts}{remedy}, or leave out {{model.switched_on}}"

    return text


def without_overlap(model: Any) -> str:
    needing = _set_flags(model, "--delay-wgrad-compute", "--ep-overlap-early-attn-memory-release")
    return _remove("--overlap-moe-expert-parallel-comm", *needing)


def without_op_fuser(model: Any) -> str:
    needing = "--moe-single-grouped-weight", "--moe-expert-rank-capacity-factor", "--moe-paged-stash"
    remedy = _remove("--use-transformer-engine-op-fuser", *_set_flags(model, *needing))
    if "fused_group_mlp" in (getattr(model.transformer_config, "offload_modules", None) or []):
        remedy += ", and fused_group_mlp from --offload-modules"
    return remedy


def without_quantized_weights(model: Any) -> str:
    """Empty for weights that are not."""
    fp8 = ["--fp8-param-gather", "--reuse-grad-buf-for-mxfp8-param-ag"] if is_set(model, "fp8_param") else []
    fp4 = ["--fp4-param-gather"] if is_set(model, "fp4_param") else []
    return _remove(*fp8, *fp4)


def without_rank_capacity(model: Any) -> str:
    return _remove("--moe-expert-rank-capacity-factor", *_set_flags(model, "--moe-paged-stash"))


def with_alltoall(model: Any) -> str:
    """For the flex dispatcher."""
    backend = getattr(model.transformer_config, "moe_flex_dispatcher_backend", None)
    first = ["--moe-flex-dispatcher-backend"] if backend == "ncclep" else []
    needing = "--moe-enable-deepep", "--moe-expert-rank-capacity-factor", "--moe-paged-stash"
    remedy = _remove(*first, *_set_flags(model, *needing))
    return "set --moe-token-dispatcher-type alltoall" + (f", and {remedy}" if remedy else "")


def _set_flags(model: Any, *flags: str) -> list[str]:
    """Those whose setting, of the same name, is set."""
    return [flag for flag in flags if is_set(model, flag.removeprefix("--").replace("-", "_"))]


def _remove(*flags: str) -> str:
    """ "remove FLAG, FLAG and FLAG"; empty for none."""
    *first, last = flags or [""]
    joined = f"{', '.join(first)} and {last}" if first else last
    return f"remove {joined}" if joined else ""
