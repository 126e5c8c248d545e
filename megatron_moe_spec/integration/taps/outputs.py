"""Tap of the experts' outputs y, after the down projection. Suffixes: P rows, D components of a row, H hidden size."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from megatron_moe_spec.integration.compat.experts import frees_expert_outputs
from megatron_moe_spec.integration.taps.base import ModelFacts
from megatron_moe_spec.integration.taps.expert_rows import RowsTap
from megatron_moe_spec.losses import RowsLoss


class OutputsTap(RowsTap):
    """y = p x, at the output of the experts."""

    title = "output"

    def _hook_rows(self) -> list[RemovableHandle]:
        return [self.hook_outputs()]

    def tap_outputs(self, outputs_PH: Tensor) -> Tensor:
        outputs_PH = self._take(0, outputs_PH, None)
        self._finish()  # nothing of the experts is left for the exchange to run beside
        return outputs_PH

    def _kept(self, rows_PD: Tensor) -> Tensor:
        return rows_PD.detach().clone() if frees_expert_outputs(self.layer.transformer_config) else rows_PD

    @classmethod
    def _place(cls, transformer_config: Any) -> str:
        return "output of a layer's experts"

    @classmethod
    def problems(cls, losses: Sequence[RowsLoss], model: ModelFacts) -> Iterator[str]:
        yield from super().problems(losses, model)
        if model.expert_tensor_size > 1:
            yield (
                f"{losses[0].title} needs whole expert outputs, of which expert tensor parallelism leaves a rank one "
                f"summand (--expert-tensor-parallel-size is {model.expert_tensor_size}; set it to 1)"
            )
