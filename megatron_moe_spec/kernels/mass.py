"""Routed mass of each token, from router logits, and its gradient.

    m(t) = sum over the token's dispatched experts of s(t, e),  s the score normalised over all experts

The eager references are ``losses.coupling`` (mass) and ``losses.scores``. Forward and backward each read the logits
once and do not write the scores. There is no kernel for ``pathway``: its E x E joint matrix is a matrix product of
[E, T] and [T, E], which needs the scores in memory and which cuBLAS computes at the speed of the hardware.

Suffixes: T tokens, E experts.

Worked example, softmax of logits (log 1, log 2, log 5), experts 0 and 2 dispatched: scores (1/8, 2/8, 5/8), m = 3/4.
dm / dlogits = s * (active - m) = (1/8 * 1/4, 1/4 * -3/4, 5/8 * 1/4) = (0.03125, -0.1875, 0.15625).
"""

from collections.abc import Sequence
from typing import Any, Optional, Union

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_moe_spec.kernels.launch import Launch
from megatron_moe_spec.kernels.options import cached, options
from megatron_moe_spec.kernels.tiles import (
    check_like,
    empty_like,
    in_dtype,
    num_blocks,
    power_of_2,
    weight_and_factor,
)
from megatron_moe_spec.losses.scores import SCORE_FUNCTIONS

_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _load(logits_ptr, active_ptr, num_tokens, E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    """Token indices [BLOCK_T]; offsets, mask, logits (0 beyond the last token), and the experts dispatched to."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)
    offsets = token[:, None] * E + expert[None, :]
    mask = (token < num_tokens)[:, None] & (expert < E)[None, :]
    x = tl.load(logits_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    active = tl.load(active_ptr + offsets, mask=mask, other=0) != 0
    return token, offsets, mask, x, active


@triton.jit
def _scores(x, E: tl.constexpr, SCORE_FUNCTION: tl.constexpr):
    """Scores before normalization, their derivatives, and the totals [BLOCK_T] to divide by."""
    is_expert = (tl.arange(0, x.shape[1]) < E)[None, :]
    if SCORE_FUNCTION == "softmax":
        x = tl.where(is_expert, x, float("-inf"))
        scores = tl.exp(x - tl.max(x, axis=1)[:, None])
        slope = scores
        total = tl.sum(scores, axis=1)
    else:
        small = tl.exp(-tl.abs(x))
        sigmoid = tl.where(x >= 0, 1.0, small) / (1.0 + small)
        if SCORE_FUNCTION == "sigmoid":
            scores = sigmoid
            slope = sigmoid * (1.0 - sigmoid)
        else:
            # softplus(x) = max(x, 0) + log(1 + small), with a logarithm that is exact for small arguments too.
            rest = (1.0 + small) - 1.0
            is_small = rest == 0.0
            log_sum = tl.where(is_small, small, tl.log(1.0 + small) * (small / tl.where(is_small, 1.0, rest)))
            scores = tl.sqrt_rn(tl.maximum(tl.maximum(x, 0.0) + log_sum, _TINY))
            slope = sigmoid / (2.0 * scores)
        scores = tl.where(is_expert, scores, 0.0)
        total = tl.sum(scores, axis=1) + 1e-20
    return scores, slope, total


@triton.jit(do_not_specialize=["num_tokens"])
def _mass_kernel(
    logits_ptr,  # fp32 | bf16 | fp16 [T, E]
    active_ptr,  # bool [T, E]
    mass_ptr,  # fp32 [T], out
    previous_ptr,  # fp32 [T], mass of another layer; None
    products_ptr,  # fp32 [programs], out: sums of the products of the two masses; None
    num_tokens,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SCORE_FUNCTION: tl.constexpr,
):
    token, offsets, mask, x, active = _load(logits_ptr, active_ptr, num_tokens, E, BLOCK_T, BLOCK_E)
    scores, slope, total = _scores(x, E, SCORE_FUNCTION)
    mass = tl.sum(tl.where(active, scores, 0.0), axis=1) / total
    tl.store(mass_ptr + token, mass, mask=token < num_tokens)
    if previous_ptr is not None:
        previous = tl.load(previous_ptr + token, mask=token < num_tokens, other=0.0)
        tl.store(products_ptr + tl.program_id(0), tl.sum(mass * previous, axis=0))


@triton.jit(do_not_specialize=["factor", "num_tokens"])
def _mass_gradient_kernel(
    logits_ptr,  # fp32 | bf16 | fp16 [T, E]
    active_ptr,  # bool [T, E]
    neighbor_grad_ptr,  # fp32 [T], gradient of the mass
    incoming_ptr,  # dtype of the logits [T, E]
    out_ptr,  # dtype of the logits [T, E], out: incoming + gradient
    other_neighbor_grad_ptr,  # fp32 [T], to be added to the other; None
    weight_ptr,  # fp32 [1]; None
    factor,
    num_tokens,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SCORE_FUNCTION: tl.constexpr,
):
    token, offsets, mask, x, active = _load(logits_ptr, active_ptr, num_tokens, E, BLOCK_T, BLOCK_E)
    incoming = tl.load(incoming_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    neighbor_grad = tl.load(neighbor_grad_ptr + token, mask=token < num_tokens, other=0.0)
    if other_neighbor_grad_ptr is not None:
        neighbor_grad += tl.load(other_neighbor_grad_ptr + token, mask=token < num_tokens, other=0.0)
    neighbor_grad *= factor
    if weight_ptr is not None:
        neighbor_grad *= tl.load(weight_ptr)
    scores, slope, total = _scores(x, E, SCORE_FUNCTION)
    mass = tl.sum(tl.where(active, scores, 0.0), axis=1) / total
    gradient = slope / total[:, None] * (neighbor_grad[:, None] * (active.to(tl.float32) - mass[:, None]))
    tl.store(out_ptr + offsets, incoming + gradient, mask=mask)


def routed_mass(
    logits_TE: Tensor, active_TE: Tensor, score_function: str, previous_T: Optional[Tensor] = None
) -> tuple[Tensor, Optional[Tensor]]:
    """m(t), and with ``previous_T`` partial sums over tokens of its product with that of another layer.

    Args:
        logits_TE: router logits, fp32, bf16 or fp16.
        active_TE: bool, the experts each token was dispatched to.
        score_function: softmax, sigmoid or sqrtsoftplus.
        previous_T: fp32, m of another layer for the same tokens.

    Returns:
        [T] fp32; fp32 [number of programs], or None.
    """
    num_tokens, grid = _checked(logits_TE, active_TE, score_function)
    products, device = None, logits_TE.device
    mass_T = torch.empty(num_tokens, dtype=torch.float32, device=device)
    if previous_T is not None:
        check_like("previous_T", previous_T, (num_tokens,), torch.float32)
        previous_T = previous_T.contiguous()
        products = torch.empty(grid, dtype=torch.float32, device=device)
    if num_tokens:
        tensors = logits_TE.contiguous(), active_TE.contiguous(), mass_T
        launch = _mass_launch(active_TE.shape[1], logits_TE.element_size(), score_function)
        launch(grid, tensors, (num_tokens,), optional=(previous_T, products))
    return mass_T, products


def add_mass_gradient(
    logits_TE: Tensor,
    active_TE: Tensor,
    score_function: str,
    neighbor_grads: Sequence[Tensor],
    weight: Union[Tensor, float],
    incoming_TE: Tensor,
    factor: float = 1.0,
) -> Tensor:
    """incoming + factor * weight * sum_t neighbor_grad(t) dm(t) / dlogits, rounded once: [T, E] as the logits.

    Args:
        logits_TE, active_TE, score_function: as given to ``routed_mass``.
        neighbor_grads: one or two fp32 [T], whose sum is the gradient with respect to m.
        weight: a number, or a tensor of one element, which is not read on the host if it is on the device.
        incoming_TE: gradient of the logits, in their dtype; not overwritten.
        factor: a number.
    """
    num_tokens, grid = _checked(logits_TE, active_TE, score_function)
    check_like("incoming_TE", incoming_TE, logits_TE.shape, logits_TE.dtype)
    for neighbor_grad_T in neighbor_grads:
        check_like("neighbor_grads", neighbor_grad_T, (num_tokens,), torch.float32)
    out_TE = empty_like(logits_TE)
    if num_tokens:
        weight, factor = weight_and_factor(weight, factor, logits_TE.device)
        other_T = neighbor_grads[1].contiguous() if len(neighbor_grads) > 1 else None
        tensors = logits_TE.contiguous(), active_TE.contiguous(), neighbor_grads[0].contiguous()
        launch = _mass_gradient_launch(active_TE.shape[1], logits_TE.element_size(), score_function)
        numbers, optional = (factor, num_tokens), (other_T, weight)
        launch(grid, (*tensors, incoming_TE.contiguous(), out_TE), numbers, optional=optional)
    return in_dtype(out_TE, logits_TE.dtype)


def _checked(logits_TE: Tensor, active_TE: Tensor, score_function: str) -> tuple[int, int]:
    """Number of tokens, and of programs."""
    if logits_TE.dim() != 2 or logits_TE.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"logits_TE must be fp32, bf16 or fp16 [T, E]; got {logits_TE.dtype} {list(logits_TE.shape)}")
    check_like("active_TE", active_TE, logits_TE.shape, torch.bool)
    if score_function not in SCORE_FUNCTIONS:
        raise ValueError(f"score_function must be one of {', '.join(SCORE_FUNCTIONS)}; got {score_function!r}")
    num_tokens, num_experts = logits_TE.shape
    return num_tokens, num_blocks(num_tokens, _block_tokens(num_experts, logits_TE.element_size()))


@cached
def _block_tokens(num_experts: int, element_size: int) -> int:
    return max(options("mass", element_size)["ELEMENTS"] // power_of_2(num_experts), 1)


@cached
def _mass_launch(num_experts: int, element_size: int, score_function: str) -> Launch:
    return Launch(_mass_kernel, **_constants(num_experts, element_size, score_function))


@cached
def _mass_gradient_launch(num_experts: int, element_size: int, score_function: str) -> Launch:
    return Launch(_mass_gradient_kernel, **_constants(num_experts, element_size, score_function))


def _constants(num_experts: int, element_size: int, score_function: str) -> dict[str, Any]:
    blocks = dict(BLOCK_T=_block_tokens(num_experts, element_size), BLOCK_E=power_of_2(num_experts))
    num_warps = options("mass", element_size)["num_warps"]
    return dict(E=num_experts, SCORE_FUNCTION=score_function, num_warps=num_warps, **blocks)
