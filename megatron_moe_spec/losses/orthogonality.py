"""Orthogonality loss of expert outputs (arXiv 2505.22323, L_o): what one expert says, no other should repeat."""

from dataclasses import dataclass
from typing import ClassVar, Optional

from torch import Tensor

from megatron_moe_spec.losses.base import OUTPUTS, RowsLoss, option


@dataclass(frozen=True)
class Orthogonality(RowsLoss):
    """See ``orthogonality_loss``."""

    name: ClassVar[str] = "orthogonality_loss"
    reads: ClassVar[str] = OUTPUTS

    coeff: float = option(
        0.0,
        "--moe-orthogonality-loss-coeff",
        "Weight of the orthogonality loss (arXiv 2505.22323): the mean squared projection of the outputs of the "
        "experts that process the same token on each other, summed over MoE layers.",
        paper="1e-4",
    )

    def token_losses(self, cosines_TKK: Tensor, lengths_TK: Tensor, active_TK: Tensor) -> Tensor:
        k = cosines_TKK.shape[1]
        # ||<x_j, u_v> u_v||^2 = (|x_j| cos_jv)^2 for the unit vector u_v.
        return (cosines_TKK * lengths_TK.unsqueeze(-1)).square().sum(dim=(1, 2)) / (k * (k - 1))


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
    return Orthogonality().of_vectors("x", x, valid)
