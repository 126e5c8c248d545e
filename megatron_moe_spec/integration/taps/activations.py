"""Tap of the experts' activations z, before the down projection. Suffixes: P rows, F expert hidden size, H hidden size.

Weighted by the router's probability p, as Megatron multiplies what enters the down projection by it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megatron_moe_spec.integration.compat.experts import (
    describe_down_projections,
    expert_down_projections,
    keeps_quantized_rows,
    weighted_swiglu_inputs,
)
from megatron_moe_spec.integration.hooks.injection import replace_swiglu
from megatron_moe_spec.integration.support.remedies import without_op_fuser
from megatron_moe_spec.integration.taps.base import ModelFacts, TokensPerExpert
from megatron_moe_spec.integration.taps.expert_rows import RowsTap
from megatron_moe_spec.integration.taps.row_runs import RowsBackward
from megatron_moe_spec.losses import RowsLoss


class ActivationsTap(RowsTap):
    """p z, at the input of the down projections; rows that travel do so while the last of these runs."""

    title = "activation"

    def _hook_rows(self) -> list[RemovableHandle]:
        self._projections = expert_down_projections(self.layer.module)
        self._num_parts = len(self._projections)
        return [*map(self.hook_activations, range(self._num_parts), self._projections), self.hook_outputs()]

    def hooked(self) -> Iterator[tuple[str, Any, nn.Module]]:
        for found, hooked in zip(expert_down_projections(self.layer.module), self._projections):
            yield "linear_fc2", found, hooked

    def tap_activations(self, part: int, activations_PF: Tensor, tokens_per_expert: TokensPerExpert) -> Tensor:
        return self._take(part, activations_PF, tokens_per_expert)

    def tap_outputs(self, outputs_PH: Tensor) -> Tensor:
        self._finish()
        return outputs_PH

    def _with_gradient(self, backward: RowsBackward, part: int, rows_PD: Tensor, kept_PD: Tensor) -> Tensor:
        """Megatron's node of the SwiGLU gives way to one that adds the gradient on its way, where that is possible."""
        fits = self._num_parts == 1 and backward.rows is not None and backward.rows.goes_through_swiglu
        inputs = weighted_swiglu_inputs(rows_PD) if fits else None
        if inputs is None:
            return super()._with_gradient(backward, part, rows_PD, kept_PD)
        return replace_swiglu(rows_PD, inputs, backward.swiglu_gradient)

    @classmethod
    def describe(cls, losses: Sequence[RowsLoss], model: ModelFacts) -> Iterator[tuple[str, str]]:
        yield from super().describe(losses, model)
        if keeps_quantized_rows(model.transformer_config):
            size = 2 * model.transformer_config.moe_router_topk * model.transformer_config.moe_ffn_hidden_size
            yield (
                "kept until backward",
                f"{size // model.expert_tensor_size} bytes a token and layer, beside the rows as they are quantized "
                "(none with --recompute-granularity selective --recompute-modules moe_act)",
            )

    @classmethod
    def _place(cls, transformer_config: Any) -> str:
        return describe_down_projections(transformer_config)

    @classmethod
    def problems(cls, losses: Sequence[RowsLoss], model: ModelFacts) -> Iterator[str]:
        yield from super().problems(losses, model)
        if getattr(model.transformer_config, "use_transformer_engine_op_fuser", False):
            names, off = " and ".join(loss.title for loss in losses), ", ".join(loss.off for loss in losses)
            yield (
                f"the fused experts do not hand out the activations for {names} "
                f"({without_op_fuser(model.transformer_config)}, or set {off})"
            )
        if model.expert_tensor_size > model.tensor_size:
            yield (
                f"{losses[0].title} needs experts to be split over ranks that share their tokens: "
                f"--expert-tensor-parallel-size {model.expert_tensor_size} is larger than "
                f"--tensor-model-parallel-size {model.tensor_size}"
            )
