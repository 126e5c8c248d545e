"""Cosines between the permuted rows of each token, and gradients through them.

The eager reference is ``losses.vectors``. A program reads the rows of a tile of tokens once, wherever they lie, and
computes the tile's 16 x 16 dot products on tensor cores; the K x K blocks on the diagonal belong to one token each. The
gathered rows are not copied and there are no atomics: runs are bitwise equal. Each operation is one launch.

Suffixes: P rows, D row size, T tokens, K experts per token, N = K (K - 1) / 2 pairs of these, in the order (0, 1),
(0, 2), ..., (1, 2), ... of ``losses.vectors.packed``.

Worked example, one token with x = (3, 4) in row 1 and (4, 3) in row 0: products 24 off the diagonal and 25 on it,
cosine 24 / 25 = 0.96. For the sum of the squared cosines over both ordered pairs, 2 * 0.96^2 = 1.8432, the mixing
matrix is 4 * 0.96 = 3.84 off the diagonal and -4 * 0.96^2 = -3.6864 on it. The gradient for the first vector is
1 / 5 * (3.84 * (0.8, 0.6) - 3.6864 * (0.6, 0.8)) = (0.172032, -0.129024), for the second the same with its components
swapped.
"""

from functools import partial
from typing import Optional, Union

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_moe_spec.kernels.launch import Launch
from megatron_moe_spec.kernels.options import cached, options
from megatron_moe_spec.kernels.tiles import (
    check_like,
    checked_shape,
    empty_like,
    in_dtype,
    load_mixing,
    multiply_split,
    num_blocks,
    pair_offsets,
    same_token,
    tile_rows,
    tiling,
    unused_rows,
    weight_and_factor,
    with_dense_rows,
)

# A squared length between these is a sum of squares that neither overflowed nor underflowed.
_SMALLEST, _LARGEST = tl.constexpr(2.0**-60), tl.constexpr(2.0**100)


@triton.jit
def _products(row_ptrs, active, D, scale, BLOCK_D: tl.constexpr, OPERAND: tl.constexpr, SCALED: tl.constexpr):
    """[TILE, TILE] dot products of the rows, each row times its scale where SCALED."""
    TILE: tl.constexpr = row_ptrs.shape[0]
    products = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        x = tl.load(row_ptrs[:, None] + column[None, :], mask=active[:, None] & (column < D)[None, :], other=0.0)
        if SCALED:
            x = x.to(tl.float32) * scale[:, None]
        x = x.to(OPERAND)
        products = tl.dot(x, tl.trans(x), products, input_precision="ieee")
    return products


@triton.jit
def _powers(row_ptrs, active, D, BLOCK_D: tl.constexpr):
    """[TILE] the power of two at or below each row's largest component, between 2^-126 and 2^126."""
    TILE: tl.constexpr = row_ptrs.shape[0]
    largest = tl.zeros([TILE], tl.float32)
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        x = tl.load(row_ptrs[:, None] + column[None, :], mask=active[:, None] & (column < D)[None, :], other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(x.to(tl.float32)), axis=1))
    exponent = largest.to(tl.int32, bitcast=True) >> 23
    return (tl.minimum(tl.maximum(exponent, 1), 253) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_tokens"])
def _cosines_kernel(
    x_ptr,  # bf16 | fp16 | fp32 [P, D]
    rows_ptr,  # int32 [T, K]
    cosines_ptr,  # fp32 [T, N], out; products [T, K, K] where PARTIAL
    lengths_ptr,  # fp32 [T, K], out: inverse lengths; the units of the products where PARTIAL
    squares_ptr,  # fp32 [tiles], out: sums of the squared cosines; None where PARTIAL
    num_tokens,
    D,
    row_stride,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDE_RANGE: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    token, slot, row, inside, active = tile_rows(rows_ptr, num_tokens, K, SLOTS, TILE)
    row_ptrs = x_ptr + row * row_stride
    diagonal = tl.arange(0, TILE)[:, None] == tl.arange(0, TILE)[None, :]
    power = tl.full([TILE], 1.0, tl.float32)
    products = _products(row_ptrs, active, D, power, BLOCK_D, OPERAND, False)
    if WIDE_RANGE:
        # Rare: a zero, infinite, NaN, tiny or huge row, whose squares may be out of range. Divide first.
        squares = tl.sum(tl.where(diagonal, products, 0.0), axis=1)
        in_range = (squares > _SMALLEST) & (squares < _LARGEST)
        if tl.sum((active & (in_range == 0)).to(tl.int32), axis=0) > 0:
            power = _powers(row_ptrs, active, D, BLOCK_D)
            products = _products(row_ptrs, active, D, 1.0 / power, BLOCK_D, OPERAND, True)
    own = same_token(token, inside)
    if PARTIAL:
        tl.store(cosines_ptr + (token * K + slot)[:, None] * K + slot[None, :], products, mask=own)
        tl.store(lengths_ptr + token * K + slot, power, mask=inside)
    else:
        column_inverse = _inverse_root(tl.sum(tl.where(diagonal, products, 0.0), axis=0))
        row_inverse = _inverse_root(tl.sum(tl.where(diagonal, products, 0.0), axis=1))
        upper = own & (slot[:, None] < slot[None, :])
        cosines = tl.where(upper, products * row_inverse[:, None] * column_inverse[None, :], 0.0)
        tl.store(cosines_ptr + pair_offsets(token, slot, K), cosines, mask=upper)
        tl.store(lengths_ptr + token * K + slot, row_inverse / power, mask=inside)
        tl.store(squares_ptr + tl.program_id(0), 2.0 * tl.sum(tl.sum(cosines * cosines, axis=1), axis=0))


@triton.jit
def _inverse_root(squares):
    is_zero = squares == 0.0
    return tl.where(is_zero, 0.0, 1.0 / tl.sqrt_rn(tl.where(is_zero, 1.0, squares)))


@triton.jit
def _any_not_finite(active, inverse):
    """Whether a row of the tile may be infinite or NaN: its inverse length is 0 or NaN, as that of a zero row is 0."""
    return tl.sum((active & ((inverse > 0.0) == 0)).to(tl.int32), axis=0) > 0


@triton.jit
def _add_mix(
    x_rows,
    incoming_ptr,
    incoming_offsets,
    out_rows,
    active,
    high,
    low,
    scale,
    D,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    FINITE: tl.constexpr,
):
    """Writes incoming + scale * (high + low) x; unless FINITE, infinite and NaN elements of x count as 0."""
    column = tl.arange(0, BLOCK_D)
    if incoming_ptr is not None:
        incoming_rows = incoming_ptr + incoming_offsets
        coming = tl.load(incoming_rows + column[None, :], mask=active & (column < D)[None, :], other=0.0)
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        mask = active & (column < D)[None, :]
        x = tl.load(x_rows + column[None, :], mask=mask, other=0.0).to(OPERAND)
        if incoming_ptr is not None:
            incoming = coming
            after = column + BLOCK_D  # loaded one block ahead
            coming = tl.load(incoming_rows + after[None, :], mask=active & (after < D)[None, :], other=0.0)
        if not FINITE:
            x = tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0)
        result = multiply_split(high, low, x, OPERAND) * scale
        if incoming_ptr is not None:
            result += incoming.to(tl.float32)
        tl.store(out_rows + column[None, :], result, mask=mask)


# Counts differ from step to step: compiled once for all of them.
@triton.jit(do_not_specialize=["factor", "num_tiles", "num_tokens", "num_rows"])
def _mixing_kernel(
    x_ptr,  # bf16 | fp16 | fp32 [P, D]
    rows_ptr,  # int32 [T, K]
    used_ptr,  # bool [P]
    mixing_ptr,  # fp32 [T, K, K]; cosines [T, N] where OF_SQUARES
    lengths_ptr,  # fp32 [T, K] inverse lengths
    out_ptr,  # dtype of x [P, D], out: incoming + gradient
    weight_ptr,  # fp32 [1]; None: one
    incoming_ptr,  # dtype of x [P, D]; None: zeros
    factor,
    num_tiles,
    num_tokens,
    num_rows,
    D,
    x_stride,
    incoming_stride,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    OF_SQUARES: tl.constexpr,
):
    if tl.program_id(0) < num_tiles:
        token, slot, row, inside, active = tile_rows(rows_ptr, num_tokens, K, SLOTS, TILE)
        high, low, inverse, scale = load_mixing(
            mixing_ptr, lengths_ptr, weight_ptr, factor, token, slot, inside, K, OPERAND, OF_SQUARES
        )
        scale, mask = scale[:, None], active[:, None]
        x_rows, incoming_offsets = x_ptr + (row * x_stride)[:, None], (row * incoming_stride)[:, None]
        out_rows = out_ptr + (row * D)[:, None]
        # The mixing of a token with an infinite or NaN row is NaN; it must not reach other tokens of the tile.
        if _any_not_finite(active, inverse):
            _add_mix(
                x_rows, incoming_ptr, incoming_offsets, out_rows, mask, high, low, scale, D, BLOCK_D, OPERAND, False
            )
        else:
            _add_mix(
                x_rows, incoming_ptr, incoming_offsets, out_rows, mask, high, low, scale, D, BLOCK_D, OPERAND, True
            )
    else:
        row, unused = unused_rows(used_ptr, tl.program_id(0) - num_tiles, num_rows, TILE)
        if tl.sum(unused.to(tl.int32), axis=0) > 0:
            for start in range(0, D, BLOCK_D):
                column = start + tl.arange(0, BLOCK_D)
                mask = unused[:, None] & (column < D)[None, :]
                result = tl.zeros([TILE, BLOCK_D], tl.float32)
                if incoming_ptr is not None:
                    incoming_ptrs = incoming_ptr + (row * incoming_stride)[:, None] + column[None, :]
                    result = tl.load(incoming_ptrs, mask=mask, other=0.0).to(tl.float32)
                tl.store(out_ptr + (row * D)[:, None] + column[None, :], result, mask=mask)


def row_cosines(x_PD: Tensor, rows_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines between the rows of each token; reads these rows once.

    Args:
        x_PD: [P, D] bf16, fp16 or fp32, of any row stride; the elements of a row are adjacent, or are copied.
        rows_TK: int32, the indices of each token's rows in x; -1: no row. A row belongs to at most one token.

    Returns:
        Cosines [T, N], 0 where there is no row; inverse lengths [T, K], 0 for zero rows and where there is none;
        squared cosines over ordered pairs, as partial sums, one a tile. All fp32.
    """
    return _launch_cosines(x_PD, rows_TK, of_columns=False)


def row_products(x_PD: Tensor, rows_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Dot products between the rows of each token, for rows of which x has this rank's columns; see ``row_cosines``.

    Returns:
        Products [T, K, K] and units [T, K], fp32: rows i and j have the dot product products_ij * units_i * units_j. A
        unit is a power of two that keeps the squares of tiny and huge rows in range. Next: take the largest units of
        all ranks, convert each rank's products to them by ``in_units``, sum, and call ``cosines_from_products``.
    """
    return _launch_cosines(x_PD, rows_TK, of_columns=True)[:2]


def _launch_cosines(x_PD: Tensor, rows_TK: Tensor, of_columns: bool) -> tuple:
    num_tokens, k = checked_shape(x_PD, rows_TK)
    num_tiles, device = num_blocks(num_tokens, tiling(k, x_PD.dtype)[1]), x_PD.device
    numbers = k * k if of_columns else k * (k - 1) // 2
    out = torch.empty(num_tokens, numbers, dtype=torch.float32, device=device)
    lengths_TK = torch.empty(num_tokens, k, dtype=torch.float32, device=device)
    squares = None if of_columns else torch.empty(num_tiles, dtype=torch.float32, device=device)
    if num_tiles:
        x_PD = with_dense_rows(x_PD)
        tensors = x_PD, rows_TK.contiguous(), out, lengths_TK
        sizes = x_PD.shape[1], x_PD.stride()[0]
        _cosines_launch(k, x_PD.dtype, of_columns)(num_tiles, tensors, (num_tokens,), sizes, (squares,))
    return out.view(num_tokens, k, k) if of_columns else out, lengths_TK, squares


@cached
def _cosines_launch(k: int, dtype: torch.dtype, of_columns: bool) -> Launch:
    constants = dict(WIDE_RANGE=dtype != torch.float16, PARTIAL=of_columns, **options("cosines", dtype.itemsize))
    return Launch(_cosines_kernel, **tiling(k, dtype)[2], **constants)


def in_units(products_TKK: Tensor, units_TK: Tensor, new_units_TK: Tensor) -> Tensor:
    """Converts ``row_products`` to units that are no smaller; exact, since units are powers of two."""
    factors_TK = units_TK / new_units_TK
    return products_TKK * factors_TK.unsqueeze(2) * factors_TK.unsqueeze(1)


def cosines_from_products(products_TKK: Tensor, units_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines [T, K, K], 0 on the diagonal, and inverse lengths, from ``row_products``; eager, on small tensors."""
    squares_TK = products_TKK.diagonal(dim1=1, dim2=2)
    inverse_TK = torch.where(squares_TK == 0, 0.0, 1.0 / squares_TK.sqrt())
    off_diagonal = 1.0 - torch.eye(products_TKK.shape[1], device=products_TKK.device)
    cosines_TKK = products_TKK * inverse_TK.unsqueeze(2) * inverse_TK.unsqueeze(1) * off_diagonal
    return cosines_TKK, inverse_TK / units_TK


def add_mixed(
    x_PD: Tensor,
    rows_TK: Tensor,
    used_P: Tensor,
    mixing: Tensor,
    inverse_lengths_TK: Tensor,
    weight: Union[Tensor, float],
    incoming_PD: Optional[Tensor] = None,
    factor: float = 1.0,
    of_squares: bool = False,
) -> Tensor:
    """incoming + factor * weight * (each row's mix of its token's directions, over the row's length), rounded once.

    With the mixing matrices of ``losses.vectors.mixing_of``, this is the gradient with respect to x. Reads the tokens'
    rows of x and the incoming gradient once, and writes once. Rows of no token keep their incoming gradient. The
    incoming tensor is not overwritten, since autograd may have given it to other nodes.

    Args:
        x_PD, rows_TK: as given to ``row_cosines``.
        used_P: bool, which rows of x are in ``rows_TK``.
        mixing: [T, K, K] fp32; of squares, cosines [T, N] from ``row_cosines``.
        inverse_lengths_TK: from ``row_cosines``.
        weight: a number, or an fp32 tensor of one element, which is not read on the host.
        incoming_PD: [P, D] in the dtype of x; None: zeros.
        of_squares: whether the kernel makes the mixing matrices, for the gradient with respect to x of the sum of the
            squared cosines over ordered pairs.

    Returns:
        [P, D] in the dtype of x, contiguous.
    """
    num_tokens, k = checked_shape(x_PD, rows_TK)
    if of_squares:
        check_like("cosines_TN", mixing, (num_tokens, k * (k - 1) // 2), torch.float32)
    else:
        check_like("mixing_TKK", mixing, (num_tokens, k, k), torch.float32)
    check_like("used_P", used_P, x_PD.shape[:1], torch.bool)
    check_like("inverse_lengths_TK", inverse_lengths_TK, rows_TK.shape, torch.float32)
    weight, factor = weight_and_factor(weight, factor, x_PD.device)
    incoming_stride = 0
    if incoming_PD is not None:
        check_like("incoming_PD", incoming_PD, x_PD.shape, x_PD.dtype)
        incoming_PD = with_dense_rows(incoming_PD)
        incoming_stride = incoming_PD.stride()[0]
    x_PD = with_dense_rows(x_PD)
    out_PD = empty_like(x_PD)
    if out_PD.numel():
        (num_rows, D), (tile, tokens, _) = x_PD.shape, tiling(k, x_PD.dtype)
        num_tiles = num_blocks(num_tokens, tokens)
        kept = rows_TK.contiguous(), used_P.contiguous(), mixing.contiguous(), inverse_lengths_TK.contiguous()
        numbers = factor, num_tiles, num_tokens, num_rows
        launch = _mixing_launch(k, x_PD.dtype, of_squares)
        sizes = D, x_PD.stride()[0], incoming_stride
        launch(num_tiles + num_blocks(num_rows, tile), (x_PD, *kept, out_PD), numbers, sizes, (weight, incoming_PD))
    return in_dtype(out_PD, x_PD.dtype)


@cached
def _mixing_launch(k: int, dtype: torch.dtype, of_squares: bool) -> Launch:
    return Launch(_mixing_kernel, **tiling(k, dtype)[2], OF_SQUARES=of_squares, **options("mixing", dtype.itemsize))


add_squares_gradient = partial(add_mixed, of_squares=True)
