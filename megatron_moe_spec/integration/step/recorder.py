"""Values of the losses and measures of a training step, kept on the device and reduced over ranks once a step."""

from collections.abc import Callable, Sequence
from typing import Optional, Union

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe_spec.config import SpecConfig
from megatron_moe_spec.integration.hooks.routing import TokenCount
from megatron_moe_spec.integration.step.tracer import Tracer
from megatron_moe_spec.losses import Loss
from megatron_moe_spec.losses.base import PAIRS
from megatron_moe_spec.metrics.accumulators import LayerStatistics, PairStatistics, RouterStatistics, at_once
from megatron_moe_spec.parallel.collectives import all_reduce_max, all_reduce_sum, current_device

_MOST_TERMS = 2**18  # kept before they are summed: 1 MiB


class Recorder:
    """Collects what the layer taps of one model see during a training step.

    Attributes:
        spec: the settings.
        iteration: number of the last finished training step.
        unended: see ``begin_after``.
        recorded: name and layer (first of a pair) of the losses that this rank has recorded in this step.
        measuring: whether this step's routing and overlap are measured for the diagnostics.
        tracer: writes the routing of the steps that are traced.
        layer_indices: of the MoE layers, among all layers of the model.
        logs_each_layer: whether losses are kept for each layer in every step, not only in measured ones.

    Args:
        num_experts: of each MoE layer.
        top_k: experts of a token.
        tp_cp_group: the ranks that share a micro-batch; the losses they record for it sum to its loss.
        groups: process groups to reduce over, one after another.
    """

    def __init__(
        self,
        spec: SpecConfig,
        num_experts: list[int],
        layer_indices: Sequence[int] = (),
        top_k: int = 1,
        tp_cp_group=None,
        groups: Sequence = (),
        tracer: Optional[Tracer] = None,
        logs_each_layer: bool = False,
        iteration: int = 0,
    ):
        self.spec = spec
        self._names = [loss.name for loss in spec.computed_losses]
        self._num_experts = num_experts
        self.layer_indices = layer_indices or range(len(num_experts))
        self._top_k = top_k
        self._token_group = tp_cp_group
        self._share = 1.0 / tp_cp_group.size() if tp_cp_group is not None else 1.0
        self._groups = groups
        self.tracer = tracer or Tracer("", 0, None)
        self.logs_each_layer = logs_each_layer
        self.begin_after(iteration)

    def begin_after(self, iteration: int, unended: int = 0) -> None:
        """Starts the step after ``iteration``, or another attempt at it, with nothing recorded.

        Args:
            unended: steps that have gone by since ``iteration`` as ``Steps`` counts them, where the loop ends none.
        """
        self.iteration, self.unended = iteration, unended
        interval = self.spec.metrics_interval
        self.measuring = bool(interval) and (iteration + 1) % interval == 0
        self.tracer.begin_after(iteration)
        self._device = current_device()
        self._per_layer = self.measuring or self.logs_each_layer
        # Of each loss and layer: sum of its recorded values, and their number; on the device, and what the host knows.
        num_layers = len(self._num_experts) if self._per_layer else 1
        self._losses = torch.zeros(len(self._names), num_layers, 2, dtype=torch.float64, device=self._device)
        self._known = [[[0.0, 0.0] for _ in range(num_layers)] for _ in self._names]
        self._totals: Optional[Tensor] = None
        # See ``record_mean``: by loss, layer and factor; by loss, layer, factor and offset, with numbers of tokens.
        self._terms: dict[tuple[int, int, float], list[Tensor]] = {}
        self._terms_of_tokens: dict[tuple[int, int, float, float], list[tuple[Tensor, Tensor]]] = {}
        self._num_terms = 0
        self.recorded: set[tuple[str, int]] = set()
        self._layers: list[LayerStatistics] = []
        self._routers: list[RouterStatistics] = []
        self._pairs: list[PairStatistics] = []
        if self.measuring:
            experts = self._num_experts
            self._layers = [LayerStatistics(n, self._top_k, self._device) for n in experts]
            self._routers = [RouterStatistics(n, self._device) for n in experts]
            self._pairs = [PairStatistics(n, m, self._device) for n, m in zip(experts, experts[1:])]

    @property
    def step(self) -> int:
        """Number by which what is drawn at random, or chosen in turns, differs from step to step."""
        return self.iteration + self.unended

    @property
    def active(self) -> bool:
        return self.measuring or self.tracer.tracing or bool(self.spec.trained_losses)

    def is_computed(self, loss: Loss) -> bool:
        """Whether a loss is to be computed in this step."""
        return loss.coeff > 0 or (self.measuring and loss.measured)

    def measure_routing(
        self, layer: int, scores_TE: Tensor, active_TE: Tensor, num_tokens, when: Callable = at_once
    ) -> None:
        """Of one micro-batch; ``when`` it counts, here and below, see ``Notes.add``."""
        if self.measuring:
            self._layers[layer].add_routing(scores_TE, active_TE, num_tokens, when)

    def measure_cosines(self, layer: int, cosines_TKK: Tensor, active_TK: Tensor, when: Callable = at_once) -> None:
        if self.measuring:
            self._layers[layer].add_cosines(cosines_TKK, active_TK, when)

    def measure_router(self, layer: int, weight_EH: Tensor) -> None:
        """Once, when the step has ended."""
        if self.measuring:
            self._routers[layer].add(weight_EH)

    def measure_pair(self, layer: int, active_TE: Tensor, active_next_TE: Tensor, when: Callable = at_once) -> None:
        """Of ``layer`` and the next MoE layer."""
        if self.measuring:
            self._pairs[layer].add(active_TE, active_next_TE, when)

    def record_loss(self, name: str, layer: int, value: Tensor, counts: Union[Tensor, bool]) -> None:
        """Records this rank's part of a loss of one layer (pair) and micro-batch.

        Args:
            layer: number of the layer, or of the first one of the pair, among the model's MoE layers.
            counts: whether the micro-batch has tokens.
        """
        self.recorded.add((name, layer))
        loss, layer = self._place(name, layer)
        entry = self._losses[loss, layer]
        if isinstance(counts, Tensor):
            entry[0] += value.detach() * counts
            entry[1] += self._share * counts.double()
        elif counts:
            entry[0] += value.detach()
            self._known[loss][layer][1] += self._share

    def record_mean(
        self, name: str, layer: int, terms: Tensor, tokens: TokenCount, factor: float = 1.0, offset: float = 0.0
    ) -> None:
        """Records offset + factor * the sum of ``terms`` / number of the micro-batch's tokens, see ``record_loss``.

        The terms have no gradient.

        Nothing is computed before the terms of many layers are there: operations on small tensors cost the time that
        they take to be launched.
        """
        self.recorded.add((name, layer))
        loss, layer = self._place(name, layer)
        terms = terms if terms.dim() == 1 else terms.reshape(-1)
        if isinstance(tokens.total, Tensor):
            self._terms_of_tokens.setdefault((loss, layer, factor, offset), []).append((terms, tokens.total))
        elif tokens.counts:
            known = self._known[loss][layer]
            known[0] += offset
            known[1] += self._share
            self._terms.setdefault((loss, layer, factor / tokens.divisor), []).append(terms)
        self._num_terms += terms.numel()
        if self._num_terms > _MOST_TERMS:
            self._add_terms()

    def _place(self, name: str, layer: int) -> tuple[int, int]:
        return self._names.index(name), layer if self._per_layer else 0

    def _add_terms(self) -> None:
        for (loss, layer, factor), of_known in self._terms.items():
            self._losses[loss, layer, 0] += torch.cat(of_known).sum(dtype=torch.float64) * factor
        for (loss, layer, factor, offset), waiting in self._terms_of_tokens.items():
            terms, totals = zip(*waiting, strict=True)
            lengths = torch.tensor([len(x) for x in terms], device=self._device)
            tokens = torch.stack(totals)
            counts = (tokens > 0).double()
            weights = factor * counts / tokens.double().clamp_min(1)
            weights = weights.repeat_interleave(lengths, output_size=sum(map(len, terms)))
            self._losses[loss, layer, 0] += (torch.cat(terms) * weights).sum() + offset * counts.sum()
            self._losses[loss, layer, 1] += self._share * counts.sum()
        self._terms.clear()
        self._terms_of_tokens.clear()
        self._num_terms = 0

    def losses(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Means over this step's micro-batches, layers (pairs) and ranks, and how many; scalars on the device.

        A mean of nothing is NaN. A loss that is off, and was not measured, is left out. A collective: every rank calls
        it, once a step.
        """
        if not self._names:
            return {}
        self._add_terms()
        known = torch.tensor(self._known, dtype=torch.float64, device=self._device)
        self._totals = self._summed(self._losses + known)
        totals = self._totals.sum(dim=1)
        means = (totals[:, 0] / totals[:, 1]).float()
        return {
            loss.name: (mean, number)
            for loss, mean, number in zip(self.spec.computed_losses, means, totals[:, 1])
            if self.is_computed(loss)
        }

    def losses_of_layers(self) -> dict[str, dict[int, float]]:
        """The same for each layer, by its number in the model (of a pair, the first one's), after ``losses``.

        Synchronises with the device. Empty where losses are not kept for each layer.
        """
        if not self._per_layer or self._totals is None:
            return {}
        return {
            loss.name: {layer: total / number for layer, (total, number) in zip(self.layer_indices, totals) if number}
            for loss, totals in zip(self.spec.computed_losses, self._totals.tolist())
            if self.is_computed(loss)
        }

    def diagnostics(self) -> Optional[dict]:
        """The measures of this step, on every rank; None in a step that is not measured. A collective, too."""
        if not self.measuring:
            return None
        self._add_violations()
        for layer in self._layers:
            layer.sums = self._summed(layer.sums)
            layer.largest_cosine = self._summed(layer.largest_cosine, dist.ReduceOp.MAX)
        for router in self._routers:
            router.sums = self._summed(router.sums)
        for pair in self._pairs:
            pair.sums = self._summed(pair.sums)
        layers: list[dict] = [
            {"layer": i, "layer_index": number, **layer.summary(), **router.summary()}
            for i, (number, layer, router) in enumerate(zip(self.layer_indices, self._layers, self._routers))
        ]
        pairs: list[dict] = [{"layers": [i, i + 1], **pair.summary()} for i, pair in enumerate(self._pairs)]
        of_pairs = {loss.name for loss in self.spec.computed_losses if loss.reads == PAIRS}
        for name, values in self.losses_of_layers().items():
            for number, row in zip(self.layer_indices, pairs if name in of_pairs else layers):
                row[name] = values.get(number)
        return {"layers": layers, "pairs": [row for row, pair in zip(pairs, self._pairs) if pair.sums.any()]}

    def _add_violations(self) -> None:
        """Of micro-batches, which the ranks of a group share: in a layer where these do not have the same number of
        them, since one was left out on some ranks alone, there is none."""
        numbers = torch.tensor([len(layer.loads) for layer in self._layers], device=self._device)
        if self._token_group is not None:
            most, least = all_reduce_max(torch.stack([numbers, -numbers]), self._token_group)
            numbers = torch.where(most == -least, numbers, 0)
        for layer, number in zip(self._layers, numbers.tolist(), strict=True):
            if number:
                loads = torch.stack(layer.loads)
                if self._token_group is not None:
                    loads = all_reduce_sum(loads, self._token_group)
                layer.add_violations(loads, self._share)

    def _summed(self, x: Tensor, operation=dist.ReduceOp.SUM) -> Tensor:
        x = x.clone()
        for group in self._groups:
            try:
                dist.all_reduce(x, op=operation, group=group)
            except RuntimeError as error:
                raise RuntimeError(
                    "the values to be logged could not be reduced: call end_step() on every rank of the model's "
                    "process groups, or give attach() the ranks that hold it, attach(model, config, group=...)"
                ) from error
        return x
