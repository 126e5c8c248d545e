"""Remedies for what a loss cannot do with: all the flags to change, as Megatron refuses some of them without others."""


def without_overlap(transformer_config) -> str:
    return _remove(
        "--overlap-moe-expert-parallel-comm",
        transformer_config,
        delay_wgrad_compute="--delay-wgrad-compute",
        ep_overlap_early_attn_memory_release="--ep-overlap-early-attn-memory-release",
    )


def without_op_fuser(transformer_config) -> str:
    return _remove(
        "--use-transformer-engine-op-fuser",
        transformer_config,
        moe_single_grouped_weight="--moe-single-grouped-weight",
        moe_expert_rank_capacity_factor="--moe-expert-rank-capacity-factor",
        moe_paged_stash="--moe-paged-stash",
    ) + _offloading(transformer_config)


def without_quantization(transformer_config) -> str:
    flags = [
        flag for name, flag in (("fp8", "--fp8-format"), ("fp4", "--fp4-format")) if _is_set(transformer_config, name)
    ]
    return _remove(
        " and ".join(flags) or "--fp8-format",
        transformer_config,
        fp8_param="--fp8-param-gather and --reuse-grad-buf-for-mxfp8-param-ag",
        fp4_param="--fp4-param-gather",
        moe_router_padding_for_quantization="--moe-router-padding-for-quantization and --moe-router-padding-for-fp8",
    )


def with_alltoall(transformer_config) -> str:
    remedy = _remove(
        "",
        transformer_config,
        moe_enable_deepep="--moe-enable-deepep",
        moe_expert_rank_capacity_factor="--moe-expert-rank-capacity-factor",
        moe_paged_stash="--moe-paged-stash",
    )
    if getattr(transformer_config, "moe_flex_dispatcher_backend", None) in ("hybridep", "ncclep"):
        remedy = f"{remedy} and --moe-flex-dispatcher-backend" if remedy else "remove --moe-flex-dispatcher-backend"
    return "set --moe-token-dispatcher-type alltoall" + (f", and {remedy}" if remedy else "")


def _remove(flag: str, transformer_config, **needing: str) -> str:
    """ "remove FLAG and ...": with the flags of those settings that cannot stay without it."""
    flags = [flag, *(other for name, other in needing.items() if _is_set(transformer_config, name))]
    flags = [one for one in flags if one]
    return f"remove {' and '.join(flags)}" if flags else ""


def _offloading(transformer_config) -> str:
    fused = "fused_group_mlp" in (getattr(transformer_config, "offload_modules", None) or [])
    return ", and fused_group_mlp from --offload-modules" if fused else ""


def _is_set(transformer_config, name: str) -> bool:
    return getattr(transformer_config, name, None) not in (None, False)
