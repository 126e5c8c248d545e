"""Sums over the tokens of a training step, from which the measures of each layer and pair of layers follow.

Of all layers (pairs) together: what a step's end costs does not grow with their number. Suffixes: L layers (pairs of
layers), M micro-batches, T tokens, E experts, K experts per token, H hidden size.
"""

import math
from collections.abc import Callable, Mapping, Sequence
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
    """Routing and overlap of MoE layers. ``sums``, fp64 [L, ...], adds up over micro-batches and ranks."""

    # tokens, entropy, |cos|, pairs, violation, micro-batches; then masses [K], scores [E] and dispatched tokens [E]
    _SCALARS = 6

    def __init__(self, num_layers: int, num_experts: int, top_k: int, device: torch.device):
        self._sizes = [self._SCALARS, top_k, num_experts, num_experts]
        self.sums = torch.zeros(num_layers, sum(self._sizes), dtype=torch.float64, device=device)
        self.largest_cosines = torch.zeros(num_layers, dtype=torch.float64, device=device)  # the maximum counts
        # Of each layer: [E] of each micro-batch on this rank, tokens that each expert was given.
        self.loads: list[list[Tensor]] = [[] for _ in range(num_layers)]

    def add_routing(
        self, layer: int, scores_TE: Tensor, active_TE: Tensor, num_tokens: Count, when: When = at_once
    ) -> None:
        """Adds a micro-batch's scores (normalised over the experts, 0 for padding) and dispatched experts."""
        top_k = self._sizes[1]
        masses_K = (scores_TE * active_TE).topk(top_k, dim=1).values.cumsum(dim=1).sum(dim=0)
        load_E = active_TE.sum(dim=0)
        sums = torch.cat([masses_K, scores_TE.sum(0), load_E])
        when(self._add_routing, layer, num_tokens, entropy(scores_TE).sum(), sums)
        when(self.loads[layer].append, load_E)

    def _add_routing(self, layer: int, num_tokens: Count, entropies: Tensor, sums: Tensor) -> None:
        of_layer = self.sums[layer]
        of_layer[0] += num_tokens
        of_layer[1] += entropies
        of_layer[self._SCALARS :] += sums

    def add_cosines(self, layer: int, cosines_TKK: Tensor, active_TK: Tensor, when: When = at_once) -> None:
        """Adds the cosines between the vectors of each token's experts."""
        magnitude = cosines_TKK.abs()
        live = active_TK.sum(dim=1)
        if magnitude.numel():
            when(self._add_cosines, layer, magnitude.sum(), (live * (live - 1)).sum(), magnitude.max())

    def _add_cosines(self, layer: int, magnitudes: Tensor, pairs: Tensor, largest: Tensor) -> None:
        of_layer, largest_cosine = self.sums[layer], self.largest_cosines[layer]
        of_layer[2] += magnitudes
        of_layer[3] += pairs
        largest_cosine.copy_(torch.maximum(largest_cosine, largest))

    def add_violations(self, layers: Sequence[int], loads_LME: Tensor, share: float) -> None:
        """Adds those of loads, sums over the ranks of a micro-batch, in some layers; ``share``: 1 / number of ranks.

        A micro-batch without tokens counts for nothing.
        """
        counts_LM = loads_LME.sum(dim=-1) > 0
        violations_LM = violation(loads_LME.double()).where(counts_LM, 0.0)
        self.sums[layers, 4] += share * violations_LM.sum(dim=-1)
        self.sums[layers, 5] += share * counts_LM.sum(dim=-1)

    def summaries(self) -> list[dict[str, Measure]]:
        """The measures of each layer; None where there is nothing to measure. To be called with sums on the host."""
        scalars, masses_LK, scores_LE, load_LE = self.sums.split(self._sizes, dim=1)
        tokens, entropies, cosines, pairs, violations, micro_batches = scalars.unbind(dim=1)
        measures = {
            "routing_entropy": entropies / tokens,
            "marginal_entropy": entropy(scores_LE).where(tokens > 0, math.nan),
            "topk_mass": masses_LK[:, -1] / tokens,
            "mass_of_best": masses_LK / tokens[:, None],
            "mean_abs_cos": cosines / pairs,
            "max_abs_cos": self.largest_cosines.where(pairs > 0, math.nan),
            "load_imbalance": load_LE.amax(dim=1) / load_LE.mean(dim=1),
            "max_violation": violation(load_LE),
            "max_violation_micro_batch": violations / micro_batches,
            "dead_experts": (load_LE == 0).double().mean(dim=1).where(tokens > 0, math.nan),
            "effective_experts": (entropy(load_LE).exp() / load_LE.shape[1]).where(tokens > 0, math.nan),
        }
        loads = load_LE.long().tolist()
        return [{**row, "load": load} for row, load in zip(_rows(measures), loads)]


def violation(load: Tensor) -> Tensor:
    """How far the load [..., E] of the busiest expert is above the mean, relative to it: max / mean - 1."""
    return load.amax(dim=-1) / load.mean(dim=-1) - 1.0


class RouterStatistics:
    """Geometry of routers' weights, the same on all ranks that hold them. ``sums``, fp64 [L, ...], adds up over ranks.

    A weight is kept as the products of its rows until ``add_up``: E x E numbers.
    """

    _SCALARS = 3  # ranks that hold it, mean |cos|, max |cos|; then singular values [E]

    def __init__(self, num_layers: int, num_experts: int, device: torch.device):
        self.sums = torch.zeros(num_layers, self._SCALARS + num_experts, dtype=torch.float64, device=device)
        self._products: dict[int, Tensor] = {}  # fp64 [E, E] by layer

    def add(self, layer: int, weight_EH: Tensor) -> None:
        """Adds what this rank holds."""
        weight_EH = weight_EH.double()
        self._products[layer] = weight_EH @ weight_EH.T

    def add_up(self) -> None:
        """Adds what was added to the sums: one batch of eigenvalue problems."""
        if not self._products:
            return
        layers, products_LEE = list(self._products), torch.stack(list(self._products.values()))
        self._products.clear()
        lengths_LE = products_LEE.diagonal(dim1=1, dim2=2).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        cosines_LEE = (products_LEE / lengths_LE[:, None, :] / lengths_LE[:, :, None]).abs_()
        cosines_LEE.diagonal(dim1=1, dim2=2).zero_()
        num_experts = lengths_LE.shape[1]
        means = cosines_LEE.flatten(1).sum(dim=1) / max(1, num_experts * (num_experts - 1))
        largest = cosines_LEE.flatten(1).amax(dim=1)
        del cosines_LEE
        # What is not finite would be an error there.
        is_finite = products_LEE.isfinite().flatten(1).all(dim=1, keepdim=True)
        eigenvalues_LE = torch.linalg.eigvalsh(products_LEE.nan_to_num_(0.0, 0.0, 0.0))
        singular_values_LE = eigenvalues_LE.clamp_min(0.0).sqrt().flip(1).where(is_finite, math.nan)
        scalars = torch.stack([torch.ones_like(means), means, largest], dim=1)
        self.sums[layers] += torch.cat([scalars, singular_values_LE], dim=1)

    def summaries(self) -> list[dict[str, Measure]]:
        """The measures of each layer; None where no rank holds the whole weight. With sums on the host."""
        ranks, means, largest = self.sums[:, : self._SCALARS].unbind(dim=1)
        measures = {
            "router_mean_abs_cos": means / ranks,
            "router_max_abs_cos": largest / ranks,
            "router_singular_values": self.sums[:, self._SCALARS :] / ranks[:, None],
        }
        return _rows(measures)


class PairStatistics:
    """Joint counts of the experts of an MoE layer and of the next, and the same for shuffled tokens.

    Shuffling destroys the link between the layers and keeps their loads: its mutual information is what a finite
    number of tokens shows by chance. ``sums``: fp64 [L, 2, E, E], counts for the tokens as they are and shuffled.
    """

    def __init__(self, num_pairs: int, num_experts: int, device: torch.device):
        self.sums = torch.zeros(num_pairs, 2, num_experts, num_experts, dtype=torch.float64, device=device)

    def add(self, pair: int, active_TE: Tensor, active_next_TE: Tensor, when: When = at_once) -> None:
        """Adds a micro-batch's dispatched experts in both layers, bool."""
        this, following = active_TE.double(), active_next_TE.double()
        # A separate generator: measuring must not change the random numbers of training.
        generator = torch.Generator("cpu").manual_seed(len(this))
        order = torch.randperm(len(this), generator=generator, device="cpu")
        shuffled = following[order.to(following.device)]
        when(self.sums[pair].add_, torch.stack([this.T @ following, this.T @ shuffled]))

    def measures(self) -> Tensor:
        """fp64 [L, 4], computed where the sums are: the host need not get E x E numbers. For ``summaries``."""
        joint, shuffled = self.sums.unbind(dim=1)
        information = normalized_mutual_information(joint), normalized_mutual_information(shuffled)
        return torch.stack([joint.sum(dim=(1, 2)), conditional_entropy(joint), *information], dim=1)

    @staticmethod
    def summaries(measures: Tensor) -> list[dict[str, float]]:
        """The measures of each pair; empty where it had no tokens."""
        names = "conditional_entropy", "normalized_mutual_information", "null_normalized_mutual_information"
        return [dict(zip(names, values)) if tokens else {} for tokens, *values in measures.tolist()]


def _rows(measures: Mapping[str, Tensor]) -> list[dict[str, Measure]]:
    """Of measures [L] and [L, n]: those of each layer, as JSON has them; None where they are not finite."""
    columns = [[_json_value(value) for value in of_layers.tolist()] for of_layers in measures.values()]
    return [dict(zip(measures, row)) for row in zip(*columns)]


def _json_value(value: Union[float, list[float]]) -> Measure:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return [float(f"{one:.6g}") for one in value] if all(map(math.isfinite, value)) else None
