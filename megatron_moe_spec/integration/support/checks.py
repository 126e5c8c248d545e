"""attach()'s refusals and the doctor's: what the rules and the losses' arithmetic have to say of a model."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Optional

from torch import nn

from megatron_moe_spec.config import SpecConfig
from megatron_moe_spec.integration.compat.models import layer_pattern, stage_module
from megatron_moe_spec.integration.compat.protocols import TransformerConfig
from megatron_moe_spec.integration.pipeline.stages import Stages
from megatron_moe_spec.integration.support.facts import ModelFacts
from megatron_moe_spec.integration.support.rules import RULES, SOME_CHUNKS


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


def check_supported(
    chunks: list[nn.Module],
    transformer_config: Optional[TransformerConfig],
    moe_layers: list[nn.Module],
    stages: Stages,
    spec: SpecConfig,
) -> list[str]:
    """Raises ValueError that lists everything about the model that is not supported, with its remedy.

    Returns:
        Notices: what is worth knowing of a model that is supported.

    Args:
        chunks: the model chunks of this rank.
        transformer_config: the model's TransformerConfig.
        moe_layers: every MoE layer of these chunks that is to have the losses.
        stages: those of all pipeline stages.
        spec: the losses.
    """
    facts = ModelFacts.of_model(chunks, transformer_config, moe_layers, stages, spec)
    # A layer may have settings of its own.
    settings = {id(one): one for one in (transformer_config, *(layer.config for layer in moe_layers))}
    models = [replace(facts, transformer_config=one) for one in settings.values()]
    if problems := [text for model in models for text in unsupported_settings(model)]:
        raise ValueError("the auxiliary losses cannot be attached: " + "; ".join(dict.fromkeys(problems)))
    return list(dict.fromkeys(text for model in models for text in notices(model)))


def unsupported_settings(model: ModelFacts) -> list[str]:
    """Why the losses are refused, with the remedies; of a model that is not built yet, as far as its flags tell."""
    return [*_arithmetic(model), *(text for rule in RULES if rule.refuses for text in rule.complaints(model))]


def notices(model: ModelFacts) -> list[str]:
    """What is worth knowing of a model that is supported."""
    return [text for rule in RULES if not rule.refuses for text in rule.complaints(model)]


def _arithmetic(model: ModelFacts) -> Iterator[str]:
    for loss in model.spec.computed_losses if model.has_moe_layers else ():
        yield from loss.problems(model.transformer_config)
