"""CUDA graphs over routers: whether one is captured, and what one hands out when it is replayed.

Transformer Engine's graph of a layer ends after the router (``moe_router``) or after the dispatcher's preparations
(``moe_preprocess``). Megatron leaves its outputs in ``MoELayer.cudagraph_tensor_store`` and in the dispatcher, and runs
the rest of the layer, of which ``MoELayer.preprocess`` is the first method that is called in both cases.

Suffixes: T tokens of this rank, E experts, K experts per token, P permuted rows, H hidden size.
"""

import functools
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from megatron_moe_spec.integration.compat.dispatch import expert_map
from megatron_moe_spec.integration.compat.protocols import MoELayer


def is_capturing() -> bool:
    """Whether what runs now is captured, or warms up for it."""
    return _cuda_graphs().is_graph_capturing()


@functools.cache  # asked by every layer
def _cuda_graphs() -> Any:
    from megatron.core.transformer import cuda_graphs

    return cuda_graphs


class Replay(NamedTuple):
    """What the graph of a layer's router hands out, with its gradients."""

    hidden: Tensor  # the router's input, [..., H]
    probs_TE: Tensor  # its decision
    routing_map_TE: Tensor


def replay_of(moe_layer: MoELayer, hidden: Tensor, probs: Tensor, routing_map: Optional[Tensor]) -> Optional[Replay]:
    """Outputs of a layer's graph, by the arguments of ``MoELayer.preprocess``; None where none has run its router."""
    if moe_layer.cudagraph_tensor_store.is_empty():
        return None
    if routing_map is not None:
        return Replay(hidden, probs, routing_map)
    dispatcher: Any = moe_layer.token_dispatcher
    if dispatcher.config.moe_token_dispatcher_type == "allgather":
        return Replay(hidden, probs, dispatcher.routing_map)
    if dispatcher.config.moe_token_dispatcher_type == "alltoall":
        return Replay(_first_rows(hidden, dispatcher.routing_map), dispatcher.probs, dispatcher.routing_map)
    manager = dispatcher._comm_manager
    if hasattr(manager, "token_indices"):
        chosen_TE = expert_map(manager.token_indices, moe_layer.config.num_moe_experts)
        probs_TE = manager.token_probs.new_zeros(chosen_TE.shape)
        # Where an expert is none, its probability is 0.
        probs_TE = probs_TE.scatter_add(1, manager.token_indices.clamp_min(0), manager.token_probs)
        return Replay(hidden, probs_TE, chosen_TE)
    return Replay(hidden, manager.token_probs, manager.routing_map)


def _first_rows(rows_PH: Tensor, routing_map_TE: Tensor) -> Tensor:
    """[T, H] from rows by (expert, token): that of each token's first expert; every token has one."""
    row_ET = routing_map_TE.T.reshape(-1).cumsum(dim=0).view(routing_map_TE.T.shape) - 1
    first_1T = routing_map_TE.to(torch.uint8).argmax(dim=1).unsqueeze(0)
    return rows_PH[row_ET.gather(0, first_1T).squeeze(0)]
