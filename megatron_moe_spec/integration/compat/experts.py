"""The experts of an MoE layer: their linear layers, and their weights' gradients."""

import functools
from typing import Any, Optional

import torch
from torch import Tensor, nn

from megatron_moe_spec.integration.compat.assumed import has_transformer_engine
from megatron_moe_spec.integration.compat.models import unwrapped
from megatron_moe_spec.integration.compat.protocols import MoELayer, TransformerConfig


def expert_down_projections(moe_layer: MoELayer) -> list[nn.Module]:
    """The modules whose input is z: one ``linear_fc2`` for all local experts, or one for each.

    Empty for the legacy GroupedMLP, which has no such module.
    """
    experts = unwrapped(moe_layer.experts)
    if hasattr(experts, "local_experts"):
        return [expert.linear_fc2 for expert in experts.local_experts]
    return [experts.linear_fc2] if hasattr(experts, "linear_fc2") else []


def weighted_swiglu_inputs(z: Tensor) -> Optional[tuple[Tensor, Tensor]]:
    """y [P, 2 F] and probabilities [P] or [P, 1] that Megatron's fused SwiGLU made z [P, F] of.

    None unless z is the very output of that function, and its inputs are kept as they were until backward: not where
    they are stored in fp8, or packed by hooks (offloading, checkpoints), or computed again.
    """
    node = z.grad_fn
    if getattr(node, "_forward_cls", None) is not _weighted_swiglu() or getattr(node, "fp8_input_store", True):
        return None
    # Not even looked at where they are hooked, or would be: that alone would load or compute them.
    hooked = [saved for saved in node._raw_saved_tensors if getattr(saved, "unpack_hook", True) is not None]
    if hooked or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None
    inputs = node.saved_tensors
    if len(inputs) != 2:
        return None
    y, probs = inputs
    if z.dim() != 2 or y.dtype != z.dtype:
        return None
    num_rows, size = z.shape
    fits = y.shape == (num_rows, 2 * size) and probs.shape in ((num_rows,), (num_rows, 1))
    return (y, probs) if fits else None


@functools.cache  # asked for by every layer
def _weighted_swiglu() -> Any:
    from megatron.core.fusions.fused_bias_swiglu import WeightedSwiGLUFunction

    return WeightedSwiGLUFunction


def expert_first_weights(moe_layer: MoELayer) -> list[Tensor]:
    """``linear_fc1``'s weight [2 F, H] of every local expert; empty where there is no such weight for each."""
    experts = unwrapped(moe_layer.experts)
    if hasattr(experts, "local_experts"):
        weights = [getattr(unwrapped(expert.linear_fc1), "weight", None) for expert in experts.local_experts]
    else:
        linear = unwrapped(experts.linear_fc1) if hasattr(experts, "linear_fc1") else None
        weights = [getattr(linear, f"weight{i}", None) for i in range(moe_layer.num_local_experts)]
    return [] if any(weight is None for weight in weights) else weights


def has_adapted_weights(moe_layer: MoELayer) -> bool:
    """Whether adapters were put around the router, or around what reads the experts' first weights."""
    experts = unwrapped(moe_layer.experts)
    owners = getattr(experts, "local_experts", [experts])
    modules = [moe_layer.router, *(getattr(owner, "linear_fc1", None) for owner in owners)]
    return any(module is not None and has_adapter(module) for module in modules)


def has_adapter(module: nn.Module) -> bool:
    """Whether an adapter was put around a module."""
    return unwrapped(module) is not module


def describe_down_projections(transformer_config: TransformerConfig) -> str:
    """Whose input z is, by the flags; transformer-engine has the module of all local experts."""
    wanted = transformer_config.moe_grouped_gemm and transformer_config.transformer_impl != "local"
    if wanted and has_transformer_engine():
        return "input of linear_fc2 of all local experts (TEGroupedMLP)"
    why = " for want of transformer-engine" if wanted else ""
    return f"input of each local expert's linear_fc2 (SequentialMLP{why})"


def frees_expert_outputs(transformer_config: TransformerConfig) -> bool:
    """Whether the schedule frees what it combines once it is sent; with some dispatchers, the experts' own outputs."""
    return getattr(transformer_config, "overlap_moe_expert_parallel_comm", False)


def keeps_quantized_rows(transformer_config: TransformerConfig) -> bool:
    """Whether backward needs the input of ``linear_fc2`` only as it was quantized, by a model's settings."""
    if not (getattr(transformer_config, "fp8", None) or getattr(transformer_config, "fp4", None)):
        return False
    if transformer_config.recompute_granularity == "full":
        return False
    recomputed = transformer_config.recompute_granularity == "selective" and transformer_config.recompute_modules
    return not {"moe", "moe_act"} & set(recomputed or ())


def gate_rows(moe_layer: MoELayer, weight: Tensor) -> Tensor:
    """The rows of an expert's ``linear_fc1`` weight [2 F, H] that make its gate, as a view [..., H] of F rows.

    They are its first half, or every other block of rows where TEGroupedMLP interleaves gate and linear units.
    """
    size = getattr(moe_layer.config, "moe_mlp_glu_interleave_size", None)
    if size is None or hasattr(unwrapped(moe_layer.experts), "local_experts"):
        size = len(weight) // 2
    return weight.view(-1, 2, size, weight.shape[-1])[:, 0]


def adds_to_main_gradient(transformer_config: TransformerConfig) -> bool:
    """Whether linear layers write their weight's gradient into ``main_grad``, past ``Tensor.grad``."""
    return transformer_config.gradient_accumulation_fusion
