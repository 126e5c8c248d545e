"""The indices of the rows of each token among the permuted rows, from the dispatched map.

The eager reference is ``parallel.row_indices``. Rows are ordered by (expert, token), so the index of a row is the
number of marks before it in the map, column by column. One kernel counts the marks of each expert in each block of
tokens, a cumulative sum turns counts into indices, a second kernel writes them. No host synchronisation, no atomics.

Suffixes: T tokens, E experts, K experts of a token, P rows.

Worked example, dispatched [[1, 0, 1], [1, 1, 0]]: expert 0 has rows 0 (token 0) and 1 (token 1), expert 1 has row 2
(token 1), expert 2 has row 3 (token 0). The tokens' rows are (0, 3) and (1, 2).
"""

from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_moe_spec.kernels.launch import Launch
from megatron_moe_spec.kernels.options import cached, options
from megatron_moe_spec.kernels.tiles import check_like, num_blocks, power_of_2


@triton.jit
def _bytes(bool_ptr):
    """The same address: what is 0 or 1 takes fewer registers as a number than as a predicate."""
    return bool_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)


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
    marks = tl.load(_bytes(map_ptr) + offsets, mask=mask, other=0).to(tl.int32)
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
    rows_ptr,  # int32 [used tokens, K], out
    used_ptr,  # bool [P], out: of the rows of dispatched tokens
    starts_ptr,  # int32 [E] first row of each expert; None: they follow one another
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
    active = tl.load(_bytes(active_ptr) + offsets, mask=mask & is_used[:, None], other=0).to(tl.int32)
    slot = tl.cumsum(active, axis=1) - 1
    is_active = (active != 0) & (slot < K)
    out = place[:, None] * K
    tl.store(rows_ptr + out + slot, row, mask=is_active)
    tl.store(_bytes(used_ptr) + row, is_active.to(tl.int8), mask=marks != 0)
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
    blocks = num_blocks(num_tokens, _block_tokens(num_experts))
    numbers = num_tokens, blocks, share, tokens.start, tokens.step
    dispatched_TE = dispatched_TE.contiguous()
    counts = torch.empty(num_experts * blocks, dtype=torch.int32, device=device)
    _count_launch(num_experts, only_used)(blocks, (dispatched_TE, counts), numbers)
    ends = counts.cumsum_(0)
    tensors = dispatched_TE, active_TE.contiguous(), ends, rows_TK, used_P
    _rows_launch(num_experts, only_used, top_k)(blocks, tensors, numbers, optional=(starts_E,))
    return rows_TK, used_P


@cached
def _block_tokens(num_experts: int) -> int:
    chosen = options("row_indices", 1)
    return max(min(chosen["MOST_TOKENS"], chosen["ELEMENTS"] // power_of_2(num_experts)), 1)


@cached
def _count_launch(num_experts: int, only_used: bool) -> Launch:
    return Launch(_count_kernel, **_constants(num_experts, only_used))


@cached
def _rows_launch(num_experts: int, only_used: bool, top_k: int) -> Launch:
    return Launch(_rows_kernel, K=top_k, SLOTS=power_of_2(top_k), **_constants(num_experts, only_used))


def _constants(num_experts: int, only_used: bool) -> dict[str, Any]:
    blocks = dict(BLOCK_T=_block_tokens(num_experts), BLOCK_E=power_of_2(num_experts))
    return dict(E=num_experts, ONLY_USED=only_used, num_warps=options("row_indices", 1)["num_warps"], **blocks)


@triton.jit(do_not_specialize=["block_stride", "source_stride"])
def _by_source_kernel(
    counts_ptr,  # int32 | int64 [blocks, SOURCES], rows of each block; of all sources, one after another
    order_ptr,  # int32 [P], out: where the rows lie, in the order of sources
    places_ptr,  # int32 [P], out: where they are in that order, as they lie
    block_stride,
    source_stride,
    NUMBER: tl.constexpr,
    SOURCES: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    own = tl.program_id(0)
    number = tl.arange(0, PADDED)
    source, own_source = number % SOURCES, own % SOURCES
    counts_ptrs = counts_ptr + (number // SOURCES).to(tl.int64) * block_stride + source.to(tl.int64) * source_stride
    rows = tl.load(counts_ptrs, mask=number < NUMBER, other=0).to(tl.int32)
    is_before = (source < own_source) | ((source == own_source) & (number < own))
    lies = tl.sum(tl.where(number < own, rows, 0), axis=0)
    place = tl.sum(tl.where(is_before, rows, 0), axis=0)
    own_rows = tl.sum(tl.where(number == own, rows, 0), axis=0)
    for start in range(0, own_rows, BLOCK_P):
        row = start + tl.arange(0, BLOCK_P)
        tl.store(order_ptr + place + row, lies + row, mask=row < own_rows)
        tl.store(places_ptr + lies + row, place + row, mask=row < own_rows)


def rows_by_source(counts: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """See ``parallel.row_indices.rows_by_source``; int32."""
    counts = counts if counts.dim() == 2 else counts.flatten(0, -2)
    blocks, sources = counts.shape
    order = torch.empty(num_rows, dtype=torch.int32, device=counts.device)
    places = torch.empty_like(order)
    if num_rows:
        _by_source_launch(blocks, sources)(blocks * sources, (counts, order, places), counts.stride())
    return order, places


@cached
def _by_source_launch(blocks: int, sources: int) -> Launch:
    number = blocks * sources
    constants = dict(NUMBER=number, SOURCES=sources, PADDED=power_of_2(number), BLOCK_P=1024)
    return Launch(_by_source_kernel, **constants, num_warps=4)
