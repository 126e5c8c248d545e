"""Tap of the experts' activations z, before the down projection. Suffixes: P rows, F expert hidden size, H hidden size.

Weighted by the router's probability p, as Megatron multiplies what enters the down projection by it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from megatron_moe_spec.integration.compat.experts import expert_down_projections, weighted_swiglu_inputs
from megatron_moe_spec.integration.hooks.injection import replace_swiglu
from megatron_moe_spec.integration.taps.base import TappedLayer, TokensPerExpert
from megatron_moe_spec.integration.taps.expert_rows import RowsRun, RowsTap
from megatron_moe_spec.losses import RowsLoss


class ActivationsTap(RowsTap):
    """p z, at the input of the down projections; rows that travel do so while the last of these runs."""

    def __init__(self, losses: Sequence[RowsLoss], layer: TappedLayer):
        super().__init__(losses, layer, expert_down_projections(layer.module))

    def hooked(self) -> Iterator[tuple[str, Any, nn.Module]]:
        for found, hooked in zip(expert_down_projections(self.layer.module), self._projections):
            yield "linear_fc2", found, hooked

    def tap_activations(self, part: int, activations_PF: Tensor, tokens_per_expert: TokensPerExpert) -> Tensor:
        return self._take(part, activations_PF, tokens_per_expert)

    def _with_gradient(self, run: RowsRun, part: int, rows_PD: Tensor, kept_PD: Tensor) -> Tensor:
        """Megatron's node of the SwiGLU gives way to one that adds the gradient on its way, where that is possible."""
        compared = run.backward.rows
        if compared is not None:
            fits = compared.goes_through_swiglu
        else:  # they travel; a gradient of angles is orthogonal to the rows, so that it reaches no p by their lengths
            fits = run.used.fused and run.probs_TK is None
        inputs = weighted_swiglu_inputs(rows_PD) if fits and self._num_parts == 1 else None
        if inputs is None:
            return super()._with_gradient(run, part, rows_PD, kept_PD)
        return replace_swiglu(rows_PD, inputs, run.backward.swiglu_gradient, keeps=compared is None)
