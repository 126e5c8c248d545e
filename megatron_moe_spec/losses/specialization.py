"""Intra-layer specialization loss (arXiv 2602.14159, Eq. 4): experts that share a token should differ on it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Optional

from torch import Tensor

from megatron_moe_spec.losses.base import A2A_DTYPES, ACTIVATIONS, ModelSettings, RowsLoss, option

PAPER = "2e-3"  # the paper's coefficient; of a sum over pairs, by second-hand accounts


@dataclass(frozen=True)
class Specialization(RowsLoss):
    """See ``specialization_loss``."""

    name: ClassVar[str] = "specialization_loss"
    reads: ClassVar[str] = ACTIVATIONS
    measured: ClassVar[bool] = True
    uses_lengths: ClassVar[bool] = False

    coeff: float = option(
        0.0,
        "--moe-specialization-loss-coeff",
        "Weight of the intra-layer specialization loss: the squared cosine similarity between the activations of the "
        "experts that process the same token, as a mean over their pairs, summed over MoE layers. By second-hand "
        "accounts, the paper sums over the k (k - 1) ordered pairs instead, k being --moe-router-topk: such a sum's "
        "coefficient, times k (k - 1), is this one.",
        paper=f"{PAPER}, Eq. 4, of that sum",
    )
    token_stride: int = option(
        1,
        "--moe-specialization-token-stride",
        "Compute the specialization loss on every N-th token of each rank only, starting at another token each "
        "micro-batch and step. Unbiased; cuts its cost, and its traffic under expert parallelism, N-fold.",
        minimum=1,
    )
    a2a_dtype: str = option(
        "same",
        "--moe-specialization-a2a-dtype",
        "How activations and their gradients travel between expert-parallel ranks for the specialization loss: "
        "'same', in their own dtype; 'fp8', as e4m3 with one fp32 scale per vector, half the bytes of bf16.",
        choices=A2A_DTYPES,
        hidden_by_default=True,
    )

    def squares_divisor(self, k: int) -> int:
        return k * (k - 1)

    def token_losses(self, cosines_TKK: Tensor, lengths_TK: Tensor, active_TK: Tensor) -> Tensor:
        return cosines_TKK.square().sum(dim=(1, 2)) / self.squares_divisor(cosines_TKK.shape[1])

    def units(self, transformer_config: ModelSettings) -> Iterator[str]:
        if pairs := self.squares_divisor(transformer_config.moe_router_topk):
            yield (
                f"{self.coeff:g} x the mean over a token's {pairs} ordered pairs of experts = "
                f"{self.coeff / pairs:.3g} x their sum; the paper's {PAPER} is of the sum, by second-hand accounts: "
                f"{self.flag} {float(PAPER) * pairs:g} here"
            )


def specialization_loss(z: Tensor, valid: Optional[Tensor] = None) -> Tensor:
    """Mean squared cosine similarity between the experts that process the same token.

        L = 2 / (T k (k-1)) * sum_t sum_{e<v} cos(z_e(t), z_v(t))^2        in [0, 1]

    By second-hand accounts, the paper sums over the k (k-1) ordered pairs where this is their mean: c times such a sum
    is c k (k-1) times this. Identical vectors get no gradient, since the squared cosine is stationary at 1.

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
    return Specialization().of_vectors("z", z, valid)
