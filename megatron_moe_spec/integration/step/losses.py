"""Values of the losses of a training step, kept on the device and reduced over ranks once a step."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Optional, Union

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe_spec.config import SpecConfig
from megatron_moe_spec.integration.hooks.routing import TokenCount
from megatron_moe_spec.integration.step.clock import StepClock
from megatron_moe_spec.parallel.collectives import current_device

_MOST_TERMS = 2**18  # kept before they are summed: 1 MiB


@dataclass(frozen=True)
class ReducedLosses:
    """The losses of a step over all ranks, by name. One that is off, and was not measured, is left out."""

    means: dict[str, Tensor]  # over micro-batches, layers (pairs) and ranks; on the device. A mean of nothing is NaN
    numbers: dict[str, Tensor]  # of values in each mean, on the device
    # The mean of each layer (pair) by layer index (of a pair, the first one's), without those of nothing; empty where
    # losses are not kept for each layer.
    of_layers: dict[str, dict[int, float]]

    def values(self) -> dict[str, float]:
        """The means of something, read from the device at once."""
        if not self.means:
            return {}
        means, numbers = torch.stack([*self.means.values(), *self.numbers.values()]).view(2, -1).tolist()
        return {name: mean for name, mean, number in zip(self.means, means, numbers) if number > 0}


class StepLosses:
    """Sums up the losses that the taps of one model compute in a step.

    Args:
        layer_indices: of the MoE layers, among all layers of the model.
        tp_cp_group: the ranks that share a micro-batch; the losses they record for it sum to its loss.
        groups: process groups to reduce over, one after another.
        logs_each_layer: whether losses are kept for each layer in every step, not only in measured ones.
    """

    def __init__(
        self,
        config: SpecConfig,
        clock: StepClock,
        layer_indices: Sequence[int],
        tp_cp_group: Optional[dist.ProcessGroup] = None,
        groups: Sequence[dist.ProcessGroup] = (),
        logs_each_layer: bool = False,
    ):
        self._computed = config.computed_losses
        self._places = {loss.name: i for i, loss in enumerate(self._computed)}
        self._clock, self._layer_indices, self._groups = clock, layer_indices, groups
        self._share = 1.0 / tp_cp_group.size() if tp_cp_group is not None else 1.0
        self._logs_each_layer = logs_each_layer
        self.begin_step()

    def begin_step(self) -> None:
        self._device = current_device()
        self._per_layer = self._clock.measuring or self._logs_each_layer
        # Of each loss and layer: sum of its recorded values, and their number; on the device, and what the host knows.
        num_layers = len(self._layer_indices) if self._per_layer else 1
        self._sums = torch.zeros(len(self._places), num_layers, 2, dtype=torch.float64, device=self._device)
        self._known = [[[0.0, 0.0] for _ in range(num_layers)] for _ in self._places]
        # See ``record_mean``: by loss, layer and factor; by loss, layer, factor and offset, with numbers of tokens.
        self._terms: dict[tuple[int, int, float], list[Tensor]] = defaultdict(list)
        self._terms_of_tokens: dict[tuple[int, int, float, float], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._num_terms = 0
        # Name and MoE layer index (first of a pair) of the losses that this rank has recorded in this step.
        self.recorded: set[tuple[str, int]] = set()

    def record_loss(self, name: str, layer: int, value: Tensor, counts: Union[Tensor, bool]) -> None:
        """Records this rank's part of a loss of one MoE layer (first of a pair) and micro-batch.

        ``counts``: whether the micro-batch has tokens.
        """
        self.recorded.add((name, layer))
        loss, layer = self._place(name, layer)
        entry = self._sums[loss, layer]
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

        The terms have no gradient. Nothing is computed before those of many layers are there: operations on small
        tensors cost the time that they take to be launched.
        """
        self.recorded.add((name, layer))
        loss, layer = self._place(name, layer)
        terms = terms if terms.dim() == 1 else terms.reshape(-1)
        if isinstance(tokens.total, Tensor):
            self._terms_of_tokens[loss, layer, factor, offset].append((terms, tokens.total))
        elif tokens.total:
            known = self._known[loss][layer]
            known[0] += offset
            known[1] += self._share
            self._terms[loss, layer, factor / tokens.total].append(terms)
        self._num_terms += terms.shape[0]
        if self._num_terms > _MOST_TERMS:
            self._add_terms()

    def _place(self, name: str, layer: int) -> tuple[int, int]:
        return self._places[name], layer if self._per_layer else 0

    def _add_terms(self) -> None:
        for (loss, layer, factor), of_known in self._terms.items():
            self._sums[loss, layer, 0] += torch.cat(of_known).sum(dtype=torch.float64) * factor
        if self._terms_of_tokens:
            self._add_terms_of_tokens()
        self._terms.clear()
        self._terms_of_tokens.clear()
        self._num_terms = 0

    def _add_terms_of_tokens(self) -> None:
        waiting = self._terms_of_tokens.values()
        # One copy to the device for all, which the host may wait for.
        lengths = torch.tensor([len(terms) for of_one in waiting for terms, _ in of_one], device=self._device)
        parts = lengths.split([len(of_one) for of_one in waiting])
        for ((loss, layer, factor, offset), of_one), of_terms in zip(self._terms_of_tokens.items(), parts):
            terms, totals = zip(*of_one, strict=True)
            tokens = torch.stack(totals)
            counts = (tokens > 0).double()
            weights = factor * counts / tokens.double().clamp_min(1)
            weights = weights.repeat_interleave(of_terms, output_size=sum(map(len, terms)))
            self._sums[loss, layer, 0] += (torch.cat(terms) * weights).sum() + offset * counts.sum()
            self._sums[loss, layer, 1] += self._share * counts.sum()

    def reduce(self) -> ReducedLosses:
        """The losses so far. A collective, once a step; synchronises where losses are kept for each layer."""
        if not self._places:
            return ReducedLosses({}, {}, {})
        (sums,) = reduced([self.sums()], self._groups)
        return self.of_sums(sums, sums)

    def sums(self) -> Tensor:
        """fp64 [losses, layers, 2] of this rank, to be summed over all; for ``of_sums``."""
        self._add_terms()
        known = torch.tensor(self._known, dtype=torch.float64, device=self._device)
        return self._sums + known.view_as(self._sums)

    def of_sums(self, sums: Tensor, on_host: Tensor) -> ReducedLosses:
        """The losses by the sums over all ranks, which are read from ``on_host`` where each layer's losses are kept."""
        totals = sums.sum(dim=1)
        means = (totals[:, 0] / totals[:, 1]).float()
        of_layers = [
            {layer: total / number for layer, (total, number) in zip(self._layer_indices, layers) if number}
            for layers in (on_host.tolist() if self._per_layer else ())
        ]
        return ReducedLosses(self._by_name(means), self._by_name(totals[:, 1]), self._by_name(of_layers))

    def _by_name(self, values: Iterable) -> dict:
        return {loss.name: value for loss, value in zip(self._computed, values) if self._clock.is_computed(loss)}


def reduced(
    tensors: Sequence[Tensor],
    groups: Sequence[dist.ProcessGroup],
    operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
) -> list[Tensor]:
    """Tensors of one dtype over one process group after another, which is over all ranks; they stay as they are.

    One collective a group, however many tensors there are.
    """

    def reduce(elements: Tensor) -> Tensor:
        for group in groups:
            try:
                dist.all_reduce(elements, op=operation, group=group)
            except RuntimeError as error:
                raise RuntimeError(
                    "the values to be logged could not be reduced: call end_step() on every rank of the model's "
                    "process groups, or give attach() the ranks that hold it, attach(model, config, group=...)"
                ) from error
        return elements

    return as_one(reduce, tensors)


def as_one(function: Callable[[Tensor], Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one dtype after ``function``, which is called once: with a copy of all their elements, [n]."""
    elements = function(torch.cat([x.flatten() for x in tensors]))
    parts = elements.split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors)]
