"""Score variance loss (arXiv 2505.22323, L_v): an expert's score should differ from token to token."""

from dataclasses import dataclass
from typing import ClassVar, Optional

from torch import Tensor

from megatron_moe_spec.losses.base import ScoresLoss, option


@dataclass(frozen=True)
class ScoreVariance(ScoresLoss):
    """See ``score_variance_loss``."""

    name: ClassVar[str] = "score_variance_loss"

    coeff: float = option(
        0.0,
        "--moe-score-variance-loss-coeff",
        "Weight of the score variance loss (arXiv 2505.22323): minus the variance of the experts' scores over "
        "the tokens of a micro-batch, summed over MoE layers.",
        paper="1e-3",
    )

    def token_statistics(self, scores_TE: Tensor, active_TE: Tensor) -> Tensor:
        return scores_TE

    def token_losses(self, scores_TE: Tensor, active_TE: Tensor, mean: Optional[Tensor]) -> Tensor:
        return -(scores_TE - mean).square().mean(dim=-1)


def score_variance_loss(scores: Tensor) -> Tensor:
    """Minus the variance over tokens of an expert's score, mean over experts; in (-1/4, 0].

        L = -1 / (T E) * sum_e sum_t (s(t, e) - mean_t s(t, e))^2

    Args:
        scores: [T, E] router scores, normalised over all experts (see ``normalized_scores``).

    Returns:
        Scalar in fp32 (fp64 for fp64 input).

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    return ScoreVariance().of_scores(scores)
