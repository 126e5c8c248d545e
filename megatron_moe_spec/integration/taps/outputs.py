"""Tap of the experts' outputs y, after the down projection. Suffixes: P rows, D components of a row, H hidden size."""

from torch import Tensor

from megatron_moe_spec.integration.compat.experts import frees_expert_outputs
from megatron_moe_spec.integration.taps.expert_rows import RowsTap


class OutputsTap(RowsTap):
    """y = p x, at the output of the experts."""

    def tap_outputs(self, outputs_PH: Tensor) -> Tensor:
        return super().tap_outputs(self._take(0, outputs_PH, None))

    def _kept(self, rows_PD: Tensor) -> Tensor:
        return rows_PD.detach().clone() if frees_expert_outputs(self.layer.transformer_config) else rows_PD
