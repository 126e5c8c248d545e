"""Refusals of attach(): errors that name the flag to change."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Optional

import torch

from megatron_moe_spec.config import SpecConfig
from megatron_moe_spec.integration.compat.groups import etp_group, process_groups
from megatron_moe_spec.integration.compat.models import layer_pattern, router_of, shards_weights, stage_module
from megatron_moe_spec.integration.compat.settings import replaced_logits, shares_differently
from megatron_moe_spec.integration.compat.training_program import (
    global_arguments,
    graphs_inference_alone,
    will_shard_weights,
)
from megatron_moe_spec.integration.pipeline.stages import Stages
from megatron_moe_spec.integration.support.remedies import with_moe_layers
from megatron_moe_spec.integration.taps import by_tap
from megatron_moe_spec.integration.taps.base import ModelFacts
from megatron_moe_spec.integration.taps.cuda_graphs import graph_problems
from megatron_moe_spec.kernels import choose


def check_supported(chunks: list, transformer_config, moe_layers: list, stages: Stages, spec: SpecConfig) -> list[str]:
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
    # Routers are made on the CPU, and may be on the meta device: the model is moved later.
    device = next((x for x in (router_of(layer).weight.device for layer in moe_layers) if x.type == "cuda"), None)
    # Once there are layers their process groups count, whatever the settings say. A layer may have settings of its own.
    sizes = [etp_group(layer.token_dispatcher).size() for layer in moe_layers]
    settings = {id(one): one for one in (transformer_config, *(layer.config for layer in moe_layers))}
    facts = ModelFacts(
        transformer_config=transformer_config,
        moe_layers=moe_layers,
        stages=stages,
        kernels=spec.kernels,
        tensor_size=process_groups(chunks[0]).tp.size() if moe_layers else 1,
        expert_tensor_size=max(sizes, default=1),
        layer_pattern=layer_pattern(stage_module(chunks[0])),
        shards_weights=any(map(shards_weights, chunks)),
        graphs_inference_alone=graphs_inference_alone(global_arguments()),
    )
    problems = list(_kernels_problem(spec, device)) if moe_layers else []
    notes: list[str] = []
    for one in settings.values():
        of_layer = replace(facts, transformer_config=one)
        problems += _problems(of_layer, spec)
        notes += notices(of_layer, spec)
    # Of a pipeline, one stage may be frozen.
    whole = len(stages.own) == len(stages.num_layers)
    trains = whole and moe_layers and spec.trained_losses
    if trains and not any(p.requires_grad for chunk in chunks for p in chunk.parameters()):
        problems.append(
            "the whole model is frozen: attach to the one that is trained, or to the module that holds what is trained "
            "through it"
        )
    if problems:
        raise ValueError("the auxiliary losses cannot be attached: " + "; ".join(dict.fromkeys(problems)))
    return list(dict.fromkeys(notes))


def facts_of_flags(args, transformer_config, stages: Stages, spec: SpecConfig) -> ModelFacts:
    """Facts about a model that is not built yet; args, transformer_config: see ``settings_of_flags``."""
    tensor_size = transformer_config.tensor_model_parallel_size
    return ModelFacts(
        transformer_config=transformer_config,
        moe_layers=[],
        stages=stages,
        kernels=spec.kernels,
        tensor_size=tensor_size,
        expert_tensor_size=transformer_config.expert_tensor_parallel_size or tensor_size,
        layer_pattern=layer_pattern(args),
        shards_weights=will_shard_weights(args),
        graphs_inference_alone=graphs_inference_alone(args),
    )


def unsupported_settings(facts: ModelFacts, spec: SpecConfig, device: Optional[torch.device]) -> list[str]:
    """Lists the complaints of ``check_supported`` about a model that is not built yet, as far as its flags tell."""
    of_kernels = _kernels_problem(spec, device) if device is not None and any(facts.stages.num_layers) else ()
    return [*of_kernels, *_problems(facts, spec)]


def notices(facts: ModelFacts, spec: SpecConfig) -> list[str]:
    """Lists what is worth knowing of a model that is supported."""
    found = []
    if replaced := replaced_logits(facts.transformer_config):
        found.append(
            f"{replaced} replaces the routers' logits by random ones, for benchmarks: no loss says anything of training"
        )
    for tap, losses in by_tap(spec.computed_losses):
        found += tap.notices(losses, facts)
    return found


def _kernels_problem(spec: SpecConfig, device: Optional[torch.device]) -> Iterator[str]:
    try:
        choose(spec.kernels, device)
    except ValueError as error:
        yield str(error)


def _switched_on(spec: SpecConfig) -> str:
    """What there is to hook for."""
    measures = ["--moe-spec-metrics-interval"] if spec.metrics_interval else []
    traces = ["--moe-spec-trace-path"] if spec.trace_path else []
    losses = ["the losses' coefficients"] if spec.trained_losses else []
    return " and ".join([*losses, *measures, *traces])


def _problems(facts: ModelFacts, spec: SpecConfig) -> Iterator[str]:
    transformer_config = facts.transformer_config
    if not any(facts.stages.num_layers):
        if spec.enabled:
            cause, remedy = with_moe_layers(facts.layer_pattern, transformer_config)
            text = "the model has no MoE layer" + (f": {cause}" if cause else "")
            yield f"{text} ({remedy}, or leave out {_switched_on(spec)})"
        return
    if getattr(transformer_config, "transformer_impl", None) == "inference_optimized":
        yield "inference layers are not for training (set --transformer-impl transformer_engine)"
    if shares_differently(transformer_config):
        yield (
            "each sample has context-parallel ranks of its own, over which the losses do not reduce "
            "(remove --hybrid-context-parallel)"
        )
    yield from graph_problems(facts)
    for loss in spec.computed_losses:
        yield from loss.problems(transformer_config)
    for tap, losses in by_tap(spec.computed_losses):
        yield from tap.problems(losses, facts)
