"""Division of a model's MoE layers among pipeline stages."""

from dataclasses import dataclass, field
from typing import Optional

import torch.distributed as dist
from torch import nn

from megatron_moe_spec.config import SpecConfig
from megatron_moe_spec.integration.compat.groups import process_groups
from megatron_moe_spec.integration.compat.models import layer_index
from megatron_moe_spec.integration.compat.protocols import TransformerConfig


@dataclass(frozen=True)
class Stages:
    """The MoE layers of a model's (virtual) pipeline stages, in the order in which the model runs them.

    Attributes:
        num_layers: number of MoE layers of every stage.
        own: which stages this rank's model chunks are.
        num_experts: of a layer.
        layer_indices: of the MoE layers of all stages, among all layers of the model, from 0; where the model has not
            numbered them, among the MoE layers.
    """

    num_layers: list[int]
    own: list[int]
    num_experts: int
    layer_indices: list[int] = field(default_factory=list)

    @classmethod
    def of_model(
        cls,
        chunks: list[nn.Module],
        layers_of_chunks: list[list[nn.Module]],
        transformer_config: Optional[TransformerConfig],
        spec: SpecConfig,
    ) -> "Stages":
        """By this rank's chunks and the MoE layers of each; a collective over the pipeline group of several stages.

        Raises:
            ValueError: a rank gives another config than the others; on all of them.
        """
        indices_of_chunks = [list(map(layer_index, layers)) for layers in layers_of_chunks]
        num_stages = getattr(transformer_config, "pipeline_model_parallel_size", 1)
        gathered, rank = [(indices_of_chunks, spec)], 0
        if num_stages > 1:
            group = process_groups(chunks[0]).pp
            gathered, rank = gathered * num_stages, group.rank()
            dist.all_gather_object(gathered, (indices_of_chunks, spec), group=group)
        if any(other != spec for _, other in gathered):
            raise ValueError("attach() got another config on another pipeline stage: give every rank the same")
        of_stages = [indices for chunk in zip(*(chunks for chunks, _ in gathered)) for indices in chunk]
        found = [index for indices in of_stages for index in indices]
        return cls(
            num_layers=list(map(len, of_stages)),
            own=[chunk * num_stages + rank for chunk in range(len(chunks))],
            num_experts=getattr(transformer_config, "num_moe_experts", None) or 0,
            layer_indices=[i if index is None else index for i, index in enumerate(found)],
        )

    @property
    def several_ranks(self) -> bool:
        """Whether other ranks have other stages."""
        return len(self.num_layers) > len(self.own)

    @property
    def first_layers(self) -> list[int]:
        """Number of MoE layers before each of this rank's chunks."""
        return [sum(self.num_layers[:stage]) for stage in self.own]
