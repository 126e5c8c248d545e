"""Angles between the vectors of each token, and gradients through them, on permuted rows; twin of ``losses.vectors``.

A program takes a tile of 16 (token, slot) pairs, that is 16 / K tokens with K padded to a power of two. It streams
their rows once, wherever they lie, and forms the tile's 16 x 16 products on tensor cores; the K x K blocks on the
diagonal are the tokens' own. No copy of the gathered rows is made and there are no atomics: runs are bitwise equal.
Each operation is one launch, and no other work for the device.

Suffixes: P rows, D row size, T tokens, K experts per token, N = K (K - 1) / 2 pairs of these, in the order (0, 1),
(0, 2), ..., (1, 2), ... of ``losses.vectors.packed``.

Worked example, one token with x = (3, 4) in row 1 and (4, 3) in row 0: products 24 off the diagonal and 25 on it,
cosine 24 / 25 = 0.96. For the sum of the squared cosines over both ordered pairs, 2 * 0.96^2 = 1.8432, the mixing
matrix is 4 * 0.96 = 3.84 off the diagonal and -4 * 0.96^2 = -3.6864 on it. The gradient for the first vector is
1 / 5 * (3.84 * (0.8, 0.6) - 3.6864 * (0.6, 0.8)) = (0.172032, -0.129024), for the second the same with its components
swapped.
"""

from collections.abc import Sequence
from typing import Optional, Union

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_moe_spec.kernels import computed_dtype, weight_and_factor

# How the kernels are compiled, by number of bytes of an element of x.
FORWARD = {2: dict(BLOCK_D=64, num_warps=1, num_stages=6), 4: dict(BLOCK_D=32, num_warps=1, num_stages=3)}
BACKWARD = {2: dict(BLOCK_D=128, num_warps=4, num_stages=3), 4: dict(BLOCK_D=32, num_warps=4, num_stages=2)}

_MIN_TILE = 16  # the smallest side of a matrix product on tensor cores
# Squared lengths between these are sums of squares that neither overflowed nor lost anything to underflow.
_SMALLEST, _LARGEST = tl.constexpr(2.0**-60), tl.constexpr(2.0**100)


@triton.jit
def _tile_rows(rows_ptr, num_tokens, K: tl.constexpr, SLOTS: tl.constexpr, TILE: tl.constexpr):
    """Token, slot, row number, which are inside of rows, and which have a row, of each of the (token, slot) pairs."""
    pair = tl.arange(0, TILE)
    slot = pair % SLOTS
    token = tl.program_id(0).to(tl.int64) * (TILE // SLOTS) + pair // SLOTS
    inside = (slot < K) & (token < num_tokens)
    row = tl.load(rows_ptr + token * K + slot, mask=inside, other=-1).to(tl.int64)
    return token, slot, row, inside, row >= 0


@triton.jit
def _own(token, inside):
    """[TILE, TILE] which pairs of (token, slot) pairs are of one token."""
    return (token[:, None] == token[None, :]) & inside[:, None] & inside[None, :]


@triton.jit
def _pair_offsets(token, slot, K: tl.constexpr):
    """[TILE, TILE] where the cosine of each two slots of a token is, of either order, in packed ones [T, N]."""
    slot = slot.to(tl.int64)
    first = tl.minimum(slot[:, None], slot[None, :])
    second = tl.maximum(slot[:, None], slot[None, :])
    before = first * (2 * K - 1 - first) // 2  # pairs whose first slot is lower
    return (token * (K * (K - 1) // 2))[:, None] + (before + second - first - 1)


@triton.jit
def _products(row_ptrs, active, D, scale, BLOCK_D: tl.constexpr, OPERAND: tl.constexpr, SCALED: tl.constexpr):
    """[TILE, TILE] dot products of the rows, each times its scale where SCALED."""
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
    token, slot, row, inside, active = _tile_rows(rows_ptr, num_tokens, K, SLOTS, TILE)
    row_ptrs = x_ptr + row * row_stride
    diagonal = tl.arange(0, TILE)[:, None] == tl.arange(0, TILE)[None, :]
    power = tl.full([TILE], 1.0, tl.float32)
    products = _products(row_ptrs, active, D, power, BLOCK_D, OPERAND, False)
    if WIDE_RANGE:
        # Rare: a zero, infinite, NaN, tiny or huge row. Its squares may be out of range, so divide first.
        squares = tl.sum(tl.where(diagonal, products, 0.0), axis=1)
        in_range = (squares > _SMALLEST) & (squares < _LARGEST)
        if tl.sum((active & (in_range == 0)).to(tl.int32), axis=0) > 0:
            power = _powers(row_ptrs, active, D, BLOCK_D)
            products = _products(row_ptrs, active, D, 1.0 / power, BLOCK_D, OPERAND, True)
    own = _own(token, inside)
    if PARTIAL:
        tl.store(cosines_ptr + (token * K + slot)[:, None] * K + slot[None, :], products, mask=own)
        tl.store(lengths_ptr + token * K + slot, power, mask=inside)
    else:
        column_inverse = _inverse_root(tl.sum(tl.where(diagonal, products, 0.0), axis=0))
        row_inverse = _inverse_root(tl.sum(tl.where(diagonal, products, 0.0), axis=1))
        upper = own & (slot[:, None] < slot[None, :])
        cosines = tl.where(upper, products * row_inverse[:, None] * column_inverse[None, :], 0.0)
        tl.store(cosines_ptr + _pair_offsets(token, slot, K), cosines, mask=upper)
        tl.store(lengths_ptr + token * K + slot, row_inverse / power, mask=inside)
        tl.store(squares_ptr + tl.program_id(0), 2.0 * tl.sum(tl.sum(cosines * cosines, axis=1), axis=0))


@triton.jit
def _inverse_root(squares):
    is_zero = squares == 0.0
    return tl.where(is_zero, 0.0, 1.0 / tl.sqrt_rn(tl.where(is_zero, 1.0, squares)))


@triton.jit
def _mixing(mixing_ptr, token, slot, inside, inverse, K: tl.constexpr, OF_SQUARES: tl.constexpr):
    """[TILE, TILE] mixing matrices on the diagonal, 0 beside them, times the inverse length of what they mix."""
    own = _own(token, inside)
    if OF_SQUARES:
        # d/dx of the sum of squared cosines over ordered pairs: 4 (cosines, and -(the sum of their squares) itself)
        different = slot[:, None] != slot[None, :]
        cosines = tl.load(mixing_ptr + _pair_offsets(token, slot, K), mask=own & different, other=0.0)
        mixing = tl.where(different, cosines, -tl.sum(cosines * cosines, axis=1)[:, None]) * 4.0
    else:
        mixing = tl.load(mixing_ptr + (token * K + slot)[:, None] * K + slot[None, :], mask=own, other=0.0)
    return tl.where(own, mixing * inverse[None, :], 0.0)


@triton.jit
def _in_parts(mixing, OPERAND: tl.constexpr):
    """High and low part of a fp32 matrix, for ``_mix`` of 16-bit x: together about as exact as two of its elements."""
    if OPERAND == tl.bfloat16:
        high = mixing.to(tl.bfloat16)
        low = (mixing - high.to(tl.float32)).to(tl.bfloat16)
    else:
        # fp16 has not the range of inverse lengths, but tf32 has, and 11 significant bits as fp16.
        high = (mixing.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        low = mixing - high
    return high, low


@triton.jit
def _mix(high, low, x, OPERAND: tl.constexpr):
    """fp32 product of a matrix in two parts with x of dtype OPERAND."""
    if OPERAND == tl.bfloat16:
        result = tl.dot(low, x, tl.dot(high, x))
    elif OPERAND == tl.float16:
        x = x.to(tl.float32)
        result = tl.dot(low, x, tl.dot(high, x, input_precision="tf32"), input_precision="tf32")
    else:
        result = tl.dot(high + low, x, input_precision="ieee")
    return result


@triton.jit
def _any_not_finite(active, inverse):
    """Whether a row of the tile may be infinite or NaN: these have an inverse length of 0 or NaN, as zero rows have."""
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
    """Writes incoming + scale * (high + low) x; infinite and NaN elements of x count as 0 unless all are FINITE."""
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
        result = _mix(high, low, x, OPERAND) * scale
        if incoming_ptr is not None:
            result += incoming.to(tl.float32)
        tl.store(out_rows + column[None, :], result, mask=mask)


@triton.jit
def _passing_rows(used_ptr, first, num_rows, TILE: tl.constexpr):
    """Row numbers, and which of them are of no token: of padding, of dropped tokens, of tokens that are left out."""
    row = first.to(tl.int64) * TILE + tl.arange(0, TILE)
    used = tl.load(used_ptr + row, mask=row < num_rows, other=1)
    return row, (row < num_rows) & (used == 0)


# Counts differ from step to step: compiled once for all of them.
@triton.jit(do_not_specialize=["factor", "num_tiles", "num_tokens", "num_rows"])
def _mixing_kernel(
    x_ptr,  # bf16 | fp16 | fp32 [P, D]
    rows_ptr,  # int32 [T, K]
    used_ptr,  # bool [P]
    mixing_ptr,  # fp32 [T, K, K]; cosines [T, N] where OF_SQUARES
    lengths_ptr,  # fp32 [T, K] inverse lengths
    weight_ptr,  # fp32 [1]; None: one
    incoming_ptr,  # dtype of x [P, D]; None: zeros
    out_ptr,  # dtype of x [P, D], out: incoming + gradient
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
        token, slot, row, inside, active = _tile_rows(rows_ptr, num_tokens, K, SLOTS, TILE)
        inverse = tl.load(lengths_ptr + token * K + slot, mask=inside, other=0.0)
        mixing = _mixing(mixing_ptr, token, slot, inside, inverse, K, OF_SQUARES)
        high, low = _in_parts(mixing, OPERAND)
        scale = factor * inverse
        if weight_ptr is not None:
            scale *= tl.load(weight_ptr)
        scale, mask = scale[:, None], active[:, None]
        x_rows, incoming_offsets = x_ptr + (row * x_stride)[:, None], (row * incoming_stride)[:, None]
        out_rows = out_ptr + (row * D)[:, None]
        # The mixing of a token with an infinite or NaN row is NaN; other tokens of the tile stay clear of it.
        if _any_not_finite(active, inverse):
            _add_mix(
                x_rows, incoming_ptr, incoming_offsets, out_rows, mask, high, low, scale, D, BLOCK_D, OPERAND, False
            )
        else:
            _add_mix(
                x_rows, incoming_ptr, incoming_offsets, out_rows, mask, high, low, scale, D, BLOCK_D, OPERAND, True
            )
    else:
        row, passing = _passing_rows(used_ptr, tl.program_id(0) - num_tiles, num_rows, TILE)
        if tl.sum(passing.to(tl.int32), axis=0) > 0:
            for start in range(0, D, BLOCK_D):
                column = start + tl.arange(0, BLOCK_D)
                mask = passing[:, None] & (column < D)[None, :]
                result = tl.zeros([TILE, BLOCK_D], tl.float32)
                if incoming_ptr is not None:
                    incoming_ptrs = incoming_ptr + (row * incoming_stride)[:, None] + column[None, :]
                    result = tl.load(incoming_ptrs, mask=mask, other=0.0).to(tl.float32)
                tl.store(out_ptr + (row * D)[:, None] + column[None, :], result, mask=mask)


def row_cosines(x_PD: Tensor, rows_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines between the rows of each token, by one read of these rows.

    Args:
        x_PD: [P, D] bf16, fp16 or fp32; rows may be apart (any row stride), their elements not.
        rows_TK: int32, the number of each token's rows in x; -1 where there is none. A row belongs to at most one
            token.

    Returns:
        Cosines [T, N], 0 where there is no row; inverse lengths [T, K], 0 for zero rows and where there is none; the
        sum of the squared cosines over ordered pairs, in parts, which are to be summed. All fp32.

    Raises:
        ValueError: a shape, dtype or layout does not fit; the message names the argument.
    """
    num_tokens, k = checked(x_PD, rows_TK)
    cosines_TN = torch.empty(num_tokens, k * (k - 1) // 2, dtype=torch.float32, device=x_PD.device)
    squares = torch.empty(tiling(num_tokens, k)[2], dtype=torch.float32, device=x_PD.device)
    return cosines_TN, _compare(x_PD, rows_TK, cosines_TN, squares), squares


def row_products(x_PD: Tensor, rows_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Dot products between the rows of each token, for rows whose columns are divided over ranks.

    Args:
        As of ``row_cosines``, for this rank's columns.

    Returns:
        Products [T, K, K] and units [T, K], fp32: rows i and j have the dot product products_ij * units_i * units_j. A
        unit is a power of two that keeps the squares of tiny and huge rows in range. To go on: take the largest units
        of all ranks, bring each rank's products to them by ``in_units``, sum, and call ``cosines_from_products``.
    """
    num_tokens, k = checked(x_PD, rows_TK)
    products_TKK = torch.empty(num_tokens, k, k, dtype=torch.float32, device=x_PD.device)
    return products_TKK, _compare(x_PD, rows_TK, products_TKK, None)


def in_units(products_TKK: Tensor, units_TK: Tensor, new_units_TK: Tensor) -> Tensor:
    """Products of ``row_products`` in units that are no smaller, rounded nowhere: units are powers of two."""
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
    mixing_TKK: Tensor,
    inverse_lengths_TK: Tensor,
    weight: Union[Tensor, float],
    incoming_PD: Optional[Tensor] = None,
    factor: float = 1.0,
) -> Tensor:
    """incoming + factor * weight * (each row's mix of its token's directions, over the row's length), rounded once.

    Of the mixing matrices that ``losses.vectors.mixing_of`` makes, this is the gradient with respect to x.

    One read of the tokens' rows of x, one read of the incoming gradient, one write. Rows of no token keep their
    incoming gradient. The incoming tensor is left as it is, since autograd may have given it to others too.

    Args:
        x_PD, rows_TK: as given to ``row_cosines``.
        used_P: bool, which rows of x ``rows_TK`` names.
        mixing_TKK: [T, K, K] fp32.
        inverse_lengths_TK: from ``row_cosines``.
        weight: a number, or a fp32 tensor of one element, which is not read on the host.
        incoming_PD: [P, D] in the dtype of x; None: zeros.

    Returns:
        [P, D] in the dtype of x, contiguous.

    Raises:
        ValueError: a shape, dtype or layout does not fit; the message names the argument.
    """
    num_tokens, k = checked(x_PD, rows_TK)
    check_like("mixing_TKK", mixing_TKK, (num_tokens, k, k), torch.float32)
    return _add(x_PD, rows_TK, used_P, mixing_TKK, inverse_lengths_TK, weight, incoming_PD, factor, False)


def add_squares_gradient(
    x_PD: Tensor,
    rows_TK: Tensor,
    used_P: Tensor,
    cosines_TN: Tensor,
    inverse_lengths_TK: Tensor,
    weight: Union[Tensor, float],
    incoming_PD: Optional[Tensor] = None,
    factor: float = 1.0,
) -> Tensor:
    """incoming + factor * weight * gradient with respect to x of the sum of the squared cosines over ordered pairs.

    ``add_mixed`` with mixing matrices that are made on the way, 4 (cosines, and -(the sum of their squares) on the
    diagonal).

    Args:
        cosines_TN: from ``row_cosines``.
        The others: as of ``add_mixed``, and so is what is returned and raised.
    """
    num_tokens, k = checked(x_PD, rows_TK)
    check_like("cosines_TN", cosines_TN, (num_tokens, k * (k - 1) // 2), torch.float32)
    return _add(x_PD, rows_TK, used_P, cosines_TN, inverse_lengths_TK, weight, incoming_PD, factor, True)


def _compare(x_PD: Tensor, rows_TK: Tensor, out: Tensor, squares: Optional[Tensor]) -> Tensor:
    """Fills cosines and squares, or products where squares is None; returns inverse lengths, or units."""
    x_PD = with_dense_rows(x_PD)
    num_tokens, k = rows_TK.shape
    slots, tile, num_tiles = tiling(num_tokens, k)
    lengths_TK = torch.empty(num_tokens, k, dtype=torch.float32, device=x_PD.device)
    if num_tiles:
        _cosines_kernel[(num_tiles,)](
            x_PD,
            rows_TK.contiguous(),
            out,
            lengths_TK,
            squares,
            num_tokens,
            x_PD.shape[1],
            x_PD.stride(0),
            K=k,
            SLOTS=slots,
            TILE=tile,
            OPERAND=operand(x_PD.dtype),
            WIDE_RANGE=x_PD.dtype != torch.float16,
            PARTIAL=squares is None,
            **FORWARD[x_PD.element_size()],
        )
    return lengths_TK


def _add(x_PD, rows_TK, used_P, mixing, inverse_lengths_TK, weight, incoming_PD, factor, of_squares) -> Tensor:
    num_rows, D = x_PD.shape
    num_tokens, k = rows_TK.shape
    check_like("used_P", used_P, (num_rows,), torch.bool)
    check_like("inverse_lengths_TK", inverse_lengths_TK, (num_tokens, k), torch.float32)
    weight, factor = weight_and_factor(weight, factor, x_PD.device)
    if incoming_PD is not None:
        check_like("incoming_PD", incoming_PD, x_PD.shape, x_PD.dtype)
        incoming_PD = with_dense_rows(incoming_PD)
    x_PD = with_dense_rows(x_PD)
    out_PD = torch.empty(x_PD.shape, dtype=computed_dtype(x_PD.dtype), device=x_PD.device)
    if out_PD.numel():
        slots, tile, num_tiles = tiling(num_tokens, k)
        _mixing_kernel[(num_tiles + triton.cdiv(num_rows, tile),)](
            x_PD,
            rows_TK.contiguous(),
            used_P.contiguous(),
            mixing.contiguous(),
            inverse_lengths_TK.contiguous(),
            weight,
            incoming_PD,
            out_PD,
            factor,
            num_tiles,
            num_tokens,
            num_rows,
            D,
            x_PD.stride(0),
            incoming_PD.stride(0) if incoming_PD is not None else 0,
            K=k,
            SLOTS=slots,
            TILE=tile,
            OPERAND=operand(x_PD.dtype),
            OF_SQUARES=of_squares,
            **BACKWARD[x_PD.element_size()],
        )
    return out_PD.to(x_PD.dtype)


_OPERANDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def operand(dtype: torch.dtype) -> tl.dtype:
    """The dtype in which tensor cores take elements of ``dtype``."""
    return _OPERANDS[computed_dtype(dtype)]


def with_dense_rows(x_PD: Tensor) -> Tensor:
    return x_PD if x_PD.stride(1) == 1 else x_PD.contiguous()


def check_like(name: str, x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    if x.shape != tuple(shape) or x.dtype != dtype:
        raise ValueError(f"{name} must be {dtype} {list(shape)}; got {x.dtype} {list(x.shape)}")


def tiling(num_tokens: int, k: int) -> tuple[int, int, int]:
    """Slots per token, (token, slot) pairs per tile, number of tiles."""
    slots = triton.next_power_of_2(k)
    tile = max(_MIN_TILE, slots)
    return slots, tile, triton.cdiv(num_tokens, tile // slots)


def checked(x_PD: Tensor, rows_TK: Tensor, name: str = "x_PD") -> torch.Size:
    """The shape of ``rows_TK``; x goes by ``name``."""
    if x_PD.dim() != 2 or x_PD.dtype not in _OPERANDS:
        raise ValueError(f"{name} must be bf16, fp16 or fp32 [rows, size]; got {x_PD.dtype} {list(x_PD.shape)}")
    if rows_TK.dim() != 2 or rows_TK.dtype != torch.int32:
        raise ValueError(f"rows_TK must be int32 [T, K]; got {rows_TK.dtype} {list(rows_TK.shape)}")
    return rows_TK.shape
