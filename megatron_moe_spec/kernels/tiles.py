"""What the kernels share: tiles of tokens, products with an fp32 matrix, checks of arguments.

A tile is 16 (token, slot) pairs, that is 16 / K tokens with K padded to a power of two; more where K is above 16.

Suffixes: P rows, D row size, T tokens, K experts per token, N = K (K - 1) / 2 pairs of these.
"""

from functools import cache
from typing import Any, Optional, Union

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_moe_spec.kernels import interpreted


@triton.jit
def tile_rows(rows_ptr, num_tokens, K: tl.constexpr, SLOTS: tl.constexpr, TILE: tl.constexpr):
    """Of each (token, slot) pair: token, slot, row index, whether it is inside of rows [T, K], whether it has a row."""
    pair = tl.arange(0, TILE)
    slot = pair % SLOTS
    token = tl.program_id(0).to(tl.int64) * (TILE // SLOTS) + pair // SLOTS
    inside = (slot < K) & (token < num_tokens)
    row = tl.load(rows_ptr + token * K + slot, mask=inside, other=-1).to(tl.int64)
    return token, slot, row, inside, row >= 0


@triton.jit
def same_token(token, inside):
    """[TILE, TILE] whether two (token, slot) pairs are of the same token."""
    return (token[:, None] == token[None, :]) & inside[:, None] & inside[None, :]


@triton.jit
def pair_offsets(token, slot, K: tl.constexpr):
    """[TILE, TILE] offset of the cosine of two slots of a token, in either order, in the packed cosines [T, N]."""
    slot = slot.to(tl.int64)
    first = tl.minimum(slot[:, None], slot[None, :])
    second = tl.maximum(slot[:, None], slot[None, :])
    before = first * (2 * K - 1 - first) // 2  # pairs whose first slot is lower
    return (token * (K * (K - 1) // 2))[:, None] + (before + second - first - 1)


@triton.jit
def load_mixing(
    mixing_ptr,
    lengths_ptr,
    weight_ptr,
    factor,
    token,
    slot,
    inside,
    K: tl.constexpr,
    OPERAND: tl.constexpr,
    OF_SQUARES: tl.constexpr,
):
    """What ``multiply_split`` needs to mix the rows of a tile, and how to scale the result.

    Returns the high and low part [TILE, TILE] of the tokens' mixing matrices on the diagonal, 0 elsewhere, with columns
    times inverse lengths; inverse lengths [TILE]; factor * weight * inverse lengths [TILE].
    """
    inverse = tl.load(lengths_ptr + token * K + slot, mask=inside, other=0.0)
    own = same_token(token, inside)
    if OF_SQUARES:
        # d/dx of the sum of squared cosines over ordered pairs: 4 (cosines, and -(the sum of their squares) itself)
        different = slot[:, None] != slot[None, :]
        cosines = tl.load(mixing_ptr + pair_offsets(token, slot, K), mask=own & different, other=0.0)
        mixing = tl.where(different, cosines, -tl.sum(cosines * cosines, axis=1)[:, None]) * 4.0
    else:
        mixing = tl.load(mixing_ptr + (token * K + slot)[:, None] * K + slot[None, :], mask=own, other=0.0)
    mixing = tl.where(own, mixing * inverse[None, :], 0.0)
    # Two numbers of OPERAND have about twice its significant bits.
    if OPERAND == tl.bfloat16:
        high = mixing.to(tl.bfloat16)
        low = (mixing - high.to(tl.float32)).to(tl.bfloat16)
    else:
        # fp16 lacks the range of inverse lengths. tf32 has it, with the 11 significant bits of fp16.
        high = (mixing.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        low = mixing - high
    scale = factor * inverse
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr)
    return high, low, inverse, scale


@triton.jit
def multiply_split(high, low, x, OPERAND: tl.constexpr):
    """fp32 product of the two parts of a matrix with x of dtype OPERAND."""
    if OPERAND == tl.bfloat16:
        result = tl.dot(low, x, tl.dot(high, x))
    elif OPERAND == tl.float16:
        x = x.to(tl.float32)
        result = tl.dot(low, x, tl.dot(high, x, input_precision="tf32"), input_precision="tf32")
    else:
        result = tl.dot(high + low, x, input_precision="ieee")
    return result


@triton.jit
def unused_rows(used_ptr, first, num_rows, TILE: tl.constexpr):
    """Row indices, and which of them belong to no token: padding, dropped tokens, skipped tokens."""
    row = first.to(tl.int64) * TILE + tl.arange(0, TILE)
    used = tl.load(used_ptr + row, mask=row < num_rows, other=1)
    return row, (row < num_rows) & (used == 0)


INTERPRETED = interpreted()  # triton asks once, too


def empty_like(x: Tensor) -> Tensor:
    """Contiguous memory for what kernels write, of which ``in_dtype`` makes a result."""
    # Of torch's ways to the same, the one that costs the host least.
    if INTERPRETED:
        return torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What kernels have written, in the dtype of their tensors."""
    return x.to(dtype) if INTERPRETED else x


def weight_and_factor(
    weight: Union[Tensor, float], factor: float, device: torch.device
) -> tuple[Optional[Tensor], float]:
    """A weight for a kernel: an fp32 tensor if it is on the device, and the product of the numbers on the host."""
    if isinstance(weight, Tensor):
        if weight.numel() != 1:
            raise ValueError(f"weight must be a number or a tensor of one element; got {list(weight.shape)}")
        if weight.device == device:
            return weight if weight.dtype == torch.float32 else weight.float(), float(factor)
    return None, float(weight) * float(factor)


_OPERANDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def operand(dtype: torch.dtype) -> tl.dtype:
    """The dtype in which kernels multiply and write: that of their tensors, or fp32 in the interpreter."""
    return tl.float32 if INTERPRETED else _OPERANDS[dtype]


def with_dense_rows(x_PD: Tensor) -> Tensor:
    """x, copied if the elements of a row are not adjacent."""
    return x_PD if x_PD.is_contiguous() or x_PD.stride(1) == 1 else x_PD.contiguous()


def check_like(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raises ValueError if x, called ``name``, differs in shape or dtype."""
    if x.shape != shape or x.dtype != dtype:
        raise ValueError(f"{name} must be {dtype} {list(shape)}; got {x.dtype} {list(x.shape)}")


@cache
def tiling(k: int, dtype: torch.dtype) -> tuple[int, int, dict[str, Any]]:
    """(token, slot) pairs of a tile; its tokens; what kernels are compiled for, for K experts and dtype of the rows."""
    slots = power_of_2(k)
    tile = max(16, slots)  # 16: the smallest side of a matrix product on tensor cores
    return tile, tile // slots, dict(K=k, SLOTS=slots, TILE=tile, OPERAND=operand(dtype))


def power_of_2(n: int) -> int:
    """The smallest at or above n."""
    return 1 << (n - 1).bit_length()


def num_blocks(n: int, size: int) -> int:
    """Blocks of some size that hold n."""
    return -(-n // size)


def check_rows(name: str, x_PD: Tensor) -> None:
    """Raises ValueError if x, called ``name``, does not fit the kernels."""
    if x_PD.dim() != 2 or x_PD.dtype not in _OPERANDS:
        raise ValueError(f"{name} must be bf16, fp16 or fp32 [rows, size]; got {x_PD.dtype} {list(x_PD.shape)}")


def checked_shape(x_PD: Tensor, rows_TK: Tensor, name: str = "x_PD") -> torch.Size:
    """The shape of ``rows_TK``. Raises ValueError if it or x, called ``name``, does not fit the kernels."""
    check_rows(name, x_PD)
    if rows_TK.dim() != 2 or rows_TK.dtype != torch.int32:
        raise ValueError(f"rows_TK must be int32 [T, K]; got {rows_TK.dtype} {list(rows_TK.shape)}")
    return rows_TK.shape
