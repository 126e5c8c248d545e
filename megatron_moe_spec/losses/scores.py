"""Router scores normalised over all experts."""

import torch
import torch.nn.functional as F
from torch import Tensor

SCORE_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64 input."""
    return torch.promote_types(x.dtype, torch.float32)


def check_floating(name: str, x: Tensor, shape: str) -> None:
    """Raises ValueError that names the argument x unless it is floating-point, with the dimensions of a "[T, E]"."""
    if x.dim() != len(shape.split(",")) or not x.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor {shape}; got {x.dtype} {list(x.shape)}")


def normalized_scores(logits: Tensor, score_function: str = "softmax") -> Tensor:
    """Scores s(t, e) of every token for every expert, each row summing to 1.

    Megatron's ``compute_routing_scores_for_aux_loss``: the softmax of the logits, or sigmoid / sqrt(softplus)
    divided by their sum over the experts.

    Args:
        logits: [T, E] router logits, any floating dtype.
        score_function: softmax, sigmoid or sqrtsoftplus (``--moe-router-score-function``).

    Returns:
        [T, E] in fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: unknown score function.
    """
    x = logits.to(accumulation_dtype(logits))
    if score_function == "softmax":
        return torch.softmax(x, dim=-1)
    scores = _unnormalized(x, score_function)
    return scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)


def normalized_scores_gradient(logits: Tensor, score_function: str, scores_gradient: Tensor) -> Tensor:
    """Gradient with respect to the logits, given the gradient with respect to ``normalized_scores``.

    For s = u / sum(u): dL/dx_j = u'(x_j) / sum(u) * (g_j - sum_e g_e s_e); for softmax u' = u. All are [T, E]; the
    result has the dtype of ``normalized_scores``.
    """
    x = logits.to(accumulation_dtype(logits))
    if score_function == "softmax":
        scores = slope = torch.softmax(x, dim=-1)
    else:
        scores = _unnormalized(x, score_function)
        total = scores.sum(dim=-1, keepdim=True) + 1e-20
        sigmoid = torch.sigmoid(x)
        derivative = sigmoid * (1.0 - sigmoid) if score_function == "sigmoid" else sigmoid / (2.0 * scores)
        scores, slope = scores / total, derivative / total
    return slope * (scores_gradient - (scores_gradient * scores).sum(dim=-1, keepdim=True))


def _unnormalized(x: Tensor, score_function: str) -> Tensor:
    if score_function == "sigmoid":
        return torch.sigmoid(x)
    if score_function == "sqrtsoftplus":
        # The root's slope at 0, where softplus underflows, is infinite.
        return F.softplus(x).clamp_min(torch.finfo(x.dtype).tiny).sqrt()
    raise ValueError(f"score_function must be one of {', '.join(SCORE_FUNCTIONS)}; got {score_function!r}")
