"""Measures of routing and overlap: sums over micro-batches and ranks, and entropies of distributions, in nats."""

import torch
from torch import Tensor


def entropy(weights: Tensor, dim: int = -1) -> Tensor:
    """Entropy along ``dim`` of non-negative weights, normalised to sum 1 first; 0 where they are all 0."""
    probabilities = weights / weights.sum(dim=dim, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return torch.special.entr(probabilities).sum(dim=dim)


def conditional_entropy(joint: Tensor) -> Tensor:
    """H(column | row) = H(row, column) - H(row) of non-negative weights [..., E, E'], of any positive sum."""
    return entropy(joint.flatten(-2)) - entropy(joint.sum(dim=-1))


def normalized_mutual_information(joint: Tensor) -> Tensor:
    """2 I(row; column) / (H(row) + H(column)), in [0, 1], of such weights; 0 where both entropies are 0."""
    rows, columns = entropy(joint.sum(dim=-1)), entropy(joint.sum(dim=-2))
    information = (rows + columns - entropy(joint.flatten(-2))).clamp_min(0.0)
    return 2.0 * information / (rows + columns).clamp_min(torch.finfo(joint.dtype).tiny)
