"""Remedies for what a loss cannot do with: all the flags to change, as Megatron refuses some of them without others."""

from megatron_moe_spec.integration.compat.models import main_part


def with_moe_layers(layer_pattern: tuple[str, str], transformer_config) -> tuple[str, str]:
    """(cause, remedy) of a model without MoE layers; the cause is empty where the remedy is all there is to name.

    Args:
        layer_pattern: flag and value, see ``compat.models.layer_pattern``.
    """
    has_experts = bool(getattr(transformer_config, "num_moe_experts", None))
    cause, remedies = "", [] if has_experts else ["set --num-experts"]
    (flag, pattern), frequency = layer_pattern, getattr(transformer_config, "moe_layer_freq", 1)
    if flag and "E" not in main_part(pattern):
        cause = f"{flag} has no MoE layer (E) in its main part, before the first /"
        remedies.append("add an E there")
    elif not flag and not isinstance(frequency, int) and not any(frequency):
        cause = "--moe-layer-freq selects none"
        remedies.append("set --moe-layer-freq to 1 or to a list with a 1")
    return cause, " and ".join(remedies or ["set --num-experts"])


def without_overlap(transformer_config) -> str:
    needing = {
        "--delay-wgrad-compute": "delay_wgrad_compute",
        "--ep-overlap-early-attn-memory-release": "ep_overlap_early_attn_memory_release",
    }
    return _remove(["--overlap-moe-expert-parallel-comm"], needing, transformer_config)


def without_op_fuser(transformer_config) -> str:
    needing = {
        "--moe-single-grouped-weight": "moe_single_grouped_weight",
        "--moe-expert-rank-capacity-factor": "moe_expert_rank_capacity_factor",
        "--moe-paged-stash": "moe_paged_stash",
    }
    remedy = _remove(["--use-transformer-engine-op-fuser"], needing, transformer_config)
    if "fused_group_mlp" in (getattr(transformer_config, "offload_modules", None) or []):
        remedy += ", and fused_group_mlp from --offload-modules"
    return remedy


def without_quantized_weights(transformer_config) -> str:
    needing = {
        "--fp8-param-gather": "fp8_param",
        "--reuse-grad-buf-for-mxfp8-param-ag": "fp8_param",
        "--fp4-param-gather": "fp4_param",
    }
    return _remove([], needing, transformer_config)


def without_rank_capacity(transformer_config) -> str:
    return _remove(["--moe-expert-rank-capacity-factor"], {"--moe-paged-stash": "moe_paged_stash"}, transformer_config)


def with_alltoall(transformer_config) -> str:
    """For the flex dispatcher."""
    needing = {
        "--moe-enable-deepep": "moe_enable_deepep",
        "--moe-expert-rank-capacity-factor": "moe_expert_rank_capacity_factor",
        "--moe-paged-stash": "moe_paged_stash",
    }
    backend = getattr(transformer_config, "moe_flex_dispatcher_backend", None)
    first = ["--moe-flex-dispatcher-backend"] if backend == "ncclep" else []
    remedy = _remove(first, needing, transformer_config)
    return "set --moe-token-dispatcher-type alltoall" + (f", and {remedy}" if remedy else "")


def _remove(flags: list[str], needing: dict[str, str], transformer_config) -> str:
    """ "remove FLAG and FLAG": with those whose setting, by its name, is there and cannot stay; empty for none."""
    there = [flag for flag, name in needing.items() if getattr(transformer_config, name, None) not in (None, False)]
    *first, last = [*flags, *there] or [""]
    joined = f"{', '.join(first)} and {last}" if first else last
    return f"remove {joined}" if joined else ""
