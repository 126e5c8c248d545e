"""Measures of routing and overlap of a training step, kept on the device and reduced over ranks once a step."""

from collections.abc import Callable, Sequence
from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe_spec.config import SpecConfig
from megatron_moe_spec.integration.step.clock import StepClock
from megatron_moe_spec.integration.step.losses import ReducedLosses, StepLosses, as_one, reduced
from megatron_moe_spec.losses.base import PAIRS
from megatron_moe_spec.metrics.accumulators import Count, LayerStatistics, PairStatistics, RouterStatistics, at_once
from megatron_moe_spec.parallel.collectives import current_device


class StepDiagnostics:
    """Collects what the taps of one model measure in a step; nothing in a step that is not measured.

    Layers are given by their index among the model's MoE layers; for the arguments, see ``StepLosses``.
    """

    def __init__(
        self,
        config: SpecConfig,
        clock: StepClock,
        layer_indices: Sequence[int],
        num_experts: int,
        top_k: int,
        tp_cp_group: Optional[dist.ProcessGroup] = None,
        groups: Sequence[dist.ProcessGroup] = (),
    ):
        self._names_of_pairs = {loss.name for loss in config.computed_losses if loss.reads == PAIRS}
        self._clock = clock
        self._layer_indices, self._num_experts, self._top_k = layer_indices, num_experts, top_k
        self._tp_cp_group, self._groups = tp_cp_group, groups
        self.begin_step()

    def begin_step(self) -> None:
        num_layers, num_experts = len(self._layer_indices) if self._clock.measuring else 0, self._num_experts
        self._device = current_device()
        self._layers = LayerStatistics(num_layers, num_experts, self._top_k, self._device)
        self._routers = RouterStatistics(num_layers, num_experts, self._device)
        self._pairs = PairStatistics(max(0, num_layers - 1), num_experts, self._device)

    def measure_routing(
        self, layer: int, scores_TE: Tensor, active_TE: Tensor, num_tokens: Count, when: Callable = at_once
    ) -> None:
        """Of one micro-batch; ``when`` it counts, here and below, see ``Notes.add``."""
        if self._clock.measuring:
            self._layers.add_routing(layer, scores_TE, active_TE, num_tokens, when)

    def measure_cosines(self, layer: int, cosines_TKK: Tensor, active_TK: Tensor, when: Callable = at_once) -> None:
        if self._clock.measuring:
            self._layers.add_cosines(layer, cosines_TKK, active_TK, when)

    def measure_router(self, layer: int, weight_EH: Tensor) -> None:
        """Once, when the step has ended."""
        if self._clock.measuring:
            self._routers.add(layer, weight_EH)

    def measure_pair(self, layer: int, active_TE: Tensor, active_next_TE: Tensor, when: Callable = at_once) -> None:
        """Of ``layer`` and the next MoE layer."""
        if self._clock.measuring:
            self._pairs.add(layer, active_TE, active_next_TE, when)

    def reduce(self, losses: StepLosses) -> tuple[ReducedLosses, Optional[dict]]:
        """The losses of this step and its measures, each layer's with its losses; None if it is not measured.

        A collective. Where a step is measured: an all-reduce of each operation over each group and one copy to the
        host, whatever the number of layers.
        """
        if not self._clock.measuring:
            return losses.reduce(), None
        layers, routers, pairs = self._layers, self._routers, self._pairs
        self._add_violations()
        routers.add_up()
        loss_sums, layers.sums, routers.sums, pairs.sums = reduced(
            [losses.sums(), layers.sums, routers.sums, pairs.sums], self._groups
        )
        (layers.largest_cosines,) = reduced([layers.largest_cosines], self._groups, dist.ReduceOp.MAX)
        loss_sums_on_host, layers.sums, layers.largest_cosines, routers.sums, of_pairs = as_one(
            Tensor.cpu, [loss_sums, layers.sums, layers.largest_cosines, routers.sums, pairs.measures()]
        )
        reduced_losses = losses.of_sums(loss_sums, loss_sums_on_host)
        return reduced_losses, self._rows(reduced_losses, pairs.summaries(of_pairs))

    def _rows(self, losses: ReducedLosses, pair_summaries: list[dict]) -> dict:
        summaries = zip(self._layer_indices, self._layers.summaries(), self._routers.summaries())
        layers: list[dict] = [
            {"layer": i, "layer_index": layer_index, **layer, **router}
            for i, (layer_index, layer, router) in enumerate(summaries)
        ]
        pairs: list[dict] = [{"layers": [i, i + 1], **pair} for i, pair in enumerate(pair_summaries)]
        for name, values in losses.of_layers.items():
            for layer_index, row in zip(self._layer_indices, pairs if name in self._names_of_pairs else layers):
                row[name] = values.get(layer_index)
        return {"layers": layers, "pairs": [row for row, pair in zip(pairs, pair_summaries) if pair]}

    def _add_violations(self) -> None:
        """Of micro-batches, which the ranks of a group share: in a layer where these do not have the same number of
        them, since one was left out on some ranks alone, there is none."""
        loads, group = self._layers.loads, self._tp_cp_group
        numbers, num_ranks = list(map(len, loads)), 1 if group is None else group.size()
        groups = [] if group is None or num_ranks == 1 else [group]
        if groups:
            known = torch.tensor([numbers, [-number for number in numbers]], device=self._device)
            (known,) = reduced([known], groups, dist.ReduceOp.MAX)
            numbers = [most if most == -least else 0 for most, least in zip(*known.tolist())]
        counted = [layer for layer, number in enumerate(numbers) if number]
        if not counted:
            return
        # Filled up by micro-batches without tokens, which count for nothing.
        nothing, most = torch.zeros_like(loads[counted[0]][0]), max(numbers)
        filled = [load for layer in counted for load in loads[layer] + [nothing] * (most - numbers[layer])]
        (loads_LME,) = reduced([torch.stack(filled).view(len(counted), most, -1)], groups)
        self._layers.add_violations(counted, loads_LME, share=1.0 / num_ranks)
