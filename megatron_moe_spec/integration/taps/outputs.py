"""Tap of the experts' outputs y, after the down projection. Suffixes: P rows, D components of a row, H hidden size."""

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from megatron_moe_spec.integration.compat.experts import frees_expert_outputs
from megatron_moe_spec.integration.taps.expert_rows import RowsTap


class OutputsTap(RowsTap):
    """y = p x, at the output of the experts."""

    def _hook_rows(self) -> list[RemovableHandle]:
        return [self.hook_outputs()]

    def tap_outputs(self, outputs_PH: Tensor) -> Tensor:
        outputs_PH = self._take(0, outputs_PH, None)
        self._finish()  # nothing of the experts is left for the exchange to run beside
        return outputs_PH

    def _kept(self, rows_PD: Tensor) -> Tensor:
        return rows_PD.detach().clone() if frees_expert_outputs(self.layer.transformer_config) else rows_PD
