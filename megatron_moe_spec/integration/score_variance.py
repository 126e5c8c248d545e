"""Score variance loss of one MoE layer: a statistic of all tokens of a micro-batch, wherever they are.

Suffixes: T tokens of this rank, E experts.
"""

from typing import Optional

from torch import Tensor

from megatron_moe_spec.losses.scores import normalized_scores, normalized_scores_gradient
from megatron_moe_spec.parallel.collectives import summed


def mean_scores(scores_TE: Tensor, num_tokens, group) -> Tensor:
    """[E] mean over the micro-batch's tokens, given scores that are 0 for padding. One all-reduce of E numbers."""
    return summed(scores_TE.sum(dim=0), group) / num_tokens


def loss_part(scores_TE: Tensor, mean_E: Tensor, num_tokens, padding_mask: Optional[Tensor]) -> Tensor:
    """This rank's part of the loss; the parts of the ranks that share the micro-batch sum to it."""
    return -_deviations(scores_TE, mean_E, padding_mask).square().sum() / (num_tokens * len(mean_E))


def logits_gradient(
    logits: Tensor, score_function: str, mean_E: Tensor, num_tokens, padding_mask: Optional[Tensor]
) -> Tensor:
    """Gradient of the loss with respect to a router's logits [..., E], in their shape.

    dL/ds = -2 / (T E) (s - mean): the mean's own dependence on s cancels, because deviations sum to 0.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    deviations_TE = _deviations(normalized_scores(flat, score_function), mean_E, padding_mask)
    gradient_TE = normalized_scores_gradient(flat, score_function, deviations_TE * (-2.0 / len(mean_E)) / num_tokens)
    return gradient_TE.view(logits.shape)


def _deviations(scores_TE: Tensor, mean_E: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
    deviations_TE = scores_TE - mean_E
    return deviations_TE if padding_mask is None else deviations_TE * ~padding_mask.reshape(-1, 1)
