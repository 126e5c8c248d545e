"""Angles between the vectors of each token, and gradients through them, on permuted rows; twin of ``losses.vectors``.

A program takes a tile of 16 (token, slot) pairs, that is 16 / K tokens with K padded to a power of two. It streams
their rows once, wherever they lie, and forms the tile's 16 x 16 products on tensor cores; the K x K blocks on the
diagonal are the tokens' own. No copy of the gathered rows is made and there are no atomics: runs are bitwise equal.

Suffixes: P rows, D row size, T tokens, K experts per token.

Worked example, one token with x = (3, 4) in row 1 and (4, 3) in row 0: products 24 off the diagonal and 25 on it,
cosine 24 / 25 = 0.96. For the sum of the squared cosines over both ordered pairs, 2 * 0.96^2 = 1.8432, the mixing
matrix is 4 * 0.96 = 3.84 off the diagonal and -4 * 0.96^2 = -3.6864 on it. The gradient for the first vector is
1 / 5 * (3.84 * (0.8, 0.6) - 3.6864 * (0.6, 0.8)) = (0.172032, -0.129024), for the second the same with its components
swapped.
"""

from typing import Optional, Union

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_moe_spec.kernels import computed_dtype

# How the kernels are compiled, by number of bytes of an element of x.
FORWARD = {2: dict(BLOCK_D=128, num_warps=1, num_stages=3), 4: dict(BLOCK_D=32, num_warps=1, num_stages=3)}
BACKWARD = {2: dict(BLOCK_D=128, num_warps=4, num_stages=2), 4: dict(BLOCK_D=64, num_warps=4, num_stages=2)}

_MIN_TILE = 16  # the smallest side of a matrix product on tensor cores
# Squared lengths between these are sums of squares that neither overflowed nor lost anything to underflow.
_SMALLEST, _LARGEST = tl.constexpr(2.0**-60), tl.constexpr(2.0**100)


@triton.jit
def _tile_rows(rows_ptr, valid_ptr, num_tokens, K: tl.constexpr, SLOTS: tl.constexpr, TILE: tl.constexpr):
    """Token, slot, row number, and whether there is such a row, of each of the tile's (token, slot) pairs."""
    pair = tl.arange(0, TILE)
    slot = pair % SLOTS
    token = tl.program_id(0).to(tl.int64) * (TILE // SLOTS) + pair // SLOTS
    inside = (slot < K) & (token < num_tokens)
    row = tl.load(rows_ptr + token * K + slot, mask=inside, other=0)
    valid = tl.load(valid_ptr + token * K + slot, mask=inside, other=0)
    return token, slot, row, inside, inside & (valid != 0)


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
    rows_ptr,  # int64 [T, K]
    valid_ptr,  # bool [T, K]
    products_ptr,  # fp32 [T, K, K], out: cosines; products where PARTIAL
    lengths_ptr,  # fp32 [T, K], out: inverse lengths; the units of the products where PARTIAL
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
    token, slot, row, inside, active = _tile_rows(rows_ptr, valid_ptr, num_tokens, K, SLOTS, TILE)
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
    own = (token[:, None] == token[None, :]) & inside[:, None] & inside[None, :]
    if PARTIAL:
        length_out = power
        product_out = products
    else:
        column_inverse = _inverse_root(tl.sum(tl.where(diagonal, products, 0.0), axis=0))
        row_inverse = _inverse_root(tl.sum(tl.where(diagonal, products, 0.0), axis=1))
        product_out = tl.where(own & (diagonal == 0), products * row_inverse[:, None] * column_inverse[None, :], 0.0)
        length_out = row_inverse / power
    tl.store(products_ptr + (token * K + slot)[:, None] * K + slot[None, :], product_out, mask=own)
    tl.store(lengths_ptr + token * K + slot, length_out, mask=inside)


@triton.jit
def _inverse_root(squares):
    is_zero = squares == 0.0
    return tl.where(is_zero, 0.0, 1.0 / tl.sqrt_rn(tl.where(is_zero, 1.0, squares)))


# Counts differ from step to step: compiled once for all of them.
@triton.jit(do_not_specialize=["num_tiles", "num_tokens", "num_rows"])
def _mixing_kernel(
    x_ptr,  # bf16 | fp16 | fp32 [P, D]
    rows_ptr,  # int64 [T, K]
    valid_ptr,  # bool [T, K]
    mixing_ptr,  # fp32 [T, K, K]
    lengths_ptr,  # fp32 [T, K] inverse lengths
    weight_ptr,  # fp32 [1]
    covered_ptr,  # bool [P + 1], whether a row is some token's
    incoming_ptr,  # dtype of x [P, D]; None: zeros
    out_ptr,  # dtype of x [P, D], out: incoming + gradient
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
    TWO_PARTS: tl.constexpr,
):
    if tl.program_id(0) < num_tiles:
        token, slot, row, inside, active = _tile_rows(rows_ptr, valid_ptr, num_tokens, K, SLOTS, TILE)
        own = (token[:, None] == token[None, :]) & inside[:, None] & inside[None, :]
        mixing = tl.load(mixing_ptr + (token * K + slot)[:, None] * K + slot[None, :], mask=own, other=0.0)
        inverse = tl.load(lengths_ptr + token * K + slot, mask=inside, other=0.0)
        mixing = tl.where(own, mixing * inverse[None, :], 0.0)
        # The tensor cores' tf32 has 11 significant bits: it holds 16-bit x, and mixing in two parts.
        high = (mixing.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        factor = tl.load(weight_ptr) * inverse
        for start in range(0, D, BLOCK_D):
            column = start + tl.arange(0, BLOCK_D)
            mask = active[:, None] & (column < D)[None, :]
            x = tl.load(x_ptr + (row * x_stride)[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
            # The mixing of a token with an infinite or NaN row is NaN; other tokens of the tile stay clear of it.
            x = tl.where(tl.abs(x) < float("inf"), x, 0.0)
            if TWO_PARTS:
                result = tl.dot(mixing - high, x, tl.dot(high, x, input_precision="tf32"), input_precision="tf32")
            else:
                result = tl.dot(mixing, x, input_precision="ieee")
            result *= factor[:, None]
            if incoming_ptr is not None:
                incoming_ptrs = incoming_ptr + (row * incoming_stride)[:, None] + column[None, :]
                result += tl.load(incoming_ptrs, mask=mask, other=0.0).to(tl.float32)
            out_ptrs = out_ptr + (row * D)[:, None] + column[None, :]
            tl.store(out_ptrs, result, mask=mask)
    else:
        # Rows of no token pass through: those of padding, of dropped tokens, and of tokens that are left out.
        row = (tl.program_id(0) - num_tiles).to(tl.int64) * TILE + tl.arange(0, TILE)
        passing = (row < num_rows) & (tl.load(covered_ptr + row, mask=row < num_rows, other=1) == 0)
        if tl.sum(passing.to(tl.int32), axis=0) > 0:
            for start in range(0, D, BLOCK_D):
                column = start + tl.arange(0, BLOCK_D)
                mask = passing[:, None] & (column < D)[None, :]
                result = tl.zeros([TILE, BLOCK_D], tl.float32)
                if incoming_ptr is not None:
                    incoming_ptrs = incoming_ptr + (row * incoming_stride)[:, None] + column[None, :]
                    result = tl.load(incoming_ptrs, mask=mask, other=0.0).to(tl.float32)
                tl.store(out_ptr + (row * D)[:, None] + column[None, :], result, mask=mask)


def row_cosines(x_PD: Tensor, rows_TK: Tensor, valid_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines between the rows of each token, by one read of these rows.

    Args:
        x_PD: [P, D] bf16, fp16 or fp32; rows may be apart (any row stride), their elements not.
        rows_TK: int64, the number of each token's rows in x; anything in range where there is none. A row
            belongs to at most one token.
        valid_TK: bool, which of them are there.

    Returns:
        Cosines [T, K, K], 0 on the diagonal and where there is no row; inverse lengths [T, K], 0 for zero rows. Both
        fp32.

    Raises:
        ValueError: a shape, dtype or layout does not fit; the message names the argument.
    """
    return _launch(x_PD, rows_TK, valid_TK, partial=False)


def row_products(x_PD: Tensor, rows_TK: Tensor, valid_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Dot products between the rows of each token, for rows whose columns are divided over ranks.

    Args:
        As of ``row_cosines``, for this rank's columns.

    Returns:
        Products [T, K, K] and units [T, K], fp32: rows i and j have the dot product products_ij * units_i * units_j. A
        unit is a power of two that keeps the squares of tiny and huge rows in range. To go on: take the largest units
        of all ranks, bring each rank's products to them by ``in_units``, sum, and call ``cosines_from_products``.
    """
    return _launch(x_PD, rows_TK, valid_TK, partial=True)


def in_units(products_TKK: Tensor, units_TK: Tensor, new_units_TK: Tensor) -> Tensor:
    """Products of ``row_products`` in units that are no smaller, rounded nowhere: units are powers of two."""
    factors_TK = units_TK / new_units_TK
    return products_TKK * factors_TK.unsqueeze(2) * factors_TK.unsqueeze(1)


def cosines_from_products(products_TKK: Tensor, units_TK: Tensor) -> tuple[Tensor, Tensor]:
    """The results of ``row_cosines``, from ``row_products``; eager, on small tensors."""
    squares_TK = products_TKK.diagonal(dim1=1, dim2=2)
    inverse_TK = torch.where(squares_TK == 0, 0.0, 1.0 / squares_TK.sqrt())
    off_diagonal = 1.0 - torch.eye(products_TKK.shape[1], device=products_TKK.device)
    cosines_TKK = products_TKK * inverse_TK.unsqueeze(2) * inverse_TK.unsqueeze(1) * off_diagonal
    return cosines_TKK, inverse_TK / units_TK


def add_mixed(
    x_PD: Tensor,
    rows_TK: Tensor,
    valid_TK: Tensor,
    mixing_TKK: Tensor,
    inverse_lengths_TK: Tensor,
    weight: Union[Tensor, float],
    incoming_PD: Optional[Tensor] = None,
) -> Tensor:
    """incoming + weight * (each row's mix of the directions of its token's rows, over its length), rounded once.

    Of the mixing matrices that ``losses.vectors.mixing_of`` makes, this is the gradient with respect to x.

    One read of the tokens' rows of x, one read of the incoming gradient, one write. Rows of no token keep their
    incoming gradient. The incoming tensor is left as it is, since autograd may have given it to others too.

    Args:
        x_PD, rows_TK, valid_TK: as given to ``row_cosines``.
        mixing_TKK: [T, K, K] fp32.
        inverse_lengths_TK: from ``row_cosines``.
        weight: a number, or a tensor of one element, which is not read on the host.
        incoming_PD: [P, D] in the dtype of x; None: zeros.

    Returns:
        [P, D] in the dtype of x, contiguous.

    Raises:
        ValueError: a shape, dtype or layout does not fit; the message names the argument.
    """
    _check(x_PD, rows_TK, valid_TK)
    num_tokens, k = rows_TK.shape
    if mixing_TKK.shape != (num_tokens, k, k) or inverse_lengths_TK.shape != (num_tokens, k):
        raise ValueError(
            f"mixing_TKK and inverse_lengths_TK must be of the tokens in rows_TK {list(rows_TK.shape)}; got "
            f"{list(mixing_TKK.shape)} and {list(inverse_lengths_TK.shape)}"
        )
    if incoming_PD is not None:
        if incoming_PD.shape != x_PD.shape or incoming_PD.dtype != x_PD.dtype:
            raise ValueError(
                f"incoming_PD must be {x_PD.dtype} {list(x_PD.shape)} as x_PD is; got {incoming_PD.dtype} "
                f"{list(incoming_PD.shape)}"
            )
        incoming_PD = _with_dense_rows(incoming_PD)
    x_PD = _with_dense_rows(x_PD)
    out_PD = torch.empty(x_PD.shape, dtype=computed_dtype(x_PD.dtype), device=x_PD.device)
    if out_PD.numel() == 0:
        return out_PD.to(x_PD.dtype)
    if not isinstance(weight, Tensor):
        weight = torch.full((1,), weight, device=x_PD.device)
    num_rows, D = x_PD.shape
    # Row P stands for all rows that are not there.
    covered = torch.zeros(num_rows + 1, dtype=torch.bool, device=x_PD.device)
    covered.index_fill_(0, rows_TK.masked_fill(~valid_TK, num_rows).flatten(), True)
    slots, tile, num_tiles = _tiling(num_tokens, k)
    _mixing_kernel[(num_tiles + triton.cdiv(num_rows, tile),)](
        x_PD,
        rows_TK.contiguous(),
        valid_TK.contiguous(),
        mixing_TKK.contiguous(),
        inverse_lengths_TK.contiguous(),
        weight.to(x_PD.device, torch.float32),
        covered,
        incoming_PD,
        out_PD,
        num_tiles,
        num_tokens,
        num_rows,
        D,
        x_PD.stride(0),
        incoming_PD.stride(0) if incoming_PD is not None else 0,
        K=k,
        SLOTS=slots,
        TILE=tile,
        TWO_PARTS=x_PD.element_size() == 2,
        **BACKWARD[x_PD.element_size()],
    )
    return out_PD.to(x_PD.dtype)


def _launch(x_PD: Tensor, rows_TK: Tensor, valid_TK: Tensor, partial: bool) -> tuple[Tensor, Tensor]:
    _check(x_PD, rows_TK, valid_TK)
    x_PD = _with_dense_rows(x_PD)
    num_tokens, k = rows_TK.shape
    slots, tile, num_tiles = _tiling(num_tokens, k)
    products_TKK = torch.empty(num_tokens, k, k, dtype=torch.float32, device=x_PD.device)
    lengths_TK = torch.empty(num_tokens, k, dtype=torch.float32, device=x_PD.device)
    if num_tiles:
        _cosines_kernel[(num_tiles,)](
            x_PD,
            rows_TK.contiguous(),
            valid_TK.contiguous(),
            products_TKK,
            lengths_TK,
            num_tokens,
            x_PD.shape[1],
            x_PD.stride(0),
            K=k,
            SLOTS=slots,
            TILE=tile,
            OPERAND=_OPERANDS[computed_dtype(x_PD.dtype)],
            WIDE_RANGE=x_PD.dtype != torch.float16,
            PARTIAL=partial,
            **FORWARD[x_PD.element_size()],
        )
    return products_TKK, lengths_TK


_OPERANDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def _tiling(num_tokens: int, k: int) -> tuple[int, int, int]:
    """Slots per token, (token, slot) pairs per tile, number of tiles."""
    slots = triton.next_power_of_2(k)
    tile = max(_MIN_TILE, slots)
    return slots, tile, triton.cdiv(num_tokens, tile // slots)


def _with_dense_rows(x_PD: Tensor) -> Tensor:
    return x_PD if x_PD.stride(1) == 1 else x_PD.contiguous()


def _check(x_PD: Tensor, rows_TK: Tensor, valid_TK: Tensor) -> None:
    if x_PD.dim() != 2 or x_PD.dtype not in _OPERANDS:
        raise ValueError(f"x_PD must be bf16, fp16 or fp32 [P, D]; got {x_PD.dtype} {list(x_PD.shape)}")
    if rows_TK.dim() != 2 or rows_TK.dtype != torch.int64:
        raise ValueError(f"rows_TK must be int64 [T, K]; got {rows_TK.dtype} {list(rows_TK.shape)}")
    if valid_TK.shape != rows_TK.shape or valid_TK.dtype != torch.bool:
        raise ValueError(f"valid_TK must be bool {list(rows_TK.shape)}; got {valid_TK.dtype} {list(valid_TK.shape)}")
