"""Score variance loss (arXiv 2505.22323, L_v): an expert's score should differ from token to token."""

from torch import Tensor

from megatron_moe_spec.losses.scores import accumulation_dtype


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
    if scores.dim() != 2 or not scores.is_floating_point():
        raise ValueError(f"scores must be a floating-point tensor [T, E]; got {scores.dtype} {list(scores.shape)}")
    scores = scores.to(accumulation_dtype(scores))
    num_tokens = max(scores.shape[0], 1)
    mean = scores.sum(dim=0) / num_tokens
    return -(scores - mean).square().sum() / (num_tokens * max(scores.shape[1], 1))
