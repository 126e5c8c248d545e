"""MoE layers of Megatron-Core in one process, with experts that compute as they would in training.

Where Transformer Engine is missing, in Megatron's eyes, TEGroupedMLP is built on linears over torch's grouped matrix
product.
"""

import sys
from functools import partial

ON_CPU = "--smoke" in sys.argv
if ON_CPU:
    # Megatron binds names of torch when it is imported: this has to come first.
    from megatron_moe_spec.cpu import enable

    enable()

import torch  # noqa: E402
from common import Shape  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.extensions.transformer_engine import HAVE_TE as HAS_TRANSFORMER_ENGINE  # noqa: E402
from megatron.core.models.backends import LocalSpecProvider  # noqa: E402
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.moe import experts  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec, build_module  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

DTYPE = torch.float32 if ON_CPU else torch.bfloat16


class GroupedLinear(torch.nn.Module):
    """The linear layers of all experts as one grouped matrix product; what TEGroupedMLP asks of its linears."""

    def __init__(self, num_gemms, input_size, output_size, *, config, init_method, bias, **others):
        super().__init__()
        assert not bias
        weight = torch.empty(num_gemms, output_size, input_size, dtype=config.params_dtype, device="cuda")
        self.weight = torch.nn.Parameter(weight.normal_(std=input_size**-0.5))

    def forward(self, x, m_splits):
        if ON_CPU:
            parts = x.split([int(split) for split in m_splits])
            return torch.cat([part @ weight.T for part, weight in zip(parts, self.weight)]), None
        ends = torch.as_tensor(m_splits, device=x.device).cumsum(0).to(torch.int32)
        return torch._grouped_mm(x, self.weight.transpose(1, 2), offs=ends), None


def use_grouped_linear(linear: type[torch.nn.Module] = GroupedLinear) -> None:
    """Has Megatron's local specs build TEGroupedMLP of these layers."""

    def grouped_mlp_modules(self, moe_use_grouped_gemm, *legacy):
        if hasattr(experts, "GroupedMLPSubmodules"):
            submodules = experts.GroupedMLPSubmodules(linear_fc1=linear, linear_fc2=linear)
            return partial(experts.TEGroupedMLP, submodules=submodules)
        return experts.TEGroupedMLP, experts.MLPSubmodules(linear_fc1=linear, linear_fc2=linear)

    LocalSpecProvider.grouped_mlp_modules = grouped_mlp_modules


def initialize() -> None:
    """A Megatron job of this one process."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo" if ON_CPU else "nccl", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    if not HAS_TRANSFORMER_ENGINE:
        use_grouped_linear()


def model_config(num_layers, hidden_size, ffn_size, num_experts, top_k, **others) -> TransformerConfig:
    """An MoE in every layer, as it would be in training: grouped gated experts, load balancing, fp32 routing, bf16."""
    return TransformerConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=ffn_size,
        moe_ffn_hidden_size=ffn_size,
        num_moe_experts=num_experts,
        moe_router_topk=top_k,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=1e-2,
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=True,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=not ON_CPU,
        add_bias_linear=False,
        gradient_accumulation_fusion=False,
        bf16=not ON_CPU,
        params_dtype=DTYPE,
        **others,
    )


class Layers(torch.nn.Module):
    """MoE layers one after the other, each with a residual connection; hidden states [tokens, 1, hidden]."""

    def __init__(self, shape: Shape, number: int):
        super().__init__()
        config = model_config(
            number,
            shape.hidden,
            shape.ffn,
            shape.experts,
            shape.top_k,
            num_attention_heads=1,
            moe_router_score_function=shape.score_function,
        )
        spec = get_moe_module_spec(HAS_TRANSFORMER_ENGINE, num_experts=shape.experts, moe_grouped_gemm=True)
        self.config = config
        # A ModuleSpec, or from 0.19 on a partial application of the class.
        build = partial(build_module, spec) if isinstance(spec, ModuleSpec) else spec
        self.layers = torch.nn.ModuleList(build(config=config, layer_number=i + 1) for i in range(number))
        self.to("cuda")

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)[0]
        return x
