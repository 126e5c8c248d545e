"""Assignment of permuted rows to the ranks of their tokens, read off a token dispatcher while its layer runs.

The source of a row is the expert-parallel rank of its token, together with the rank's expert-tensor-parallel peers:
these share their tokens' rows.

Suffixes: T tokens of this source, G tokens of all sources, E experts, L local experts, R
expert-parallel ranks, C expert-tensor-parallel ranks, P rows.
"""

from typing import Optional

import torch
from torch import Tensor

from megatron_moe_spec.parallel.collectives import all_gather
from megatron_moe_spec.parallel.rows import RowExchange


def exchanges_rows(dispatcher) -> bool:
    """Whether a token's experts lie on several ranks."""
    return dispatcher.ep_size > 1


def row_exchange(dispatcher, dispatched_TE: Tensor, num_rows: int) -> Optional[RowExchange]:
    """The exchange between the rows of this rank's experts and their sources; None where each rank has all experts.

    Call it between dispatch and combine: the next micro-batch overwrites the dispatcher's attributes.

    Args:
        dispatcher: MoEAlltoAllTokenDispatcher or MoEAllGatherTokenDispatcher.
        dispatched_TE: bool, the routing map of this source's tokens.
        num_rows: rows of this rank's experts.
    """
    if not exchanges_rows(dispatcher):
        return None
    if dispatcher.config.moe_token_dispatcher_type == "allgather":
        return _of_allgather(dispatcher, dispatched_TE, num_rows)
    if dispatcher.tp_size > 1:
        return _of_alltoall_and_gather(dispatcher, dispatched_TE, num_rows)
    return _of_alltoall(dispatcher, num_rows)


def _of_alltoall(dispatcher, num_rows: int) -> RowExchange:
    # Rows lie by (local expert, source, token) and were received by (source, local expert, token).
    ranks, local = dispatcher.ep_size, dispatcher.num_local_experts
    order = None
    if local > 1:
        rows_RL = torch.as_tensor(dispatcher.num_global_tokens_per_local_expert).reshape(ranks, local)
        order = _by_source(rows_RL.T, num_rows).to(dispatcher.probs.device)
    rows_for, rows_from = dispatcher.output_splits, dispatcher.input_splits
    if rows_for is None:  # every expert is padded to its capacity
        rows_for = rows_from = [num_rows // ranks] * ranks
    return RowExchange(order, num_rows, rows_for, rows_from, dispatcher.ep_group)


def _of_alltoall_and_gather(dispatcher, dispatched_TE: Tensor, num_rows: int) -> RowExchange:
    # Rows lie by (local expert, tensor-parallel rank, source, token). The dispatcher keeps the counts only where it
    # needs them: one all-gather of E numbers, and one host synchronisation.
    ranks, peers, local = dispatcher.ep_size, dispatcher.tp_size, dispatcher.num_local_experts
    own_E = dispatched_TE.unflatten(0, (peers, -1))[dispatcher.tp_rank].sum(dim=0)
    rows_RCRL = all_gather(own_E, dispatcher.tp_ep_group).view(ranks, peers, ranks, local)
    rank = dispatcher.ep_group.rank()
    here_RCL = rows_RCRL[:, :, rank]
    order = _by_source(here_RCL.permute(2, 1, 0), num_rows)
    rows_for = here_RCL.sum(dim=(1, 2)).tolist()
    rows_from = rows_RCRL[rank].sum(dim=(0, 2)).tolist()
    return RowExchange(order, num_rows, rows_for, rows_from, dispatcher.ep_group)


def _of_allgather(dispatcher, dispatched_TE: Tensor, num_rows: int) -> RowExchange:
    # Rows lie by (local expert, global token); source r has the r-th T of the global tokens.
    local_map_GL = dispatcher.local_map
    ranks, num_tokens = dispatcher.ep_size, len(dispatched_TE)
    flat = local_map_GL.T.reshape(-1).to(torch.uint8)
    token_P = flat.argsort(descending=True, stable=True)[:num_rows] % len(local_map_GL)
    order = (token_P // num_tokens).argsort(stable=True)
    # The dispatcher itself synchronises with the host for its counts.
    rows_for = local_map_GL.view(ranks, -1).sum(dim=1).tolist()
    rows_from = dispatched_TE.view(num_tokens, ranks, -1).sum(dim=(0, 2)).tolist()
    return RowExchange(order, num_rows, rows_for, rows_from, dispatcher.ep_group)


def _by_source(rows: Tensor, num_rows: int) -> Tensor:
    """[P] order by source of rows that lie in blocks; ``rows`` [..., R]: how many in each block, sources last."""
    sources = torch.arange(rows.shape[-1], device=rows.device).expand(rows.shape).reshape(-1)
    return sources.repeat_interleave(rows.reshape(-1), output_size=num_rows).argsort(stable=True)


def describe_dispatch(transformer_config) -> str:
    """One line: the dispatcher, and the ranks that rows are on."""
    ranks = transformer_config.expert_model_parallel_size
    columns = transformer_config.expert_tensor_parallel_size or transformer_config.tensor_model_parallel_size
    where = f"rows are returned from {ranks} expert-parallel ranks" if ranks > 1 else "every rank has all experts"
    summed = f"; products are summed over {columns} expert-tensor-parallel ranks" if columns > 1 else ""
    return f"{transformer_config.moe_token_dispatcher_type}; {where}{summed}"
