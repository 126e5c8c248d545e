"""Sums over the tokens of a training step, from which the measures of each layer and pair of layers follow.

Suffixes: T tokens, E experts, K experts per token, H hidden size.
"""

from collections.abc import Callable
from typing import Any, Union

import torch
from torch import Tensor

from megatron_moe_spec.metrics import conditional_entropy, entropy, normalized_mutual_information

Measure = Union[float, list[float], None]
Count = Union[int, Tensor]
When = Callable[..., None]  # calls a function with arguments: at once, later or never


def at_once(function: Callable[..., object], *args: Any) -> None:
    function(*args)


class LayerStatistics:
    """Routing and overlap of one MoE layer. ``sums`` adds up over micro-batches and ranks."""

    # tokens, entropy, |cos|, pairs, violation, micro-batches; then masses [K], scores [E] and dispatched tokens [E]
    _SCALARS = 6

    def __init__(self, num_experts: int, top_k: int, device: torch.device):
        self._sizes = [self._SCALARS, top_k, num_experts, num_experts]
        self.sums = torch.zeros(sum(self._sizes), dtype=torch.float64, device=device)
        self.largest_cosine = torch.zeros((), dtype=torch.float64, device=device)  # the maximum counts
        self.loads: list[Tensor] = []  # [E] of each micro-batch on this rank: tokens that each expert was given

    def add_routing(self, scores_TE: Tensor, active_TE: Tensor, num_tokens: Count, when: When = at_once) -> None:
        """Adds a micro-batch's scores (normalised over the experts, 0 for padding) and dispatched experts."""
        top_k = self._sizes[1]
        masses_K = (scores_TE * active_TE).topk(top_k, dim=1).values.cumsum(dim=1).sum(dim=0)
        load_E = active_TE.sum(dim=0)
        when(self._add_routing, num_tokens, entropy(scores_TE).sum(), torch.cat([masses_K, scores_TE.sum(0), load_E]))
        when(self.loads.append, load_E)

    def _add_routing(self, num_tokens: Count, entropies: Tensor, sums: Tensor) -> None:
        self.sums[0] += num_tokens
        self.sums[1] += entropies
        self.sums[self._SCALARS :] += sums

    def add_cosines(self, cosines_TKK: Tensor, active_TK: Tensor, when: When = at_once) -> None:
        """Adds the cosines between the vectors of each token's experts."""
        magnitude = cosines_TKK.abs()
        live = active_TK.sum(dim=1)
        if magnitude.numel():
            when(self._add_cosines, magnitude.sum(), (live * (live - 1)).sum(), magnitude.max())

    def _add_cosines(self, magnitudes: Tensor, pairs: Tensor, largest: Tensor) -> None:
        self.sums[2] += magnitudes
        self.sums[3] += pairs
        self.largest_cosine.copy_(torch.maximum(self.largest_cosine, largest))

    def add_violations(self, loads: Tensor, share: float) -> None:
        """Adds those of loads [micro-batches, E], sums over the ranks of a micro-batch; ``share``: 1 / their number."""
        loads = loads[loads.sum(dim=1) > 0].double()
        self.sums[4] += share * violation(loads).sum()
        self.sums[5] += share * len(loads)

    def summary(self) -> dict[str, Measure]:
        """The measures; None where there is nothing to measure."""
        scalars, masses_K, scores_E, load_E = self.sums.split(self._sizes)
        tokens, entropies, cosines, pairs, violations, micro_batches = scalars
        nothing = torch.tensor(torch.nan, device=self.sums.device)
        measures = {
            "routing_entropy": entropies / tokens,
            "marginal_entropy": entropy(scores_E) if tokens else nothing,
            "topk_mass": masses_K[-1] / tokens,
            "mass_of_best": masses_K / tokens,
            "mean_abs_cos": cosines / pairs,
            "max_abs_cos": self.largest_cosine if pairs else nothing,
            "load_imbalance": load_E.max() / load_E.mean(),
            "max_violation": violation(load_E),
            "max_violation_micro_batch": violations / micro_batches,
            "dead_experts": (load_E == 0).double().mean() if tokens else nothing,
            "effective_experts": entropy(load_E).exp() / len(load_E) if tokens else nothing,
        }
        return {**{name: _json_value(value) for name, value in measures.items()}, "load": load_E.long().tolist()}


def violation(load: Tensor) -> Tensor:
    """How far the load [..., E] of the busiest expert is above the mean, relative to it: max / mean - 1."""
    return load.amax(dim=-1) / load.mean(dim=-1) - 1.0


class RouterStatistics:
    """Geometry of a router's weight, the same on all ranks that hold it. ``sums``, fp64, adds up over ranks."""

    _SCALARS = 3  # ranks that hold it, mean |cos|, max |cos|; then singular values [E]

    def __init__(self, num_experts: int, device: torch.device):
        self.sums = torch.zeros(self._SCALARS + num_experts, dtype=torch.float64, device=device)

    def add(self, weight_EH: Tensor) -> None:
        """Adds what this rank holds."""
        gram_EE = weight_EH.double() @ weight_EH.double().T
        lengths_E = gram_EE.diagonal().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        cosines_EE = (gram_EE / lengths_E / lengths_E[:, None]).abs().fill_diagonal_(0.0)
        num_experts = len(weight_EH)
        self.sums[0] += 1
        self.sums[1] += cosines_EE.sum() / max(1, num_experts * (num_experts - 1))
        self.sums[2] += cosines_EE.max()
        # What is not finite would be an error there.
        singular_values = torch.linalg.eigvalsh(gram_EE.nan_to_num(0.0, 0.0, 0.0)).clamp_min(0.0).sqrt().flip(0)
        self.sums[self._SCALARS :] += singular_values.where(gram_EE.isfinite().all(), torch.nan)

    def summary(self) -> dict[str, Measure]:
        """The measures; None where no rank holds the whole weight."""
        ranks, mean, largest = self.sums[: self._SCALARS]
        measures = {
            "router_mean_abs_cos": mean / ranks,
            "router_max_abs_cos": largest / ranks,
            "router_singular_values": self.sums[self._SCALARS :] / ranks,
        }
        return {name: _json_value(value) for name, value in measures.items()}


def _json_value(value: Tensor) -> Measure:
    if not bool(value.isfinite().all()):
        return None
    return float(value) if value.dim() == 0 else [float(f"{one:.6g}") for one in value.tolist()]


class PairStatistics:
    """Joint counts of the experts of this MoE layer and of the next, and the same for shuffled tokens.

    Shuffling destroys the link between the layers and keeps their loads: its mutual information is what a finite
    number of tokens shows by chance. ``sums``: fp64 [2, E, E'], counts for the tokens as they are and shuffled.
    """

    def __init__(self, num_experts: int, num_experts_next: int, device: torch.device):
        self.sums = torch.zeros(2, num_experts, num_experts_next, dtype=torch.float64, device=device)

    def add(self, active_TE: Tensor, active_next_TE: Tensor, when: When = at_once) -> None:
        """Adds a micro-batch's dispatched experts in both layers, [T, E] and [T, E'] bool."""
        this, following = active_TE.double(), active_next_TE.double()
        # A separate generator: measuring must not change the random numbers of training.
        generator = torch.Generator("cpu").manual_seed(len(this))
        order = torch.randperm(len(this), generator=generator, device="cpu")
        shuffled = following[order.to(following.device)]
        when(self.sums.add_, torch.stack([this.T @ following, this.T @ shuffled]))

    def summary(self) -> dict[str, float]:
        joint, shuffled = self.sums
        return {
            "conditional_entropy": float(conditional_entropy(joint)),
            "normalized_mutual_information": float(normalized_mutual_information(joint)),
            "null_normalized_mutual_information": float(normalized_mutual_information(shuffled)),
        }
