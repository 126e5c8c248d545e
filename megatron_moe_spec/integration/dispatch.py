"""Which permuted row belongs to which rank's tokens, read off a token dispatcher while its layer runs.

Suffixes: T tokens of this rank, G tokens of all ranks, E experts, L local experts, R ranks.
"""

from typing import Optional

import torch
from torch import Tensor

from megatron_moe_spec.parallel.rows import RowExchange


def row_exchange(dispatcher, routing_map_TE: Tensor, num_rows: int) -> Optional[RowExchange]:
    """The exchange between rows of this rank's experts and its tokens; None where each rank has all experts.

    Call it between dispatch and combine: the next micro-batch overwrites the dispatcher's attributes.

    Args:
        dispatcher: MoEAlltoAllTokenDispatcher or MoEAllGatherTokenDispatcher, expert tensor parallel size 1.
        routing_map_TE: bool, what the router gave it.
        num_rows: rows of this rank's experts.
    """
    if dispatcher.ep_size == 1:
        return None
    if dispatcher.config.moe_token_dispatcher_type == "allgather":
        return _of_allgather(dispatcher, routing_map_TE, num_rows)
    return _of_alltoall(dispatcher, num_rows)


def _of_alltoall(dispatcher, num_rows: int) -> RowExchange:
    # Rows lie by (local expert, source rank, token) and were received by (source rank, local expert, token).
    ranks, local = dispatcher.ep_size, dispatcher.num_local_experts
    order = None
    if local > 1:
        rows_RL = torch.as_tensor(dispatcher.num_global_tokens_per_local_expert).reshape(ranks, local)
        source_LR = torch.arange(ranks, device=rows_RL.device).repeat(local)
        source_P = source_LR.repeat_interleave(rows_RL.T.reshape(-1), output_size=num_rows)
        order = source_P.argsort(stable=True).to(dispatcher.probs.device)
    rows_for, rows_from = dispatcher.output_splits, dispatcher.input_splits
    if rows_for is None:  # every expert is padded to its capacity
        rows_for = rows_from = [num_rows // ranks] * ranks
    return RowExchange(order, rows_for, rows_from, dispatcher.ep_group)


def _of_allgather(dispatcher, routing_map_TE: Tensor, num_rows: int) -> RowExchange:
    # Rows lie by (local expert, global token); rank r of the group holds the r-th T of the global tokens.
    local_map_GL = dispatcher.local_map
    ranks, num_tokens = dispatcher.ep_size, routing_map_TE.shape[0]
    flat = local_map_GL.T.reshape(-1).to(torch.uint8)
    token_P = flat.argsort(descending=True, stable=True)[:num_rows] % local_map_GL.shape[0]
    order = (token_P // num_tokens).argsort(stable=True)
    # The dispatcher itself synchronises with the host for its counts.
    rows_for = local_map_GL.view(ranks, -1).sum(dim=1).tolist()
    rows_from = routing_map_TE.view(num_tokens, ranks, -1).sum(dim=(0, 2)).tolist()
    return RowExchange(order, rows_for, rows_from, dispatcher.tp_ep_group)
