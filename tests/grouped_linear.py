"""Plain-torch stand-in for transformer-engine's GroupedLinear, so that Megatron's own TEGroupedMLP runs on CPU."""

import inspect
from functools import partial

import torch
import torch.nn.functional as F


class TorchGroupedLinear(torch.nn.Module):
    """One linear layer for each expert, applied to consecutive blocks of rows; expert tensor parallel size 1."""

    def __init__(self, num_gemms, input_size, output_size, *, config, bias, **kwargs):
        super().__init__()
        assert not bias, "the stand-in has no bias"
        self.num_gemms = num_gemms
        for expert in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
            weight.allreduce = False  # as Megatron marks expert weights
            self.register_parameter(f"weight{expert}", weight)

    def forward(self, x, m_splits):
        parts = torch.split(x, [int(rows) for rows in m_splits])
        return torch.cat([F.linear(part, getattr(self, f"weight{i}")) for i, part in enumerate(parts)]), None


def use_torch_grouped_linear() -> None:
    """Makes the local layer specs build TEGroupedMLP where moe_grouped_gemm is set. Imports Megatron."""
    from megatron.core.models import backends
    from megatron.core.transformer.moe import experts

    provider = backends.LocalSpecProvider
    original = provider.grouped_mlp_modules

    def grouped_mlp_modules(self, moe_use_grouped_gemm, *args):
        if not moe_use_grouped_gemm:
            return original(self, moe_use_grouped_gemm, *args)
        linears = dict(linear_fc1=TorchGroupedLinear, linear_fc2=TorchGroupedLinear)
        if "moe_use_legacy_grouped_gemm" in inspect.signature(original).parameters:  # 0.16
            return experts.TEGroupedMLP, experts.MLPSubmodules(**linears)
        return partial(experts.TEGroupedMLP, submodules=experts.GroupedMLPSubmodules(**linears))

    provider.grouped_mlp_modules = grouped_mlp_modules
