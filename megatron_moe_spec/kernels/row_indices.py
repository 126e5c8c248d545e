"""The indices of the rows of each token among the permuted rows, from the dispatched map.

The eager reference is ``parallel.row_indices``. Rows are ordered by (expert, token), so the index of a row is the
number of marks before it in the map, column by column. One kernel counts the marks of each expert in each block of
tokens, a cumulative sum turns counts into indices, a second kernel writes them. No host synchronisation, no atomics.

Suffixes: T tokens, E experts, K experts of a token, P rows.

Worked example, dispatched [[1, 0, 1], [1, 1, 0]]: expert 0 has rows 0 (token 0) and 1 (token 1), expert 1 has row 2
(token 1), expert 2 has row 3 (token 0). The tokens' rows are (0, 3) and (1, 2).
"""

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_moe_spec.kernels.options import options as options_of
from megatron_moe_spec.kernels.tiles import check_like


@triton.jit
def _marks(
    map_ptr,
    num_tokens,
    share,
    first,
    stride,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ONLY_USED: tl.constexpr,
):
    """The marks of a block of tokens [BLOCK_T, BLOCK_E], 0 or 1 (ONLY_USED: those of used tokens), offsets, mask.

    Then [BLOCK_T] which tokens are used, every ``stride``-th of each rank's ``share``, and their index among these.
    """
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)
    mask = (token < num_tokens)[:, None] & (expert < E)[None, :]
    offsets = token[:, None] * E + expert[None, :]
    marks = tl.load(map_ptr + offsets, mask=mask, other=0).to(tl.int32)
    own = token % share - first
    is_used = (token < num_tokens) & (own >= 0) & (own % stride == 0)
    used_of_rank = (share - first + stride - 1) // stride
    place = token // share * used_of_rank + own // stride
    if ONLY_USED:
        marks = tl.where(is_used[:, None], marks, 0)
    return marks, offsets, mask, is_used, place


@triton.jit(do_not_specialize=["num_tokens", "num_blocks", "share", "first", "stride"])
def _count_kernel(
    dispatched_ptr,  # bool [T, E]
    counts_ptr,  # int32 [E, blocks], out: marks of the block's tokens
    num_tokens,
    num_blocks,
    share,
    first,
    stride,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ONLY_USED: tl.constexpr,
):
    marks, offsets, mask, is_used, place = _marks(
        dispatched_ptr, num_tokens, share, first, stride, E, BLOCK_T, BLOCK_E, ONLY_USED
    )
    expert = tl.arange(0, BLOCK_E).to(tl.int64)
    tl.store(counts_ptr + expert * num_blocks + tl.program_id(0), tl.sum(marks, axis=0), mask=expert < E)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks", "share", "first", "stride"])
def _rows_kernel(
    dispatched_ptr,  # bool [T, E]
    active_ptr,  # bool [T, E], the part that counts
    ends_ptr,  # int32 [E, blocks], the counts' inclusive cumulative sum
    starts_ptr,  # int32 [E] first row of each expert; None: they follow one another
    rows_ptr,  # int32 [used tokens, K], out
    used_ptr,  # bool [P], out: of the rows of dispatched tokens
    num_tokens,
    num_blocks,
    share,
    first,
    stride,
    E: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ONLY_USED: tl.constexpr,
):
    marks, offsets, mask, is_used, place = _marks(
        dispatched_ptr, num_tokens, share, first, stride, E, BLOCK_T, BLOCK_E, ONLY_USED
    )
    expert = tl.arange(0, BLOCK_E).to(tl.int64)
    end = tl.load(ends_ptr + expert * num_blocks + tl.program_id(0), mask=expert < E, other=0)
    start = end - tl.sum(marks, axis=0)
    if starts_ptr is not None:
        is_later = (expert > 0) & (expert < E)
        before = tl.load(ends_ptr + expert * num_blocks - 1, mask=is_later, other=0)
        start += tl.load(starts_ptr + expert, mask=expert < E, other=0) - before
    row = start[None, :] + tl.cumsum(marks, axis=0) - 1
    active = tl.load(active_ptr + offsets, mask=mask & is_used[:, None], other=0).to(tl.int32)
    slot = tl.cumsum(active, axis=1) - 1
    is_active = (active != 0) & (slot < K)
    out = place[:, None] * K
    tl.store(rows_ptr + out + slot, row, mask=is_active)
    tl.store(used_ptr + row, is_active.to(tl.int8), mask=marks != 0)
    # -1 where a token has fewer than K.
    slots = tl.arange(0, SLOTS)[None, :]
    is_free = (slots >= tl.sum(active, axis=1)[:, None]) & (slots < K)
    tl.store(rows_ptr + out + slots, tl.full([BLOCK_T, SLOTS], -1, tl.int32), mask=is_free & is_used[:, None])


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
    """The indices of the rows of each used token, in the order of its experts, and which rows these are.

    Args:
        dispatched_TE: bool, the map that rows were permuted by.
        active_TE: bool, the experts of each token that count, at most ``top_k``; among the dispatched ones.
        num_rows: P.
        tokens: which of each rank's tokens are used: slice(first, None, stride).
        num_ranks: ranks whose tokens these are, one rank after another, as many of each.
        only_used: whether the rows are those of the used tokens; else, of all tokens.
        starts_E: int32, index of the first row of each expert. Default: no padding between experts.

    Returns:
        rows int32 [used tokens, K], -1 where the token has fewer; used bool [P].
    """
    if dispatched_TE.dim() != 2 or dispatched_TE.dtype != torch.bool:
        raise ValueError(f"dispatched_TE must be bool [T, E]; got {dispatched_TE.dtype} {list(dispatched_TE.shape)}")
    check_like("active_TE", active_TE, dispatched_TE.shape, torch.bool)
    device, (num_tokens, num_experts) = dispatched_TE.device, dispatched_TE.shape
    share = num_tokens // num_ranks
    num_used = len(range(share)[tokens]) * num_ranks
    rows_TK = torch.empty(num_used, top_k, dtype=torch.int32, device=device)
    # Padding rows belong to no token, and the kernel does not write them.
    new = torch.empty if starts_E is None else torch.zeros
    used_P = new(num_rows, dtype=torch.bool, device=device)
    if not num_tokens:
        return rows_TK, used_P.zero_()
    block_e = triton.next_power_of_2(num_experts)
    chosen = options_of("row_indices", dispatched_TE.element_size())
    block_t = max(min(chosen["MOST_TOKENS"], chosen["ELEMENTS"] // block_e), 1)
    num_blocks = triton.cdiv(num_tokens, block_t)
    sizes = num_tokens, num_blocks, share, tokens.start, tokens.step
    options = dict(E=num_experts, BLOCK_T=block_t, BLOCK_E=block_e, ONLY_USED=only_used, num_warps=chosen["num_warps"])
    dispatched_TE, active_TE = dispatched_TE.contiguous().view(torch.uint8), active_TE.contiguous().view(torch.uint8)
    counts = torch.empty(num_experts, num_blocks, dtype=torch.int32, device=device)
    _count_kernel[(num_blocks,)](dispatched_TE, counts, *sizes, **options)
    ends = counts.view(-1).cumsum(0, dtype=torch.int32)
    tensors = dispatched_TE, active_TE, ends, starts_E, rows_TK, used_P.view(torch.uint8)
    _rows_kernel[(num_blocks,)](*tensors, *sizes, K=top_k, SLOTS=triton.next_power_of_2(top_k), **options)
    return rows_TK, used_P
