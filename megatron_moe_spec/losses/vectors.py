"""Directions and lengths of the vectors that the experts of a token compute, and gradients through them.

Suffixes: T tokens, K experts of a token, N pairs of these, D components of a vector.
"""

from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor

from megatron_moe_spec.losses.scores import accumulation_dtype


def unit_vectors(
    z: Tensor,
    valid: Optional[Tensor] = None,
    maximum: Callable[[Tensor], Tensor] = lambda x: x,
    total: Callable[[Tensor], Tensor] = lambda x: x,
) -> tuple[Tensor, Tensor]:
    """Directions [T, K, D] and inverse lengths [T, K] of z [T, K, D], in the accumulation dtype.

    0 for zero vectors and where ``valid`` [T, K] is False. Dividing by the largest component first keeps the squares of
    very small and very large vectors in range. ``maximum``, ``total``: reductions over ranks that divide the D
    components.
    """
    z = z.to(accumulation_dtype(z))
    if valid is not None:
        z = z.masked_fill(~valid.unsqueeze(-1), 0.0)
    largest = z.detach().abs().amax(dim=-1, keepdim=True) if z.shape[-1] else z.new_zeros(*z.shape[:-1], 1)
    largest = maximum(largest)
    is_zero = largest == 0
    scaled = z / largest.masked_fill(is_zero, 1.0)
    # A zero vector gets length 1 before the root, whose gradient at 0 is infinite.
    length = total(scaled.square().sum(dim=-1, keepdim=True)).masked_fill(is_zero, 1.0).sqrt()
    inverse_length = (1.0 / length / largest.masked_fill(is_zero, 1.0)).masked_fill(is_zero, 0.0)
    return scaled / length, inverse_length.squeeze(-1)


def pair_cosines(units: Tensor) -> Tensor:
    """[T, K, K] cosines between the k unit vectors [T, K, D] of each token, 0 on the diagonal."""
    off_diagonal = 1.0 - torch.eye(units.shape[1], dtype=units.dtype, device=units.device)
    return units @ units.transpose(1, 2) * off_diagonal


def packed(cosines_TKK: Tensor) -> Tensor:
    """[T, k (k - 1) / 2] one of the cosines of each pair, in the order (0, 1), (0, 2), ..., (1, 2), ..."""
    k = cosines_TKK.shape[1]
    first, second = torch.triu_indices(k, k, 1, device=cosines_TKK.device)
    return cosines_TKK[:, first, second]


def unpacked(cosines_TN: Tensor, k: int) -> Tensor:
    """[T, k, k] symmetric matrices with 0 on the diagonal, of ``packed`` ones."""
    first, second = torch.triu_indices(k, k, 1, device=cosines_TN.device)
    cosines_TKK = cosines_TN.new_zeros(len(cosines_TN), k, k)
    cosines_TKK[:, first, second] = cosines_TN
    cosines_TKK[:, second, first] = cosines_TN
    return cosines_TKK


def inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 for 0: lengths of inverse lengths, and the other way."""
    is_zero = x == 0
    return (1.0 / x.masked_fill(is_zero, 1.0)).masked_fill(is_zero, 0.0)


def mixing_of(cosines_TKK: Tensor, lengths_TK: Tensor, grad_cosines_TKK: Tensor, grad_lengths_TK: Tensor) -> Tensor:
    """Matrices by which the gradient with respect to the vectors mixes their directions; see ``mixed``.

    d/dx_e = 1 / |x_e| * (sum_v (G_ev + G_ve) (u_v - cos_ev u_e)) + g_e u_e, for G and g the gradients with respect to
    cosines (of ``pair_cosines``) and lengths, and u the directions.

    Returns:
        [T, K, K] |x_e| times the weight of u_v in the gradient with respect to x_e.
    """
    off_diagonal = 1.0 - torch.eye(cosines_TKK.shape[1], dtype=cosines_TKK.dtype, device=cosines_TKK.device)
    both = (grad_cosines_TKK + grad_cosines_TKK.transpose(1, 2)) * off_diagonal
    own = grad_lengths_TK * lengths_TK - (both * cosines_TKK).sum(dim=-1)
    return both + torch.diag_embed(own)


def mixing_of_squares(cosines_TKK: Tensor) -> Tensor:
    """``mixing_of`` the sum of the squared cosines of ordered pairs, whose gradient with respect to them is 2 cos."""
    return 4.0 * (cosines_TKK - torch.diag_embed(cosines_TKK.square().sum(dim=-1)))


def mixed(mixing_TKK: Tensor, units_TKD: Tensor, inverse_lengths_TK: Tensor) -> Tensor:
    """[T, K, D] the gradient with respect to the vectors, from ``mixing_of`` and ``unit_vectors``."""
    return inverse_lengths_TK.unsqueeze(-1) * (mixing_TKK @ units_TKD)
