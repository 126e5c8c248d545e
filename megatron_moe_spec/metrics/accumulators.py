"""Sums over the tokens of a training step, from which the measures of each layer and pair of layers follow.

Suffixes: T tokens, E experts, K experts per token.
"""

from typing import Optional

import torch
from torch import Tensor

from megatron_moe_spec.metrics.information import conditional_entropy, entropy, normalized_mutual_information


class LayerStatistics:
    """Routing and overlap of one MoE layer.

    Attributes:
        sums: fp64 vector that adds up over micro-batches and ranks.
        largest_cosine: fp64 scalar, of which the maximum counts.
    """

    _SCALARS = 5  # tokens, entropy, mass, |cos|, pairs; then scores [E] and dispatched tokens [E]

    def __init__(self, num_experts: int, device: torch.device):
        self._num_experts = num_experts
        self.sums = torch.zeros(self._SCALARS + 2 * num_experts, dtype=torch.float64, device=device)
        self.largest_cosine = torch.zeros((), dtype=torch.float64, device=device)

    def add_routing(self, scores_TE: Tensor, active_TE: Tensor, num_tokens) -> None:
        """Adds a micro-batch's scores (normalised over the experts, 0 for padding) and dispatched experts."""
        self.sums[0] += num_tokens
        self.sums[1] += entropy(scores_TE).sum()
        self.sums[2] += (scores_TE * active_TE).sum()
        self.sums[5:] += torch.cat([scores_TE.sum(0), active_TE.sum(0)])

    def add_cosines(self, cosines_TKK: Tensor, active_TK: Tensor) -> None:
        """Adds the cosines between the vectors of each token's experts."""
        magnitude = cosines_TKK.abs()
        live = active_TK.sum(dim=1)
        self.sums[3] += magnitude.sum()
        self.sums[4] += (live * (live - 1)).sum()
        if magnitude.numel():
            self.largest_cosine.copy_(torch.maximum(self.largest_cosine, magnitude.max()))

    def summary(self) -> dict[str, Optional[float]]:
        """The measures; None where there is nothing to measure."""
        tokens, entropies, mass, cosines, pairs = self.sums[: self._SCALARS]
        scores_E, load_E = self.sums[self._SCALARS :].split(self._num_experts)
        measures = {
            "routing_entropy": entropies / tokens,
            "marginal_entropy": entropy(scores_E) if tokens else torch.tensor(torch.nan),
            "topk_mass": mass / tokens,
            "mean_abs_cos": cosines / pairs,
            "max_abs_cos": self.largest_cosine if pairs else torch.tensor(torch.nan),
            "load_imbalance": load_E.max() / load_E.mean(),
        }
        return {name: float(value) if value.isfinite() else None for name, value in measures.items()}


class PairStatistics:
    """Joint counts of the experts of this MoE layer and of the next, and the same for shuffled tokens.

    Shuffling destroys the link between the layers and keeps their loads: its mutual information is what a finite
    number of tokens shows by chance.

    Attributes:
        sums: fp64 [2, E, E'], counts for the tokens as they are and shuffled.
    """

    def __init__(self, num_experts: int, num_experts_next: int, device: torch.device):
        self.sums = torch.zeros(2, num_experts, num_experts_next, dtype=torch.float64, device=device)

    def add(self, active_TE: Tensor, active_next_TE: Tensor) -> None:
        """Adds a micro-batch's dispatched experts in both layers, [T, E] and [T, E'] bool."""
        this, following = active_TE.double(), active_next_TE.double()
        # A generator of its own: measuring must not change the random numbers of training.
        generator = torch.Generator().manual_seed(len(this))
        shuffled = following[torch.randperm(len(this), generator=generator).to(following.device)]
        self.sums += torch.stack([this.T @ following, this.T @ shuffled])

    def summary(self) -> dict[str, float]:
        joint, shuffled = self.sums
        return {
            "conditional_entropy": float(conditional_entropy(joint)),
            "normalized_mutual_information": float(normalized_mutual_information(joint)),
            "null_normalized_mutual_information": float(normalized_mutual_information(shuffled)),
        }
