"""What the losses would read of a model, for the doctor."""

from collections.abc import Iterator

from megatron_moe_spec.integration.compat.dispatch import describe_dispatch
from megatron_moe_spec.integration.compat.experts import describe_down_projections, keeps_quantized_rows
from megatron_moe_spec.integration.support.facts import ModelFacts
from megatron_moe_spec.losses.base import ACTIVATIONS, EXPERT_WEIGHTS, OUTPUTS, PAIRS


def described_reads(model: ModelFacts) -> Iterator[tuple[str, str]]:
    """Yields rows (name, text): where the computed losses' quantities would be read."""
    transformer_config, losses = model.transformer_config, model.spec.computed_losses
    read = {loss.reads for loss in losses}
    if PAIRS in read:
        across = f", {model.pairs_across} of them across pipeline stages" if model.pairs_across else ""
        dropped = " (dropped)" if across and not model.spec.carries_messages else ""
        yield "pairs", f"{model.pairs} of consecutive MoE layers{across}{dropped}"
    if ACTIVATIONS in read:
        yield "activation tap", describe_down_projections(transformer_config)
    if OUTPUTS in read:
        yield "output tap", "output of a layer's experts"
    if {ACTIVATIONS, OUTPUTS} & read:
        yield "dispatcher", describe_dispatch(transformer_config)
    if ACTIVATIONS in read and keeps_quantized_rows(transformer_config):
        size = 2 * transformer_config.moe_router_topk * transformer_config.moe_ffn_hidden_size
        yield (
            "kept until backward",
            f"{size // model.expert_tensor_size} bytes a token and layer, beside the rows as they are quantized "
            "(none with --recompute-granularity selective --recompute-modules moe_act)",
        )
    if EXPERT_WEIGHTS in read:
        yield "weights", "router, and gate rows of every expert's linear_fc1"
