"""attach()'s refusals and the doctor's report: what the rules, and the losses' arithmetic, have to say of a model."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Optional

from torch import nn

from megatron_moe_spec.config import SpecConfig
from megatron_moe_spec.integration.compat.dispatch import describe_dispatch
from megatron_moe_spec.integration.compat.experts import describe_down_projections, keeps_quantized_rows
from megatron_moe_spec.integration.compat.models import layer_pattern, stage_module
from megatron_moe_spec.integration.compat.protocols import TransformerConfig
from megatron_moe_spec.integration.pipeline.stages import Stages
from megatron_moe_spec.integration.support.facts import ModelFacts
from megatron_moe_spec.integration.support.rules import RULES, SOME_CHUNKS
from megatron_moe_spec.integration.support.rules_of_losses import obstacles
from megatron_moe_spec.losses.base import ACTIVATIONS, EXPERT_WEIGHTS, OUTPUTS, PAIRS


def check_chunks(chunks: list[nn.Module], transformer_config: Optional[TransformerConfig]) -> None:
    """Raises ValueError where a rank of several gives some of its chunks only."""
    if transformer_config is None or transformer_config.pipeline_model_parallel_size == 1:
        return
    expected = transformer_config.virtual_pipeline_model_parallel_size or 1
    if len(chunks) != expected:
        flag, _ = layer_pattern(stage_module(chunks[0]))
        by_number = "--num-layers-per-virtual-pipeline-stage, --num-virtual-stages-per-pipeline-rank"
        made_by = f"the | in {flag}" if flag else by_number
        raise ValueError(SOME_CHUNKS.text(given=len(chunks), expected=expected, made_by=made_by))


def resolve_across_stages(
    spec: SpecConfig, stages: Stages, transformer_config: Optional[TransformerConfig]
) -> SpecConfig:
    """With ``auto`` made ``drop`` where the pipeline's schedule carries no messages, else ``exact``."""
    if spec.coupling_across_stages != "auto":
        return spec
    drops = stages.several_ranks and obstacles(SimpleNamespace(transformer_config=transformer_config))
    return replace(spec, coupling_across_stages="drop" if drops else "exact")


def check_supported(facts: ModelFacts) -> list[str]:
    """Notices: what is worth knowing of a built model that is supported.

    Raises:
        ValueError: lists everything about the model that is not supported, with its remedy.
    """
    # A layer may have settings of its own.
    settings = {id(one): one for one in (facts.transformer_config, *(layer.config for layer in facts.moe_layers))}
    models = [replace(facts, transformer_config=one) for one in settings.values()]
    if problems := [text for model in models for text in unsupported_settings(model)]:
        raise ValueError("the auxiliary losses cannot be attached: " + "; ".join(dict.fromkeys(problems)))
    return list(dict.fromkeys(text for model in models for text in notices(model)))


def unsupported_settings(model: ModelFacts) -> list[str]:
    """Why the losses are refused, with the remedies; of a model that is not built yet, as far as its flags tell."""
    losses = model.spec.computed_losses if model.has_moe_layers else ()
    arithmetic = [text for loss in losses for text in loss.problems(model.transformer_config)]
    return arithmetic + [text for rule in RULES if rule.refuses for text in rule.complaints(model)]


def notices(model: ModelFacts) -> list[str]:
    """What is worth knowing of a model that is supported."""
    return [text for rule in RULES if not rule.refuses for text in rule.complaints(model)]


def described_reads(model: ModelFacts) -> Iterator[tuple[str, str]]:
    """The doctor's rows (name, text): where the computed losses' quantities would be read."""
    transformer_config = model.transformer_config
    read = {loss.reads for loss in model.spec.computed_losses}
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
