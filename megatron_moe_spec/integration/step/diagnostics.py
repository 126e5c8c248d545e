"""Measures of routing and overlap of a training step, kept on the device and reduced over ranks once a step."""

from collections.abc import Callable, Sequence
from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe_spec.config import SpecConfig
from megatron_moe_spec.integration.step.clock import StepClock
from megatron_moe_spec.integration.step.losses import ReducedLosses, reduced
from megatron_moe_spec.losses.base import PAIRS
from megatron_moe_spec.metrics.accumulators import Count, LayerStatistics, PairStatistics, RouterStatistics, at_once
from megatron_moe_spec.parallel.collectives import all_reduce_max, all_reduce_sum, current_device


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
        self._layers: list[LayerStatistics] = []
        self._routers: list[RouterStatistics] = []
        self._pairs: list[PairStatistics] = []
        if self._clock.measuring:
            num_layers, num_experts, self._device = len(self._layer_indices), self._num_experts, current_device()
            self._layers = [LayerStatistics(num_experts, self._top_k, self._device) for _ in range(num_layers)]
            self._routers = [RouterStatistics(num_experts, self._device) for _ in range(num_layers)]
            self._pairs = [PairStatistics(num_experts, num_experts, self._device) for _ in range(num_layers - 1)]

    def measure_routing(
        self, layer: int, scores_TE: Tensor, active_TE: Tensor, num_tokens: Count, when: Callable = at_once
    ) -> None:
        """Of one micro-batch; ``when`` it counts, here and below, see ``Notes.add``."""
        if self._clock.measuring:
            self._layers[layer].add_routing(scores_TE, active_TE, num_tokens, when)

    def measure_cosines(self, layer: int, cosines_TKK: Tensor, active_TK: Tensor, when: Callable = at_once) -> None:
        if self._clock.measuring:
            self._layers[layer].add_cosines(cosines_TKK, active_TK, when)

    def measure_router(self, layer: int, weight_EH: Tensor) -> None:
        """Once, when the step has ended."""
        if self._clock.measuring:
            self._routers[layer].add(weight_EH)

    def measure_pair(self, layer: int, active_TE: Tensor, active_next_TE: Tensor, when: Callable = at_once) -> None:
        """Of ``layer`` and the next MoE layer."""
        if self._clock.measuring:
            self._pairs[layer].add(active_TE, active_next_TE, when)

    def reduce(self, losses: ReducedLosses) -> Optional[dict]:
        """The measures of this step, on every rank, each layer's with its ``losses``; None if it is not measured.

        A collective in a step that is measured. Synchronises with the device.
        """
        if not self._clock.measuring:
            return None
        self._add_violations()
        for layer in self._layers:
            layer.sums = reduced(layer.sums, self._groups)
            layer.largest_cosine = reduced(layer.largest_cosine, self._groups, dist.ReduceOp.MAX)
        for router in self._routers:
            router.sums = reduced(router.sums, self._groups)
        for pair in self._pairs:
            pair.sums = reduced(pair.sums, self._groups)
        layers: list[dict] = [
            {"layer": i, "layer_index": layer_index, **layer.summary(), **router.summary()}
            for i, (layer_index, layer, router) in enumerate(zip(self._layer_indices, self._layers, self._routers))
        ]
        pairs: list[dict] = [{"layers": [i, i + 1], **pair.summary()} for i, pair in enumerate(self._pairs)]
        for name, values in losses.of_layers.items():
            for layer_index, row in zip(self._layer_indices, pairs if name in self._names_of_pairs else layers):
                row[name] = values.get(layer_index)
        return {"layers": layers, "pairs": [row for row, pair in zip(pairs, self._pairs) if pair.sums.any()]}

    def _add_violations(self) -> None:
        """Of micro-batches, which the ranks of a group share: in a layer where these do not have the same number of
        them, since one was left out on some ranks alone, there is none."""
        numbers = torch.tensor([len(layer.loads) for layer in self._layers], device=self._device)
        share = 1.0
        if self._tp_cp_group is not None:
            share /= self._tp_cp_group.size()
            most, least = all_reduce_max(torch.stack([numbers, -numbers]), self._tp_cp_group)
            numbers = torch.where(most == -least, numbers, 0)
        for layer, number in zip(self._layers, numbers.tolist(), strict=True):
            if number:
                loads = torch.stack(layer.loads)
                if self._tp_cp_group is not None:
                    loads = all_reduce_sum(loads, self._tp_cp_group)
                layer.add_violations(loads, share)
