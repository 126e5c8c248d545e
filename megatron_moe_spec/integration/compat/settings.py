"""Facts of a TransformerConfig whose names differ between releases, or that several fields make together."""

from typing import Optional, Union

from megatron_moe_spec.integration.compat.protocols import TransformerConfig


def graphed_modules(transformer_config: TransformerConfig) -> Union[list[str], str]:
    """Names of what CUDA graphs capture in training: a list of module kinds, "everything", or an empty list.

    The settings were renamed from 0.17 to 0.18, and an older pair is still taken.
    """
    names = _graph_scopes(transformer_config)
    implementation = getattr(transformer_config, "cuda_graph_impl", None) or "none"
    for old, means in (("enable_cuda_graph", "local"), ("external_cuda_graph", "transformer_engine")):
        if implementation == "none" and getattr(transformer_config, old, False):
            implementation = means
    if implementation == "none":
        return []
    if implementation == "local":
        # Megatron's own graphs: of whole blocks in inference alone, or of whole layers, which in a hybrid model are
        # either attention or experts.
        inference = getattr(getattr(transformer_config, "inference_cuda_graph_scope", None), "name", None)
        if not names and inference == "block":
            return []
        if not transformer_config.is_hybrid_model or any(name.startswith("moe") for name in names):
            return "everything"
    return "everything" if not names or {"full", "full_iteration"} & set(names) else names


def _graph_scopes(transformer_config: TransformerConfig) -> list[str]:
    scopes = (getattr(transformer_config, name, None) for name in ("cuda_graph_modules", "cuda_graph_scope"))
    scope = next(filter(None, scopes), "")
    if not scope:
        return []
    return scope.split(",") if isinstance(scope, str) else [getattr(one, "name", one) for one in scope]


def replaced_logits(transformer_config: TransformerConfig) -> str:
    """The flag by which routers decide by random logits in place of their own; empty if there is none."""
    if getattr(transformer_config, "moe_router_force_load_balancing", False):
        return "--moe-router-force-load-balancing"
    if getattr(transformer_config, "moe_router_force_biased", None) is not None:
        return "--moe-router-force-biased"
    return ""


def logs_each_layer(transformer_config: Optional[TransformerConfig]) -> bool:
    """Whether Megatron logs its auxiliary losses for each layer, too."""
    return bool(getattr(transformer_config, "moe_per_layer_logging", False))
