"""Division of a model's MoE layers among pipeline stages."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import nn

from megatron_moe_spec.config import SpecConfig
from megatron_moe_spec.integration.compat.groups import pipeline_group


@dataclass(frozen=True)
class Stages:
    """The MoE layers of a model's (virtual) pipeline stages, in the order in which the model runs them.

    Attributes:
        num_layers: number of MoE layers of every stage.
        own: which stages this rank's model chunks are.
        num_experts: of a layer.
    """

    num_layers: list[int]
    own: list[int]
    num_experts: int

    @classmethod
    def of_model(
        cls, chunks: list[nn.Module], layers_of_chunks: list[int], transformer_config, spec: SpecConfig
    ) -> "Stages":
        """A collective over the pipeline group where there is more than one stage.

        Args:
            chunks: all model chunks of this rank.
            layers_of_chunks: number of MoE layers of each.
            transformer_config: the model's TransformerConfig; None where it has no MoE layer.
            spec: what the losses are, the same on all ranks.

        Raises:
            ValueError: a rank gives some of its chunks only, or another config than the others.
        """
        num_experts = getattr(transformer_config, "num_moe_experts", None) or 0
        num_stages = getattr(transformer_config, "pipeline_model_parallel_size", 1)
        if num_stages == 1:
            return cls(layers_of_chunks, list(range(len(chunks))), num_experts)
        expected = transformer_config.virtual_pipeline_model_parallel_size or 1
        if len(chunks) != expected:
            raise ValueError(
                f"attach() takes all model chunks of a rank at once, as get_model returns them: got {len(chunks)} of "
                f"{expected} (--num-layers-per-virtual-pipeline-stage, --num-virtual-stages-per-pipeline-rank)"
            )
        group = pipeline_group(chunks[0])
        gathered: list = [None] * num_stages
        dist.all_gather_object(gathered, (layers_of_chunks, spec), group=group)
        if any(other != spec for _, other in gathered):
            raise ValueError("attach() got another config on another pipeline stage: give every rank the same")
        num_layers = [number for numbers in zip(*(layers for layers, _ in gathered)) for number in numbers]
        return cls(num_layers, [chunk * num_stages + group.rank() for chunk in range(len(chunks))], num_experts)

    @property
    def several_ranks(self) -> bool:
        """Whether other ranks have other stages."""
        return len(self.num_layers) > len(self.own)

    @property
    def first_layers(self) -> list[int]:
        """Number of MoE layers before each of this rank's chunks."""
        return [sum(self.num_layers[:stage]) for stage in self.own]
