"""Orthogonality loss of expert outputs (arXiv 2505.22323, L_o): what one expert says, no other should repeat."""

from typing import Optional

import torch
from torch import Tensor

from megatron_moe_spec.losses.scores import accumulation_dtype
from megatron_moe_spec.losses.specialization import checked_vectors, unit_vectors


def orthogonality_loss(x: Tensor, valid: Optional[Tensor] = None) -> Tensor:
    """Mean squared length of the projection of an expert's output on that of another expert of the same token.

        L = 1 / (T k (k-1)) * sum_t sum_{j != v} || <x_j, x_v> / <x_v, x_v> x_v ||^2        >= 0

    A zero x_v adds 0; a token with fewer than two valid experts adds 0 and counts in T. Unlike the specialization
    loss it grows with the outputs' lengths: x must be free of the router's probability.

    Args:
        x: [T, k, H] output (after the down projection) of each of a token's k experts.
        valid: [T, k] bool, False where the token has fewer than k experts. Default: all True.

    Returns:
        Scalar in fp32 (fp64 for fp64 input).

    Raises:
        ValueError: a shape or dtype does not fit, or k < 2.
    """
    num_tokens, k, _ = checked_vectors("x", x, valid)
    x = x.to(accumulation_dtype(x))
    if valid is not None:
        x = x.masked_fill(~valid.unsqueeze(-1), 0.0)
    units, _ = unit_vectors(x)
    # ||<x_j, u_v> u_v||^2 = <x_j, u_v>^2 for the unit vector u_v.
    off_diagonal = 1.0 - torch.eye(k, dtype=units.dtype, device=units.device)
    return (x @ units.transpose(1, 2) * off_diagonal).square().sum() / (max(num_tokens, 1) * k * (k - 1))


def squared_projection_sum(inverse_lengths: Tensor, cosines: Tensor) -> Tensor:
    """Sum over tokens and ordered pairs of |x_j|^2 cos_jv^2; divided by T k (k-1) it is the loss.

    Args:
        inverse_lengths: [T, k] 1 / |x|, 0 for zero vectors, from ``unit_vectors``.
        cosines: [T, k, k] from ``pair_cosines``.
    """
    return (cosines * _lengths(inverse_lengths).unsqueeze(-1)).square().sum()


def squared_projection_gradient(units: Tensor, inverse_lengths: Tensor, cosines: Tensor) -> Tensor:
    """Gradient of ``squared_projection_sum`` with respect to x, in closed form.

    d/dx_e = 2 sum_v cos_ev ((|x_e| + |x_v|^2 / |x_e|) u_v - |x_v|^2 / |x_e| cos_ev u_e).

    Args:
        units: [T, k, H] directions of x, from ``unit_vectors``.
        inverse_lengths, cosines: as for ``squared_projection_sum``.

    Returns:
        [T, k, H].
    """
    lengths = _lengths(inverse_lengths)
    # [T, e, v]: |x_v| (|x_v| / |x_e|), in this order, because the square of a length may be out of range.
    pull = lengths.unsqueeze(-2) * (lengths.unsqueeze(-2) * inverse_lengths.unsqueeze(-1)) * cosines
    mixing = lengths.unsqueeze(-1) * cosines + pull
    return 2.0 * (mixing - torch.diag_embed((pull * cosines).sum(dim=-1))) @ units


def _lengths(inverse_lengths: Tensor) -> Tensor:
    is_zero = inverse_lengths == 0
    return (1.0 / inverse_lengths.masked_fill(is_zero, 1.0)).masked_fill(is_zero, 0.0)

