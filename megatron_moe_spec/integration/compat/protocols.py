"""What this package uses of Megatron's own objects: attributes that every supported release has, with their types.

What a release may lack is not here, and is read by ``getattr``. ``tests/integration/test_megatron_contract.py``
compares all of this with the objects of a model that has run. Suffixes: T tokens of this rank, G tokens of
all ranks, E experts, H hidden size, L local experts.
"""

from collections.abc import Callable, Sequence
from typing import Any, Optional, Protocol, Union

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup


class Layout(Protocol):
    """Of the TransformerConfig, and of the training program's arguments."""

    context_parallel_size: int
    expert_model_parallel_size: int
    expert_tensor_parallel_size: Optional[int]
    pipeline_model_parallel_size: int
    tensor_model_parallel_size: int


class TransformerConfig(Layout, Protocol):
    """Settings of a model, or of one layer."""

    calculate_per_token_loss: bool
    gated_linear_unit: bool
    gradient_accumulation_fusion: bool
    hidden_size: int
    is_hybrid_model: bool
    moe_expert_capacity_factor: Optional[float]
    moe_ffn_hidden_size: Optional[int]
    moe_grouped_gemm: bool
    moe_layer_freq: Union[int, list[int]]
    moe_router_dtype: Optional[str]
    moe_router_load_balancing_type: Union[str, list[str]]
    moe_router_padding_for_quantization: bool
    moe_router_score_function: str
    moe_router_topk: int
    moe_token_dispatcher_type: str
    num_layers: int
    num_moe_experts: int  # None in a dense model
    pipeline_dtype: torch.dtype
    pipeline_model_parallel_layout: Any
    recompute_granularity: Optional[str]
    recompute_modules: Optional[list[str]]
    sequence_parallel: bool
    transformer_impl: str
    variable_seq_lengths: bool
    virtual_pipeline_model_parallel_size: Optional[int]


class ProcessGroupCollection(Protocol):
    tp: ProcessGroup
    cp: ProcessGroup
    pp: ProcessGroup


class Router(Protocol):
    """TopKRouter."""

    config: TransformerConfig
    gating: Callable[..., Tensor]
    routing: Callable[..., tuple[Tensor, Tensor]]
    tp_cp_group: ProcessGroup
    weight: Tensor  # [E, H]


class TokenDispatcher(Protocol):
    """What all dispatchers have, and none of what each has besides; ``tp`` is expert tensor parallelism here."""

    config: TransformerConfig
    ep_group: ProcessGroup
    ep_size: int
    num_local_experts: int
    tp_ep_group: ProcessGroup
    tp_group: ProcessGroup
    tp_rank: int
    tp_size: int


class AllToAllDispatcher(TokenDispatcher, Protocol):
    """MoEAlltoAllTokenDispatcher, between dispatch and combine."""

    capacity: int  # of an expert; None where experts are not padded to it
    input_splits: Optional[Sequence[int]]  # None where they are
    num_global_tokens_per_local_expert: Tensor  # [ranks, L]
    output_splits: Optional[Sequence[int]]
    probs: Tensor  # [T, E]
    routing_map: Tensor  # [T, E]


class AllGatherDispatcher(TokenDispatcher, Protocol):
    """MoEAllGatherTokenDispatcher, between dispatch and combine."""

    local_map: Tensor  # [G, L]
    routing_map: Tensor  # [G, E]


class FlexDispatcher(TokenDispatcher, Protocol):
    """MoEFlexTokenDispatcher. The managers of DeepEP and HybridEP differ in their attributes."""

    _comm_manager: Any


class MoELayer(Protocol):
    config: TransformerConfig
    cudagraph_tensor_store: Any
    experts: nn.Module
    layer_number: Optional[int]  # among all layers of the model, from 1
    num_local_experts: int
    router: Router  # or an adapter around it
    token_dispatcher: TokenDispatcher


class Arguments(Layout, Protocol):
    """Of the training program."""

    world_size: int
