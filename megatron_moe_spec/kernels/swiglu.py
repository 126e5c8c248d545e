"""Gradient of the experts' SwiGLU, with that of the squared cosines between its outputs in it.

    z = p z',  z' = silu(gate) * up,  (gate, up) = y

The eager references are ``losses.vectors`` and Megatron's ``weighted_swiglu_back``. The gradient of the SwiGLU reads y,
from which z is computed again, and the gradient of z, to which that of the cosines is added. So reading both once and
writing the gradient of y once is enough: 10 bytes an element of z in bf16. ``swiglu_gradient`` does so where a token's
rows are on one rank. Where they are not, the loss's gradient comes back from the token's rank, and
``swiglu_gradient_of_sum`` adds it as it is read: 12 bytes.

Suffixes: P rows, F size of z, U = 2 F, T tokens, K experts per token, N pairs of these.

Worked example, one token of two rows with p = 1/2, F = 2, gate = 20 where silu(20) = 20 and silu'(20) = 1 but for
4e-8, and up = (0.3, 0.4) in row 1 and (0.4, 0.3) in row 0: z = (3, 4) and (4, 3) as in the example of ``cosines``,
with the gradient (0.172032, -0.129024) for the first. So y's gradient is p * up * that = (0.0258048, -0.0258048) for
gate and p * 20 * that = (1.72032, -1.29024) for up. An incoming gradient of (1, 1) adds (0.15, 0.2) to gate's and
(10, 10) to up's, and makes p's gradient 20 * (0.3 + 0.4) = 14, to which the cosines add nothing.
"""

from typing import Optional, Union

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_moe_spec.kernels.launch import Launch
from megatron_moe_spec.kernels.options import cached, options
from megatron_moe_spec.kernels.tiles import (
    check_like,
    check_rows,
    checked_shape,
    empty_like,
    in_dtype,
    load_mixing,
    multiply_split,
    num_blocks,
    operand,
    tile_rows,
    tiling,
    unused_rows,
    weight_and_factor,
    with_dense_rows,
)


@triton.jit
def _computed_once(x, OPERAND: tl.constexpr):
    """x in OPERAND, which the compiler must not compute again for each layout that it needs."""
    x = x.to(OPERAND)
    if OPERAND != tl.float32:  # which it is in the interpreter, where assembly cannot run
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)
    return x


@triton.jit
def _sigmoid(x, OPERAND: tl.constexpr):
    """Sigmoid of fp32 numbers. Where results are bf16 or fp16, in four instructions: ``tl.sigmoid`` has eleven."""
    if OPERAND == tl.float32:  # also in the interpreter
        x = tl.sigmoid(x)
    else:
        # 1 / (1 + 2^(-log2(e) x)), with the approximations of tl.sigmoid, but 0 instead of subnormal numbers
        x = tl.inline_asm_elementwise(
            """
            mul.f32 $0, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 $0, $0;
            add.f32 $0, $0, 0f3F800000;
            rcp.approx.ftz.f32 $0, $0;
            """,
            "=r,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return x


@triton.jit
def _addresses(y_ptr, probs_ptr, incoming_ptr, dy_ptr, row, active, F, y_stride, incoming_stride):
    """Of rows, [rows, 1] each: addresses in y, the incoming gradient and y's gradient; fp32 probabilities; active."""
    probs = tl.load(probs_ptr + row, mask=active, other=0.0).to(tl.float32)
    y_rows, incoming_rows, dy_rows = y_ptr + row * y_stride, incoming_ptr + row * incoming_stride, dy_ptr + row * 2 * F
    return y_rows[:, None], incoming_rows[:, None], dy_rows[:, None], probs[:, None], active[:, None]


@triton.jit
def _load_columns(rows, column, F, active):
    """Columns of rows; 0 beyond the last."""
    return tl.load(rows + column[None, :], mask=active & (column < F)[None, :], other=0.0)


@triton.jit
def _load_swiglu(y_rows, column, F, active, OPERAND: tl.constexpr):
    """Of columns of rows, in fp32: up, sigmoid of gate, silu of gate, z'."""
    gate = _load_columns(y_rows, column, F, active).to(tl.float32)
    up = _load_columns(y_rows + F, column, F, active).to(tl.float32)
    sigmoid = _sigmoid(gate, OPERAND)
    silu = gate * sigmoid
    return up, sigmoid, silu, silu * up


@triton.jit
def _store_gradient(dy_rows, column, F, active, total, up, sigmoid, silu):
    """Writes the gradient of columns of rows of y, from that of z'."""
    mask = active & (column < F)[None, :]
    tl.store(dy_rows + column[None, :], total * up * (sigmoid + silu * (1.0 - sigmoid)), mask=mask)
    tl.store(dy_rows + F + column[None, :], total * silu, mask=mask)


@triton.jit
def _row_gradients(
    y_ptr,
    probs_ptr,
    incoming_ptr,
    dy_ptr,
    dprobs_ptr,
    row,
    active,
    high,
    low,
    scale,
    F,
    y_stride,
    incoming_stride,
    BLOCK_F: tl.constexpr,
    STAGES: tl.constexpr,
    OPERAND: tl.constexpr,
    LARGEST: tl.constexpr,
    MIXED: tl.constexpr,
):
    """Writes the gradients of rows of y, and of the probabilities of these rows.

    Where MIXED, scale * (high + low) z is added to the incoming gradient, for the gradient of y. The mixing of a token
    with an infinite or NaN row is NaN; elements beyond LARGEST count as 0, so that it does not reach other tokens.
    """
    TILE: tl.constexpr = row.shape[0]
    y_rows, incoming_rows, dy_rows, probs, mask = _addresses(
        y_ptr, probs_ptr, incoming_ptr, dy_ptr, row, active, F, y_stride, incoming_stride
    )
    coming = _load_columns(incoming_rows, tl.arange(0, BLOCK_F), F, mask)
    products = tl.zeros([TILE, BLOCK_F], tl.float32)
    for start in tl.range(0, F, BLOCK_F, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_F)
        total = coming.to(tl.float32)
        up, sigmoid, silu, z = _load_swiglu(y_rows, column, F, mask, OPERAND)
        products += total * z
        if MIXED:
            z *= probs
            z = _computed_once(tl.where(tl.abs(z) <= LARGEST, z, 0.0), OPERAND)
            mixed = multiply_split(high, low, z, OPERAND)
            # The layout of a matrix product spreads to all that is computed with it: twenty barriers a block or, in
            # Triton 3.6, a second sigmoid. Through another shape, with a load below, that of the loads spreads instead.
            mixed = tl.reshape(mixed, [TILE, BLOCK_F // 2, 2]) * scale[:, None, None]
            total += tl.reshape(mixed, [TILE, BLOCK_F])
        coming = _load_columns(incoming_rows, column + BLOCK_F, F, mask)
        _store_gradient(dy_rows, column, F, mask, total * probs, up, sigmoid, silu)
    tl.store(dprobs_ptr + row, tl.sum(products, axis=1), mask=active)


@triton.jit
def _pair_gradients(
    y_ptr,
    probs_ptr,
    rows_ptr,
    cosines_ptr,
    lengths_ptr,
    weight_ptr,
    incoming_ptr,
    dy_ptr,
    dprobs_ptr,
    factor,
    num_tokens,
    F,
    y_stride,
    incoming_stride,
    TOKENS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    STAGES: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """What ``_row_gradients`` writes, MIXED, for tokens of two rows: each thread has both rows of its columns."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = token < num_tokens
    row_0 = tl.load(rows_ptr + token * 2, mask=inside, other=-1).to(tl.int64)
    row_1 = tl.load(rows_ptr + token * 2 + 1, mask=inside, other=-1).to(tl.int64)
    y_0, incoming_0, dy_0, probs_0, mask_0 = _addresses(
        y_ptr, probs_ptr, incoming_ptr, dy_ptr, row_0, row_0 >= 0, F, y_stride, incoming_stride
    )
    y_1, incoming_1, dy_1, probs_1, mask_1 = _addresses(
        y_ptr, probs_ptr, incoming_ptr, dy_ptr, row_1, row_1 >= 0, F, y_stride, incoming_stride
    )
    # As in ``load_mixing``. Products of two inverse lengths would overflow.
    cosine = tl.load(cosines_ptr + token, mask=inside, other=0.0)[:, None]
    inverse_0 = tl.load(lengths_ptr + token * 2, mask=inside, other=0.0)[:, None]
    inverse_1 = tl.load(lengths_ptr + token * 2 + 1, mask=inside, other=0.0)[:, None]
    if weight_ptr is not None:
        factor *= tl.load(weight_ptr)
    scale_0, scale_1 = factor * inverse_0, factor * inverse_1
    other_0, other_1 = 4.0 * cosine * inverse_0, 4.0 * cosine * inverse_1
    products_0 = tl.zeros([TOKENS, BLOCK_F], tl.float32)
    products_1 = tl.zeros([TOKENS, BLOCK_F], tl.float32)
    for start in tl.range(0, F, BLOCK_F, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_F)
        total_0 = _load_columns(incoming_0, column, F, mask_0).to(tl.float32)
        total_1 = _load_columns(incoming_1, column, F, mask_1).to(tl.float32)
        up_0, sigmoid_0, silu_0, z_0 = _load_swiglu(y_0, column, F, mask_0, OPERAND)
        up_1, sigmoid_1, silu_1, z_1 = _load_swiglu(y_1, column, F, mask_1, OPERAND)
        products_0 += total_0 * z_0
        products_1 += total_1 * z_1
        z_0 = other_0 * (z_0 * probs_0).to(OPERAND).to(tl.float32)
        z_1 = other_1 * (z_1 * probs_1).to(OPERAND).to(tl.float32)
        total_0 += scale_0 * (z_1 - cosine * z_0)
        total_1 += scale_1 * (z_0 - cosine * z_1)
        _store_gradient(dy_0, column, F, mask_0, total_0 * probs_0, up_0, sigmoid_0, silu_0)
        _store_gradient(dy_1, column, F, mask_1, total_1 * probs_1, up_1, sigmoid_1, silu_1)
    tl.store(dprobs_ptr + row_0, tl.sum(products_0, axis=1), mask=row_0 >= 0)
    tl.store(dprobs_ptr + row_1, tl.sum(products_1, axis=1), mask=row_1 >= 0)


# Counts differ from step to step: compiled once for all of them.
@triton.jit(do_not_specialize=["factor", "num_tiles", "num_tokens", "num_rows"])
def _swiglu_gradient_kernel(
    y_ptr,  # bf16 | fp16 | fp32 [P, U]
    probs_ptr,  # float [P]
    rows_ptr,  # int32 [T, K]
    used_ptr,  # bool [P]
    cosines_ptr,  # fp32 [T, N]
    lengths_ptr,  # fp32 [T, K] inverse lengths
    incoming_ptr,  # dtype of y [P, F]
    dy_ptr,  # dtype of y [P, U], out
    dprobs_ptr,  # dtype of the probabilities [P], out
    weight_ptr,  # fp32 [1]; None: one
    factor,
    num_tiles,
    num_tokens,
    num_rows,
    F,
    y_stride,
    incoming_stride,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_F: tl.constexpr,
    STAGES: tl.constexpr,
    OPERAND: tl.constexpr,
    LARGEST: tl.constexpr,
):
    if tl.program_id(0) >= num_tiles:
        row, unused = unused_rows(used_ptr, tl.program_id(0) - num_tiles, num_rows, TILE)
        if tl.sum(unused.to(tl.int32), axis=0) > 0:
            _row_gradients(
                y_ptr, probs_ptr, incoming_ptr, dy_ptr, dprobs_ptr, row, unused, None, None, None,
                F, y_stride, incoming_stride, BLOCK_F, STAGES, OPERAND, LARGEST, False,
            )  # fmt: skip
    elif K == 2:
        _pair_gradients(
            y_ptr, probs_ptr, rows_ptr, cosines_ptr, lengths_ptr, weight_ptr, incoming_ptr, dy_ptr, dprobs_ptr,
            factor, num_tokens, F, y_stride, incoming_stride, TILE // 2, BLOCK_F, STAGES, OPERAND,
        )  # fmt: skip
    else:
        token, slot, row, inside, active = tile_rows(rows_ptr, num_tokens, K, SLOTS, TILE)
        high, low, _, scale = load_mixing(
            cosines_ptr, lengths_ptr, weight_ptr, factor, token, slot, inside, K, OPERAND, True
        )
        _row_gradients(
            y_ptr, probs_ptr, incoming_ptr, dy_ptr, dprobs_ptr, row, active, high, low, scale,
            F, y_stride, incoming_stride, BLOCK_F, STAGES, OPERAND, LARGEST, True,
        )  # fmt: skip


def swiglu_gradient(
    y_PU: Tensor,
    probs_P: Tensor,
    rows_TK: Tensor,
    used_P: Tensor,
    cosines_TN: Tensor,
    inverse_lengths_TK: Tensor,
    weight: Union[Tensor, float],
    incoming_PF: Tensor,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Gradients of y and of the probabilities, from z's incoming gradient and the squared cosines between rows of z.

    To the incoming gradient of z is added factor * weight * gradient with respect to z of the sum of the squared
    cosines over ordered pairs, only for y: the probabilities scale z, and cosines do not depend on its scale.

    Args:
        y_PU: bf16, fp16 or fp32, gate and up in the halves of each row; strides as of x in ``cosines.row_cosines``.
        probs_P: [P] or [P, 1] of any float dtype.
        rows_TK, used_P: see ``cosines.add_mixed``. Rows that are not used get the gradient of the SwiGLU only.
        cosines_TN, inverse_lengths_TK: of z, from ``cosines.row_cosines``.
        weight: a number, or an fp32 tensor of one element, which is not read on the host.
        incoming_PF: [P, F] in the dtype of y; not overwritten.

    Returns:
        [P, U] in the dtype of y, contiguous; the probabilities' in their dtype and shape, summed in fp32.
    """
    (num_tokens, k), (num_rows, U) = checked_shape(y_PU, rows_TK, "y_PU"), _checked_inputs(y_PU, probs_P)
    check_like("used_P", used_P, (num_rows,), torch.bool)
    check_like("cosines_TN", cosines_TN, (num_tokens, k * (k - 1) // 2), torch.float32)
    check_like("inverse_lengths_TK", inverse_lengths_TK, (num_tokens, k), torch.float32)
    check_like("incoming_PF", incoming_PF, (num_rows, U // 2), y_PU.dtype)
    weight, factor = weight_and_factor(weight, factor, y_PU.device)
    y_PU, incoming_PF = with_dense_rows(y_PU), with_dense_rows(incoming_PF)
    dy_PU, dprobs_P = empty_like(y_PU), empty_like(probs_P)
    if num_rows:
        tile, tokens, _ = tiling(k, y_PU.dtype)
        num_tiles = num_blocks(num_tokens, tokens)
        kept = probs_P.contiguous(), rows_TK.contiguous(), used_P.contiguous(), cosines_TN.contiguous()
        tensors = y_PU, *kept, inverse_lengths_TK.contiguous(), incoming_PF, dy_PU, dprobs_P
        numbers, sizes = (factor, num_tiles, num_tokens, num_rows), (U // 2, y_PU.stride()[0], incoming_PF.stride()[0])
        _launch(k, y_PU.dtype)(num_tiles + num_blocks(num_rows, tile), tensors, numbers, sizes, (weight,))
    return in_dtype(dy_PU, y_PU.dtype), in_dtype(dprobs_P, probs_P.dtype)


@cached
def _launch(k: int, dtype: torch.dtype) -> Launch:
    constants = dict(LARGEST=torch.finfo(dtype).max, **options("swiglu_gradient", dtype.itemsize))
    return Launch(_swiglu_gradient_kernel, **tiling(k, dtype)[2], **constants)


@triton.jit(do_not_specialize=["num_rows"])
def _swiglu_gradient_of_sum_kernel(
    y_ptr,  # bf16 | fp16 | fp32 [P, U]
    probs_ptr,  # float [P]
    incoming_ptr,  # dtype of y [P, F]
    added_ptr,  # dtype of y [R, F]
    dy_ptr,  # dtype of y [P, U], out
    dprobs_ptr,  # dtype of the probabilities [P], out
    places_ptr,  # int32 [P]; None: P = R, and the rows lie alike
    num_rows,
    F,
    y_stride,
    incoming_stride,
    added_stride,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    STAGES: tl.constexpr,
    OPERAND: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    active = row < num_rows
    y_rows, incoming_rows, dy_rows, probs, mask = _addresses(
        y_ptr, probs_ptr, incoming_ptr, dy_ptr, row, active, F, y_stride, incoming_stride
    )
    place = row
    if places_ptr is not None:
        place = tl.load(places_ptr + row, mask=active, other=0).to(tl.int64)
    added_rows = (added_ptr + place * added_stride)[:, None]
    products = tl.zeros([ROWS, BLOCK_F], tl.float32)
    for start in tl.range(0, F, BLOCK_F, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_F)
        total = _load_columns(incoming_rows, column, F, mask).to(tl.float32)
        added = _load_columns(added_rows, column, F, mask).to(tl.float32)
        up, sigmoid, silu, z = _load_swiglu(y_rows, column, F, mask, OPERAND)
        products += total * z
        _store_gradient(dy_rows, column, F, mask, (total + added) * probs, up, sigmoid, silu)
    tl.store(dprobs_ptr + row, tl.sum(products, axis=1), mask=active)


def swiglu_gradient_of_sum(
    y_PU: Tensor, probs_P: Tensor, incoming_PF: Tensor, added_RF: Tensor, places_P: Optional[Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradients of y and of the probabilities, from z's incoming gradient and one that is added to it, only for y.

    Args:
        y_PU, probs_P, incoming_PF: see ``swiglu_gradient``.
        added_RF: in the dtype of y.
        places_P: int32, which row is added to each of the incoming gradient; None: as many, in the same order.

    Returns:
        As ``swiglu_gradient``.
    """
    check_rows("y_PU", y_PU)
    num_rows, U = _checked_inputs(y_PU, probs_P)
    check_like("incoming_PF", incoming_PF, (num_rows, U // 2), y_PU.dtype)
    check_like("added_RF", added_RF, (num_rows if places_P is None else len(added_RF), U // 2), y_PU.dtype)
    if places_P is not None:
        check_like("places_P", places_P, (num_rows,), torch.int32)
        places_P = places_P.contiguous()
    y_PU, incoming_PF, added_RF = with_dense_rows(y_PU), with_dense_rows(incoming_PF), with_dense_rows(added_RF)
    dy_PU, dprobs_P = empty_like(y_PU), empty_like(probs_P)
    if num_rows:
        rows, launch = _launch_of_sum(y_PU.dtype)
        tensors = y_PU, probs_P.contiguous(), incoming_PF, added_RF, dy_PU, dprobs_P
        sizes = U // 2, y_PU.stride()[0], incoming_PF.stride()[0], added_RF.stride()[0]
        launch(num_blocks(num_rows, rows), tensors, (num_rows,), sizes, (places_P,))
    return in_dtype(dy_PU, y_PU.dtype), in_dtype(dprobs_P, probs_P.dtype)


@cached
def _launch_of_sum(dtype: torch.dtype) -> tuple[int, Launch]:
    """Rows of a program, and the launch."""
    chosen = options("swiglu_gradient_of_sum", dtype.itemsize)
    return chosen["ROWS"], Launch(_swiglu_gradient_of_sum_kernel, OPERAND=operand(dtype), **chosen)


def _checked_inputs(y_PU: Tensor, probs_P: Tensor) -> torch.Size:
    """The shape of y. Raises ValueError if the inputs of the SwiGLU do not fit each other."""
    num_rows, U = y_PU.shape
    if U % 2 or probs_P.shape not in ((num_rows,), (num_rows, 1)) or not probs_P.is_floating_point():
        raise ValueError(
            f"y_PU must be [P, 2 F] and probs_P floating-point [P] or [P, 1]; got {list(y_PU.shape)}, "
            f"{probs_P.dtype} {list(probs_P.shape)}"
        )
    return y_PU.shape
