"""Where the rows of each token lie among those of the experts, from the dispatched map; eager.

Suffixes: T tokens, E experts, K experts of a token, P rows.
"""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Optional

import torch
from torch import Tensor

from megatron_moe_spec import kernels

_NONE = torch.iinfo(torch.int32).max


def first_rows(rows_E: Sequence[int], device: torch.device) -> Tensor:
    """[E] int32 each expert's first row, from their numbers with padding. No synchronisation with the device."""
    starts = torch.tensor(
        [0, *accumulate(rows_E)][:-1], dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda"
    )
    return starts.to(device, non_blocking=True)


def expert_rows(dispatched_TE: Tensor, starts_E: Optional[Tensor] = None) -> Tensor:
    """[T, E] positions of each token's rows among the rows of these tokens, ordered by (expert, token).

    No host synchronisation. Meaningless where a token has no row.

    Args:
        dispatched_TE: bool, the map that the dispatcher has permuted by.
        starts_E: from ``first_rows``, where the rows of an expert may be padded at the end.
    """
    if starts_E is None:
        return (dispatched_TE.T.reshape(-1).cumsum(0) - 1).view(dispatched_TE.shape[::-1]).T
    return dispatched_TE.cumsum(dim=0) - 1 + starts_E


def rows_of_tokens(
    dispatched_TE: Tensor,
    active_TE: Tensor,
    top_k: int,
    num_rows: int,
    tokens: slice = slice(0, None, 1),
    num_ranks: int = 1,
    only_used: bool = False,
    starts_E: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor]:
    """The eager reference of ``kernels.row_indices.rows_of_tokens``, which documents the arguments."""
    used = partial(used_tokens, tokens=tokens, num_ranks=num_ranks)
    row_TE = expert_rows(used(dispatched_TE)) if only_used else used(expert_rows(dispatched_TE, starts_E))
    row_TE = torch.where(used(active_TE), row_TE, _NONE)
    rows_TK = row_TE.topk(top_k, dim=1, largest=False).values
    used_P = torch.zeros(num_rows + 1, dtype=torch.bool, device=rows_TK.device)
    used_P.index_fill_(0, rows_TK.clamp_max(num_rows).view(-1), True)
    return torch.where(rows_TK == _NONE, -1, rows_TK).int(), used_P[:num_rows]


def rows_by_source(counts: Tensor, num_rows: int, fused: bool = False) -> tuple[Tensor, Optional[Tensor]]:
    """The order by source of rows that lie in blocks, and its inverse where the kernel computes.

    Args:
        counts: int32 or int64 [..., R], numbers of rows of blocks that follow one another; R sources.
        num_rows: P, their sum.

    Returns:
        [P] indices of the rows, those of the first source first; [P] place of each row in that order.
    """
    if fused:
        return kernels.module("row_indices").rows_by_source(counts, num_rows)
    starts = (counts.flatten().cumsum(0) - counts.flatten()).view(-1, counts.shape[-1]).T.flatten()
    counts = counts.flatten(0, -2).T.flatten()
    moved = starts - (counts.cumsum(0) - counts)
    order = torch.arange(num_rows, device=counts.device) + moved.repeat_interleave(counts, output_size=num_rows)
    return order, None


def experts_of_tokens(active_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """[T, K] indices of the active experts of each token, ascending; bool, which there are: the others are expert 0."""
    num_experts = active_TE.shape[1]
    experts_E = torch.arange(num_experts, device=active_TE.device)
    experts_TK = torch.where(active_TE, experts_E, num_experts).topk(top_k, dim=1, largest=False).values
    active_TK = experts_TK < num_experts
    return experts_TK * active_TK, active_TK


def used_tokens(x_T: Tensor, tokens: slice, num_ranks: int) -> Tensor:
    """Of [T, ...] for all tokens of the column group, that of the used tokens; a view but for the last step."""
    return x_T.unflatten(0, (num_ranks, -1))[:, tokens].flatten(0, 1)
