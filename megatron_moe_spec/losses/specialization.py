"""Intra-layer specialization loss (arXiv 2602.14159, Eq. 5): experts that share a token should differ on it."""

from typing import Callable, Optional

import torch
from torch import Tensor

from megatron_moe_spec.losses.scores import accumulation_dtype


def specialization_loss(z: Tensor, valid: Optional[Tensor] = None) -> Tensor:
    """Mean squared cosine similarity between the experts that process the same token.

        L = 2 / (T k (k-1)) * sum_t sum_{e<v} cos(z_e(t), z_v(t))^2        in [0, 1]

    A zero vector has cosine 0 with everything; a token with fewer than two valid experts adds 0 and counts in T.

    Args:
        z: [T, k, F] gated activation (SwiGLU output, before the down projection) of each of a token's k experts.
            A positive factor per vector, such as the router's probability, changes nothing.
        valid: [T, k] bool, False where the token has fewer than k experts. Default: all True.

    Returns:
        Scalar in fp32 (fp64 for fp64 input).

    Raises:
        ValueError: a shape or dtype does not fit, or k < 2.
    """
    num_tokens, k, _ = checked_vectors("z", z, valid)
    return squared_cosine_sum(pair_cosines(unit_vectors(z, valid)[0])) / (max(num_tokens, 1) * k * (k - 1))


def checked_vectors(name: str, x: Tensor, valid: Optional[Tensor]) -> torch.Size:
    """The shape [T, k, F] of the vectors of each token's k >= 2 experts; raises ValueError that names the argument."""
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor [T, k, F]; got {x.dtype} {list(x.shape)}")
    if x.shape[1] < 2:
        raise ValueError(f"{name} needs at least two experts per token (k >= 2) to compare them; got k = {x.shape[1]}")
    if valid is not None and (valid.shape != x.shape[:2] or valid.dtype != torch.bool):
        raise ValueError(f"valid must be bool {list(x.shape[:2])}; got {valid.dtype} {list(valid.shape)}")
    return x.shape


def unit_vectors(
    z: Tensor,
    valid: Optional[Tensor] = None,
    maximum: Callable[[Tensor], Tensor] = lambda x: x,
    total: Callable[[Tensor], Tensor] = lambda x: x,
) -> tuple[Tensor, Tensor]:
    """Directions and inverse lengths of z, in the accumulation dtype; 0 for zero and for invalid vectors.

    Dividing by the largest component first keeps the squares of very small and very large vectors in range.

    Args:
        z: [T, k, F].
        valid: [T, k] bool or None.
        maximum, total: where the F components are divided over ranks, reductions over these.

    Returns:
        Unit vectors [T, k, F] and 1 / |z| [T, k].
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
    """[T, k, k] cosines between the k unit vectors [T, k, F] of each token, 0 on the diagonal."""
    off_diagonal = 1.0 - torch.eye(units.shape[1], dtype=units.dtype, device=units.device)
    return units @ units.transpose(1, 2) * off_diagonal


def squared_cosine_sum(cosines: Tensor) -> Tensor:
    """Sum over tokens and ordered pairs (each pair twice) of cos^2; divided by T k (k-1) it is the loss."""
    return cosines.square().sum()


def squared_cosine_gradient(units: Tensor, inverse_lengths: Tensor, cosines: Tensor) -> Tensor:
    """Gradient of ``squared_cosine_sum`` with respect to z, in closed form.

    d/dz_e = 4 / |z_e| * sum_v cos_ev (u_v - cos_ev u_e), orthogonal to z_e.

    Args:
        units: [T, k, F] and inverse_lengths: [T, k], from ``unit_vectors``.
        cosines: [T, k, k] from ``pair_cosines``.

    Returns:
        [T, k, F].
    """
    mixing = cosines - torch.diag_embed(cosines.square().sum(dim=-1))
    return 4.0 * inverse_lengths.unsqueeze(-1) * (mixing @ units)
