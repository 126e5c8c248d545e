"""Padding of the experts' rows as for quantized matrix products, without the products being quantized.

Import only after the CPU backend is enabled.
"""

import contextlib

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer import transformer_block
from megatron.core.transformer.moe import experts, moe_layer, moe_utils, token_dispatcher

try:
    from megatron.core import recompute
except ImportError:  # before 0.19
    recompute = transformer_block

SIZE = 8
_CALLERS_OF_TE_CHECKPOINT = recompute, moe_layer
_get_fp8_context = transformer_block.get_fp8_context


class PadRows(torch.nn.Module):
    """As Transformer Engine's Fp8Padding: zeros after each expert's rows, up to a multiple of a size."""

    def forward(self, x, splits):
        padded = [-(-rows // SIZE) * SIZE for rows in splits]
        parts = zip(x.split(list(splits)), padded)
        return torch.cat([torch.nn.functional.pad(part, (0, 0, 0, rows - len(part))) for part, rows in parts]), padded


class UnpadRows(torch.nn.Module):
    """As Fp8Unpadding."""

    def forward(self, x, splits):
        padded = [-(-rows // SIZE) * SIZE for rows in splits]
        return torch.cat([part[:rows] for part, rows in zip(x.split(padded), splits)])


def pad_rows(chunks, where: str) -> None:
    """Has Megatron take a model's experts for quantized: it pads their rows.

    Args:
        where: "experts", which HybridEP does in their place; "router": by tokens that are added to its map, in place;
            "router, fused": as by Megatron's kernel, which leaves the router's map as it is.
    """
    for module in (experts, token_dispatcher):
        module.get_align_size_for_quantization = lambda config: SIZE
    for module in _CALLERS_OF_TE_CHECKPOINT:
        module.te_checkpoint = _checkpoint
    transformer_block.get_fp8_context = _fp8_context
    for module in (module for chunk in chunks for module in chunk.modules()):
        if isinstance(module, experts.TEGroupedMLP):
            module.quantization_padding, module.quantization_unpadding = PadRows(), UnpadRows()
    # Set on a model that exists: to build one, Megatron asks for Transformer Engine.
    for chunk in chunks:
        chunk.config.fp8, chunk.config.fp8_recipe, chunk.config.pads_alone = "e4m3", "blockwise", True
        chunk.config.moe_router_padding_for_quantization = where.startswith("router")
    token_dispatcher.pad_routing_map = _pad_a_copy if where == "router, fused" else moe_utils.pad_routing_map


def _pad_a_copy(routing_map, pad_multiple):
    return moe_utils.pad_routing_map(routing_map.clone(), pad_multiple)


def _fp8_context(config, *args, **kwargs):
    return contextlib.nullcontext() if hasattr(config, "pads_alone") else _get_fp8_context(config, *args, **kwargs)


def _checkpoint(function, distribute_saved_activations, tracker, group, *args):
    return tensor_parallel.checkpoint(function, distribute_saved_activations, *args)
