"""Remedies for what a loss cannot do with: all the flags to change, as Megatron refuses some of them without others."""


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
