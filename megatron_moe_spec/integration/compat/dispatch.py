"""Assignment of permuted rows to the ranks of their tokens, read off a token dispatcher while its layer runs.

The source of a row is the expert-parallel rank of its token, together with the rank's expert-tensor-parallel peers:
these share their tokens' rows.

Suffixes: T tokens of this source, G tokens of all sources, E experts, L local experts, N = L + 1, R
expert-parallel ranks, C expert-tensor-parallel ranks, P rows.
"""

from typing import Any, Optional, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe_spec.integration.compat.protocols import (
    AllGatherDispatcher,
    AllToAllDispatcher,
    FlexDispatcher,
    TokenDispatcher,
    TransformerConfig,
)
from megatron_moe_spec.parallel.collectives import all_gather
from megatron_moe_spec.parallel.row_exchange import RowExchange
from megatron_moe_spec.parallel.row_indices import rows_by_source


def expert_map(experts_TK: Tensor, num_experts: int) -> Tensor:
    """Bool, [T, E], by the indices of the experts of each token; -1 is none."""
    chosen_TE = torch.zeros(len(experts_TK), num_experts + 1, dtype=torch.bool, device=experts_TK.device)
    return chosen_TE.scatter_(1, experts_TK % (num_experts + 1), True)[:, :num_experts]


def is_alltoall(dispatcher: TokenDispatcher) -> TypeGuard[AllToAllDispatcher]:
    return dispatcher.config.moe_token_dispatcher_type == "alltoall"


def is_allgather(dispatcher: TokenDispatcher) -> TypeGuard[AllGatherDispatcher]:
    return dispatcher.config.moe_token_dispatcher_type == "allgather"


def is_flex(dispatcher: TokenDispatcher) -> TypeGuard[FlexDispatcher]:
    """Whether a library takes the tokens of ``token_dispatch`` to the experts, and lays out their rows."""
    return dispatcher.config.moe_token_dispatcher_type == "flex"


def dispatched_map(dispatcher: TokenDispatcher, routing_map_TE: Tensor) -> Tensor:
    """Bool, [T, E] by which the dispatcher has permuted this rank's tokens; the router's map, or made from it.

    The alltoall dispatcher adds tokens that fill experts up (``moe_router_padding_for_quantization``); DeepEP takes the
    K largest probabilities, which a probability of 0 may make another choice.
    """
    if is_alltoall(dispatcher):
        return dispatcher.routing_map
    if not is_flex(dispatcher):
        return routing_map_TE
    manager = dispatcher._comm_manager
    experts_TK = getattr(manager, "token_indices", None)
    if experts_TK is None:  # HybridEP; it may add tokens, so that all ranks have the same number
        return manager.routing_map[: len(routing_map_TE)]
    return expert_map(experts_TK, routing_map_TE.shape[1])


def row_exchange(
    dispatcher: TokenDispatcher,
    dispatched_TE: Tensor,
    num_rows: int,
    a2a_dtype: str = "same",
    asks: bool = False,
    fused: bool = False,
) -> Optional[RowExchange]:
    """The exchange between the rows of this rank's experts and their sources; None where each rank has all experts.

    Of rows as they are handed over; see ``RowExchange.in_blocks`` for what is padded later. One host synchronisation,
    and none for the alltoall dispatcher without expert tensor parallelism. Call it between dispatch and combine: the
    next micro-batch overwrites the dispatcher's attributes.

    Args:
        dispatcher: MoEAlltoAllTokenDispatcher, MoEAllGatherTokenDispatcher or MoEFlexTokenDispatcher.
        dispatched_TE: bool, the dispatched map of this source's tokens.
        num_rows: that the dispatcher has handed to the local experts.
        a2a_dtype: see ``RowExchange``.
        asks: whether this rank asks for the rows to be checked; of the flex dispatcher, the others get to know it, see
            ``RowExchange.asked``.
        fused: whether the Triton kernels compute; else eager PyTorch.

    Raises:
        RuntimeError: the dispatcher has handed over another number of rows than the ranks are to exchange.
    """
    if dispatcher.ep_size == 1:
        return None
    if is_flex(dispatcher):
        order, counts_L, rows_for, rows_from, asked = _flex_layout(dispatcher, dispatched_TE, asks, fused)
        rows = rows_for, rows_from, dispatcher.ep_group, a2a_dtype
        return RowExchange(order, sum(counts_L), *rows, counts_L=counts_L, asked=asked)
    if is_allgather(dispatcher):
        blocks, rows_for, rows_from = _allgather_layout(dispatcher, dispatched_TE)
    elif dispatcher.tp_size > 1:
        blocks, rows_for, rows_from = _alltoall_etp_layout(dispatcher, dispatched_TE)
    else:
        assert is_alltoall(dispatcher)
        blocks, rows_for, rows_from = _alltoall_layout(dispatcher, dispatched_TE.device)
    if num_rows != sum(rows_for):
        raise RuntimeError(f"of {num_rows} rows of experts, {sum(rows_for)} are to be returned to their tokens")
    order, places = (None, None) if blocks is None else rows_by_source(blocks, num_rows, fused)
    return RowExchange(order, num_rows, rows_for, rows_from, dispatcher.ep_group, a2a_dtype, places)


def _alltoall_layout(
    dispatcher: AllToAllDispatcher, device: torch.device
) -> tuple[Optional[Tensor], list[int], list[int]]:
    """Rows of each of their blocks, sources last (None: they lie by source), and numbers for and from each rank."""
    # Rows lie by (local expert, source, token) and were received by (source, local expert, token).
    ranks, local = dispatcher.ep_size, dispatcher.num_local_experts
    if dispatcher.output_splits is None or dispatcher.input_splits is None:  # every expert is padded to its capacity
        rows_for = rows_from = [dispatcher.capacity * local] * ranks
    else:
        rows_for, rows_from = on_host(dispatcher.output_splits), on_host(dispatcher.input_splits)
    if local == 1:
        return None, rows_for, rows_from
    # The dispatcher has the counts on the host where it does not fuse the permutation.
    rows_RL = torch.as_tensor(dispatcher.num_global_tokens_per_local_expert).view(ranks, local)
    return (rows_RL if rows_RL.device == device else rows_RL.to(device, non_blocking=True)).T, rows_for, rows_from


def on_host(numbers: Any) -> list[int]:
    """Of numbers in a tensor, an array or a list; a tensor on the device is waited for."""
    return numbers.tolist() if hasattr(numbers, "tolist") else list(map(int, numbers))


def _alltoall_etp_layout(dispatcher: TokenDispatcher, dispatched_TE: Tensor) -> tuple[Tensor, list[int], list[int]]:
    # Rows lie by (local expert, tensor-parallel rank, source, token). The dispatcher keeps the counts only where it
    # needs them: one all-gather of E numbers, and one host synchronisation.
    ranks, peers, local = dispatcher.ep_size, dispatcher.tp_size, dispatcher.num_local_experts
    own_E = dispatched_TE.unflatten(0, (peers, -1))[dispatcher.tp_rank].sum(dim=0)
    rows_RCRL = all_gather(own_E, dispatcher.tp_ep_group).view(ranks, peers, ranks, local)
    rank = dispatcher.ep_group.rank()
    here_RCL = rows_RCRL[:, :, rank]
    rows_for, rows_from = torch.stack([here_RCL.sum(dim=(1, 2)), rows_RCRL[rank].sum(dim=(0, 2))]).tolist()
    return here_RCL.permute(2, 1, 0), rows_for, rows_from


def _allgather_layout(dispatcher: AllGatherDispatcher, dispatched_TE: Tensor) -> tuple[Tensor, list[int], list[int]]:
    # Rows lie by (local expert, global token), as in local_map [G, L]; source r has the r-th T of the global tokens.
    rows_RL = dispatcher.local_map.unflatten(0, (dispatcher.ep_size, len(dispatched_TE))).sum(dim=1)
    sent_R = dispatched_TE.sum(dim=0).view(dispatcher.ep_size, -1).sum(dim=1)
    # One host synchronisation; the dispatcher has another for its counts.
    rows_for, rows_from = torch.stack([rows_RL.sum(dim=1), sent_R]).tolist()
    return rows_RL.T, rows_for, rows_from


def _flex_layout(
    dispatcher: FlexDispatcher, dispatched_TE: Tensor, asks: bool, fused: bool
) -> tuple[Tensor, list[int], list[int], list[int], bool]:
    # DeepEP receives tokens by (source, token), which Megatron permutes by (local expert, source, token); HybridEP
    # hands the rows over in this order. Neither promises it, see ``RowCheck``. One all-to-all of E numbers, and a flag
    # to each rank, and one host synchronisation. Also returns the counts, for what the dispatcher counts may be padded.
    ranks, local = dispatcher.ep_size, dispatcher.num_local_experts
    sent_RL = dispatched_TE.sum(dim=0).view(ranks, local)
    sent_RN = torch.nn.functional.pad(sent_RL, (0, 1), value=int(asks))
    rows_RN = torch.empty_like(sent_RN)
    dist.all_to_all_single(rows_RN, sent_RN, group=dispatcher.ep_group)
    rows_RL, asked_R = rows_RN[:, :-1], rows_RN[:, -1]
    manager = dispatcher._comm_manager
    # DeepEP's received tokens that fill experts up lie between the others.
    filled = dispatcher.config.moe_router_padding_for_quantization and hasattr(manager, "dispatched_indices")
    permuted_TL = manager.dispatched_routing_map.bool() if filled else None
    counted_L = rows_RL.sum(dim=0) if permuted_TL is None else permuted_TL.sum(dim=0)
    asked, *counts = torch.cat([asked_R.amax(0, True), rows_RL.sum(dim=1), sent_RL.sum(dim=1), counted_L]).tolist()
    rows_for, rows_from, counts_L = counts[:ranks], counts[ranks : 2 * ranks], counts[2 * ranks :]
    order, _ = rows_by_source(rows_RL.T, sum(rows_for), fused)
    if permuted_TL is not None:
        row_LT = permuted_TL.T.reshape(-1).cumsum(0) - 1
        chosen_LT = expert_map(manager.dispatched_indices, local).T.reshape(-1)
        order = row_LT.repeat_interleave(chosen_LT.long(), output_size=len(order))[order]
    return order, counts_L, rows_for, rows_from, bool(asked)


def describe_dispatch(transformer_config: TransformerConfig) -> str:
    """One line: the dispatcher, and the ranks that rows are on."""
    ranks = transformer_config.expert_model_parallel_size
    columns = transformer_config.expert_tensor_parallel_size or transformer_config.tensor_model_parallel_size
    backend = getattr(transformer_config, "moe_flex_dispatcher_backend", "deepep")
    kind = transformer_config.moe_token_dispatcher_type
    kind = f"flex ({backend})" if kind == "flex" else kind
    where = f"rows are returned from {ranks} expert-parallel ranks" if ranks > 1 else "every rank has all experts"
    summed = f"; products are summed over {columns} expert-tensor-parallel ranks" if columns > 1 else ""
    return f"{kind}; {where}{summed}"
