"""Values of the losses and measures of a training step, kept on the device and reduced over ranks once a step."""

from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe_spec.config import LOSS_NAMES, SpecConfig
from megatron_moe_spec.integration.compat import current_device
from megatron_moe_spec.metrics.accumulators import LayerStatistics, PairStatistics

MEASURED_LOSSES = ("specialization_loss", "coupling_loss")


class Recorder:
    """Collects what the layer taps of one model see during a training step.

    Attributes:
        config: the settings.
        iteration: number of the last finished training step.
        measuring: whether this step's routing and overlap are measured for the diagnostics.

    Args:
        num_experts: of each MoE layer.
        num_shares: ranks that share a micro-batch; the losses they record for it sum to its loss.
    """

    def __init__(self, config: SpecConfig, num_experts: list[int], num_shares: int = 1, iteration: int = 0):
        self.config = config
        self._num_experts = num_experts
        self._num_shares = num_shares
        self.begin_after(iteration)

    def begin_after(self, iteration: int) -> None:
        """Starts the step after ``iteration``, with nothing recorded."""
        self.iteration = iteration
        interval = self.config.metrics_interval
        self.measuring = bool(interval) and (iteration + 1) % interval == 0
        self._device = current_device()
        # One row a loss: sum of its recorded values, and their number.
        self._losses = torch.zeros(len(LOSS_NAMES), 2, dtype=torch.float64, device=self._device)
        self._layers: list[LayerStatistics] = []
        self._pairs: list[PairStatistics] = []
        if self.measuring:
            experts = self._num_experts
            self._layers = [LayerStatistics(n, self._device) for n in experts]
            self._pairs = [PairStatistics(n, m, self._device) for n, m in zip(experts, experts[1:])]

    @property
    def active(self) -> bool:
        return self.measuring or bool(self.config.trained_losses)

    @property
    def wants_specialization(self) -> bool:
        return self.measuring or self.config.specialization_loss_coeff > 0

    @property
    def wants_coupling(self) -> bool:
        return self.measuring or self.config.coupling_loss_coeff > 0

    def record_routing(self, layer: int, scores: Tensor, live: Tensor, num_tokens) -> None:
        if self.measuring:
            self._layers[layer].add_routing(scores, live, num_tokens)

    def record_pair(self, layer: int, live: Tensor, live_next: Tensor, loss: Tensor) -> None:
        """Records the coupling of ``layer`` and the next MoE layer."""
        self.record_loss("coupling_loss", loss)
        if self.measuring:
            self._pairs[layer].add(live, live_next)

    def record_cosines(self, layer: int, cosines: Tensor, valid: Tensor, loss: Tensor) -> None:
        self.record_loss("specialization_loss", loss)
        if self.measuring:
            self._layers[layer].add_cosines(cosines, valid)

    def record_loss(self, name: str, value: Tensor) -> None:
        """Records this rank's part of a loss of one layer (pair) and micro-batch."""
        entry = self._losses[LOSS_NAMES.index(name)]
        entry[0] += value.detach()
        entry[1] += 1.0 / self._num_shares

    def losses(self) -> dict[str, Tensor]:
        """Means over this step's micro-batches, layers (pairs) and ranks; scalars on the device.

        A collective: every rank calls it, once a step. A loss that is off, and was not measured, is left out.
        """
        totals = self._losses.clone()
        if dist.is_initialized():
            dist.all_reduce(totals)
        means = (totals[:, 0] / totals[:, 1].clamp_min(1.0)).float()
        wanted = {*self.config.trained_losses, *(MEASURED_LOSSES if self.measuring else ())}
        return {name: mean for name, mean in zip(LOSS_NAMES, means) if name in wanted}

    def diagnostics(self) -> Optional[dict]:
        """The measures of this step, on every rank; None in a step that is not measured. A collective, too."""
        if not self.measuring:
            return None
        if dist.is_initialized():
            for statistics in (*self._layers, *self._pairs):
                dist.all_reduce(statistics.sums)
            for layer in self._layers:
                dist.all_reduce(layer.largest_cosine, op=dist.ReduceOp.MAX)
        return {
            "layers": [{"layer": i, **layer.summary()} for i, layer in enumerate(self._layers)],
            "pairs": [
                {"layers": [i, i + 1], **pair.summary()} for i, pair in enumerate(self._pairs) if pair.sums.any()
            ],
        }
