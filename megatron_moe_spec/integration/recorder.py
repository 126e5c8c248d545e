"""Values of the losses and measures of a training step, kept on the device and reduced over ranks once a step."""

from collections.abc import Sequence
from typing import Optional, Union

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe_spec.config import SpecConfig
from megatron_moe_spec.integration.compat.release import current_device
from megatron_moe_spec.integration.routing import LayerRouting
from megatron_moe_spec.losses import Loss
from megatron_moe_spec.metrics.accumulators import LayerStatistics, PairStatistics

_MOST_TERMS = 2**18  # kept before they are summed: 1 MiB


class Recorder:
    """Collects what the layer taps of one model see during a training step.

    Attributes:
        spec: the settings.
        iteration: number of the last finished training step.
        recorded: log names of the losses that this rank has recorded in this step.
        measuring: whether this step's routing and overlap are measured for the diagnostics.

    Args:
        num_experts: of each MoE layer.
        num_shares: ranks that share a micro-batch; the losses they record for it sum to its loss.
        groups: process groups to reduce over, one after another.
    """

    def __init__(
        self,
        spec: SpecConfig,
        num_experts: list[int],
        num_shares: int = 1,
        groups: Sequence = (),
        iteration: int = 0,
    ):
        self.spec = spec
        self._names = [loss.name for loss in spec.computed_losses]
        self._num_experts = num_experts
        self._num_shares = num_shares
        self._groups = groups
        self.begin_after(iteration)

    def begin_after(self, iteration: int) -> None:
        """Starts the step after ``iteration``, with nothing recorded."""
        self.iteration = iteration
        interval = self.spec.metrics_interval
        self.measuring = bool(interval) and (iteration + 1) % interval == 0
        self._device = current_device()
        # One row a loss: sum of its recorded values, and their number; on the device, and what the host knows of them.
        self._losses = torch.zeros(len(self._names), 2, dtype=torch.float64, device=self._device)
        self._known = [[0.0, 0.0] for _ in self._names]
        self._terms: dict[tuple[str, float], list[Tensor]] = {}
        self._num_terms = 0
        self.recorded: set[str] = set()
        self._layers: list[LayerStatistics] = []
        self._pairs: list[PairStatistics] = []
        if self.measuring:
            experts = self._num_experts
            self._layers = [LayerStatistics(n, self._device) for n in experts]
            self._pairs = [PairStatistics(n, m, self._device) for n, m in zip(experts, experts[1:])]

    @property
    def active(self) -> bool:
        return self.measuring or bool(self.spec.trained_losses)

    def wants(self, loss: Loss) -> bool:
        """Whether a loss is to be computed in this step."""
        return loss.coeff > 0 or (self.measuring and loss.measured)

    def measure_routing(self, layer: int, scores_TE: Tensor, active_TE: Tensor, num_tokens) -> None:
        if self.measuring:
            self._layers[layer].add_routing(scores_TE, active_TE, num_tokens)

    def measure_cosines(self, layer: int, cosines_TKK: Tensor, active_TK: Tensor) -> None:
        if self.measuring:
            self._layers[layer].add_cosines(cosines_TKK, active_TK)

    def measure_pair(self, layer: int, active_TE: Tensor, active_next_TE: Tensor) -> None:
        """Of ``layer`` and the next MoE layer."""
        if self.measuring:
            self._pairs[layer].add(active_TE, active_next_TE)

    def record_loss(self, name: str, value: Tensor, counts: Union[Tensor, bool]) -> None:
        """Records this rank's part of a loss of one layer (pair) and micro-batch; ``counts``: whether it has tokens."""
        index = self._names.index(name)
        entry = self._losses[index]
        if isinstance(counts, Tensor):
            entry[0] += value.detach() * counts
            entry[1] += 1.0 / self._num_shares * counts
        elif counts:
            entry[0] += value.detach()
            self._known[index][1] += 1.0 / self._num_shares
        self.recorded.add(name)

    def record_mean(
        self, name: str, terms: Tensor, routing: LayerRouting, factor: float = 1.0, offset: float = 0.0
    ) -> None:
        """Records offset + factor * the sum of ``terms`` / number of the micro-batch's tokens, see ``record_loss``.

        Where the number is known on the host, nothing is computed before the terms of many layers are there: operations
        on small tensors cost the time that they take to be launched.
        """
        if isinstance(routing.num_tokens, Tensor):
            self.record_loss(name, offset + factor * terms.detach().sum() / routing.divisor, routing.counts)
            return
        self.recorded.add(name)
        if not routing.counts:
            return
        known = self._known[self._names.index(name)]
        known[0] += offset
        known[1] += 1.0 / self._num_shares
        self._terms.setdefault((name, factor / routing.divisor), []).append(terms.detach().reshape(-1))
        self._num_terms += terms.numel()
        if self._num_terms > _MOST_TERMS:
            self._add_terms()

    def _add_terms(self) -> None:
        for (name, factor), waiting in self._terms.items():
            self._losses[self._names.index(name), 0] += torch.cat(waiting).sum(dtype=torch.float64) * factor
        self._terms.clear()
        self._num_terms = 0

    def losses(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Means over this step's micro-batches, layers (pairs) and ranks, and how many; scalars on the device.

        A mean of nothing is NaN. A loss that is off, and was not measured, is left out. A collective: every rank calls
        it, once a step.
        """
        self._add_terms()
        known = torch.tensor(self._known, dtype=torch.float64, device=self._device).view(-1, 2)
        totals = self._summed(self._losses + known)
        means = (totals[:, 0] / totals[:, 1]).float()
        wanted = {loss.name for loss in self.spec.computed_losses if self.wants(loss)}
        return {name: (mean, number) for name, mean, number in zip(self._names, means, totals[:, 1]) if name in wanted}

    def diagnostics(self) -> Optional[dict]:
        """The measures of this step, on every rank; None in a step that is not measured. A collective, too."""
        if not self.measuring:
            return None
        for layer in self._layers:
            layer.sums = self._summed(layer.sums)
            layer.largest_cosine = self._summed(layer.largest_cosine, dist.ReduceOp.MAX)
        for pair in self._pairs:
            pair.sums = self._summed(pair.sums)
        return {
            "layers": [{"layer": i, **layer.summary()} for i, layer in enumerate(self._layers)],
            "pairs": [
                {"layers": [i, i + 1], **pair.summary()} for i, pair in enumerate(self._pairs) if pair.sums.any()
            ],
        }

    def _summed(self, x: Tensor, operation=dist.ReduceOp.SUM) -> Tensor:
        x = x.clone()
        for group in self._groups:
            try:
                dist.all_reduce(x, op=operation, group=group)
            except RuntimeError as error:
                raise RuntimeError(
                    "the values to be logged could not be reduced: call metrics() on every rank of the model's process "
                    "groups, or give attach() the ranks that hold it, attach(model, config, group=...)"
                ) from error
        return x
