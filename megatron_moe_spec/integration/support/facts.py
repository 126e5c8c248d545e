"""Facts about a model and the losses that are to be attached to it: what rules look at."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import nn

from megatron_moe_spec.config import SpecConfig
from megatron_moe_spec.integration.compat.groups import etp_group, process_groups
from megatron_moe_spec.integration.compat.models import layer_pattern, router_of, shards_weights, stage_module
from megatron_moe_spec.integration.compat.protocols import Arguments, TransformerConfig
from megatron_moe_spec.integration.compat.training_program import (
    global_arguments,
    graphs_inference_alone,
    will_shard_weights,
)
from megatron_moe_spec.integration.pipeline.stages import Stages
from megatron_moe_spec.kernels import unavailable


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a built model (``of_model``), or about one that is not built yet (``of_flags``)."""

    spec: SpecConfig
    transformer_config: Any  # Megatron's; of a layer, where layers have their own
    stages: Stages
    tensor_size: int  # number of tensor-parallel ranks
    expert_tensor_size: int
    layer_pattern: tuple[str, str]  # see ``compat.models.layer_pattern``
    shards_weights: bool  # whether FSDP leaves a rank shards of the weights
    graphs_inference_alone: bool  # whether its CUDA graphs are switched off in training
    no_kernels: str  # why the Triton kernels that ``spec`` demands cannot run; empty: they can, or it does not
    moe_layers: Sequence[nn.Module] = ()  # that are to have the losses; empty before they are built
    is_frozen: bool = False  # whether no weight is trained; of a pipeline, one stage may be frozen

    @classmethod
    def of_model(
        cls,
        chunks: list[nn.Module],
        transformer_config: Optional[TransformerConfig],
        moe_layers: list[nn.Module],
        stages: Stages,
        spec: SpecConfig,
    ) -> "ModelFacts":
        """Of the model chunks of this rank, and all their MoE layers that are to have the losses."""
        # Routers are made on the CPU, and may be on the meta device: the model is moved later.
        device = next((x for x in (router_of(layer).weight.device for layer in moe_layers) if x.type == "cuda"), None)
        whole = len(stages.own) == len(stages.num_layers)
        return cls(
            spec=spec,
            transformer_config=transformer_config,
            stages=stages,
            # Once there are layers their process groups count, whatever the settings say.
            tensor_size=process_groups(chunks[0]).tp.size() if moe_layers else 1,
            expert_tensor_size=max((etp_group(layer.token_dispatcher).size() for layer in moe_layers), default=1),
            layer_pattern=layer_pattern(stage_module(chunks[0])),
            shards_weights=any(map(shards_weights, chunks)),
            graphs_inference_alone=graphs_inference_alone(global_arguments()),
            no_kernels=unavailable(device) if moe_layers and spec.kernels == "triton" else "",
            moe_layers=moe_layers,
            is_frozen=whole and not any(p.requires_grad for chunk in chunks for p in chunk.parameters()),
        )

    @classmethod
    def of_flags(
        cls,
        args: Arguments,
        transformer_config: TransformerConfig,
        stages: Stages,
        spec: SpecConfig,
        device: Optional[torch.device],
    ) -> "ModelFacts":
        """As far as the flags tell, see ``settings_of_flags``; ``device``: None on another machine than the model's."""
        tensor_size = transformer_config.tensor_model_parallel_size
        return cls(
            spec=spec,
            transformer_config=transformer_config,
            stages=stages,
            tensor_size=tensor_size,
            expert_tensor_size=transformer_config.expert_tensor_parallel_size or tensor_size,
            layer_pattern=layer_pattern(args),
            shards_weights=will_shard_weights(args),
            graphs_inference_alone=graphs_inference_alone(args),
            no_kernels=unavailable(device) if device is not None and spec.kernels == "triton" else "",
        )

    @property
    def has_moe_layers(self) -> bool:
        return any(self.stages.num_layers)

    @property
    def switched_on(self) -> str:
        """What there is to hook for."""
        losses = ["the losses' coefficients"] if self.spec.trained_losses else []
        measures = ["--moe-spec-metrics-interval"] if self.spec.metrics_interval else []
        traces = ["--moe-spec-trace-path"] if self.spec.trace_path else []
        return " and ".join([*losses, *measures, *traces])

    @property
    def pairs(self) -> int:
        """Number of pairs of consecutive MoE layers."""
        return max(sum(self.stages.num_layers) - 1, 0)

    @property
    def pairs_across(self) -> int:
        """Number of those whose layers are in different (virtual) pipeline stages."""
        return self.pairs - sum(max(length - 1, 0) for length in self.stages.num_layers)
