"""Rules of losses of pairs of MoE layers, which may be in different pipeline stages."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Optional

from megatron_moe_spec.config import SpecConfig
from megatron_moe_spec.integration.compat.protocols import TransformerConfig
from megatron_moe_spec.integration.pipeline.stages import Stages
from megatron_moe_spec.integration.support.facts import ModelFacts
from megatron_moe_spec.integration.support.remedies import is_set, without_overlap
from megatron_moe_spec.integration.support.rule import Rule
from megatron_moe_spec.losses import Loss
from megatron_moe_spec.losses.base import PAIRS

# Why a pipeline cannot carry the coupling of layers in different stages: setting -> (its name in documents and tests,
# message, remedy).
_OBSTACLES: dict[str, tuple[str, str, Callable[[Any], str]]] = {
    "mtp_standalone": (
        "stages of MTP layers alone",
        "stages with MTP layers of their own send tensors of another shape",
        lambda model: "leave MTP layers in the last stage (--pipeline-model-parallel-layout)",
    ),
    "overlap_moe_expert_parallel_comm": (
        "--overlap-moe-expert-parallel-comm",
        "the schedule of --overlap-moe-expert-parallel-comm hands gradients past what carries the coupling of "
        "layers in different pipeline stages",
        without_overlap,
    ),
}


def resolve_across_stages(
    spec: SpecConfig, stages: Stages, transformer_config: Optional[TransformerConfig]
) -> SpecConfig:
    """With ``auto`` made ``drop`` where the pipeline's schedule carries no messages, else ``exact``."""
    if spec.coupling_across_stages != "auto":
        return spec
    drops = stages.several_ranks and _obstacles(SimpleNamespace(transformer_config=transformer_config))
    across_stages = "drop" if drops else "exact"
    return replace(spec, coupling_across_stages=across_stages)  # type: ignore[call-arg]


def _obstacles(model: Any) -> list[str]:
    return [setting for setting in _OBSTACLES if is_set(setting, model)]


def _drops_pairs(model: ModelFacts, loss: Loss) -> bool:
    return bool(model.stages.several_ranks and model.pairs_across and not loss.carries_messages)


def _lacks_pairs(model: ModelFacts, loss: Any) -> bool:
    numbers = model.stages.num_layers
    return loss.is_trained and loss.across_stages == "drop" and sum(numbers) > 1 and max(numbers) < 2


def _with_a_pair(model: ModelFacts) -> str:
    remedies = [f"{_OBSTACLES[setting][2](model)}, or set {{loss.flag}} to 0" for setting in _obstacles(model)]
    return "; ".join(remedies) or "set --moe-coupling-across-stages exact"


_DROPPED = (
    "pairs of MoE layers in different pipeline stages ({model.pairs_across} of {model.pairs}) are neither trained on "
    "nor measured"
)


def _refusal(setting: str) -> Rule:
    name, why, remedy = _OBSTACLES[setting]
    return Rule(
        f"--moe-coupling-across-stages exact with {name}",
        why,
        lambda model: f"set --moe-coupling-across-stages auto or drop, or {remedy(model)}",
        lambda model, loss: loss.carries_messages and model.stages.several_ranks and is_set(setting, model),
        (PAIRS,),
    )


def _notice(setting: str) -> Rule:
    name, why, _ = _OBSTACLES[setting]
    return Rule(
        f"--moe-coupling-across-stages auto or drop with {name}",
        f"{_DROPPED}: {why}",
        when=lambda model, loss: _drops_pairs(model, loss) and is_set(setting, model),
        reads=(PAIRS,),
        refuses=False,
    )


PAIRS_OF_LAYERS = (
    Rule(
        "one MoE layer",
        "coupling needs two MoE layers, the model has one",
        "set {loss.flag} to 0",
        lambda model, loss: loss.is_trained and sum(model.stages.num_layers) < 2,
        (PAIRS,),
    ),
    Rule(
        "--moe-coupling-across-stages drop with one MoE layer in each stage",
        "no pipeline stage has two MoE layers, so no pair of layers is left for coupling",
        _with_a_pair,
        _lacks_pairs,
        (PAIRS,),
    ),
    Rule(
        "--moe-router-dtype fp64 with --moe-spec-kernels triton",
        "the Triton kernels compute the coupling loss in fp32",
        "set --moe-router-dtype fp32, or --moe-spec-kernels to auto or torch",
        lambda model, loss: (
            loss.is_trained and model.spec.kernels == "triton" and model.transformer_config.moe_router_dtype == "fp64"
        ),
        (PAIRS,),
    ),
    *map(_refusal, _OBSTACLES),
    *map(_notice, _OBSTACLES),
    Rule(
        "--moe-coupling-across-stages drop",
        _DROPPED,
        when=lambda model, loss: _drops_pairs(model, loss) and not _obstacles(model),
        reads=(PAIRS,),
        refuses=False,
    ),
)
