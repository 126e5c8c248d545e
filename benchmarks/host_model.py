"""MoE layers of Megatron-Core whose host time is what it would be on a GPU, on tiny tensors in the host's memory.

To be imported after ``null_driver.install()``, and with the checkout that is to be measured first on ``sys.path``.
What differs from a GPU run stands in this file: the experts, the groups of ranks, and ``as_on_gpu``.
"""

import sys
from functools import partial
from importlib import import_module
from types import ModuleType

from megatron_moe_spec.cpu import devices, enable

enable()  # Megatron binds names of torch when it is imported: this has to come first

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec  # noqa: E402
from megatron.core.tensor_parallel import mappings  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.moe import token_dispatcher  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec, build_module  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from moe import use_grouped_linear  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

TOKENS, HIDDEN, FFN = 8, 16, 16


class GroupedLinear(torch.nn.Module):
    """One matrix product for all experts, whatever their number, as a grouped kernel is one launch."""

    def __init__(self, num_gemms, input_size, output_size, *, config, init_method, bias, **others):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(output_size, input_size) * input_size**-0.5)

    def forward(self, x, m_splits):
        return torch.nn.functional.linear(x, self.weight), None


class Layers(torch.nn.Module):
    """MoE layers one after the other, each with a residual connection; hidden states [TOKENS, 1, HIDDEN].

    Args:
        recompute: whether each layer is checkpointed whole, as by full recomputation of one layer at a time.
        fields: further ones of TransformerConfig.
    """

    def __init__(self, number: int, num_experts: int, top_k: int, recompute: bool, **fields):
        super().__init__()
        self.config = _config(number, num_experts, top_k, **fields)
        self.recompute = recompute
        spec = get_moe_module_spec(False, num_experts=num_experts, moe_grouped_gemm=True)
        # A ModuleSpec, or from 0.19 on a partial application of the class.
        build = partial(build_module, spec) if isinstance(spec, ModuleSpec) else spec
        self.layers = torch.nn.ModuleList(build(config=self.config, layer_number=i + 1) for i in range(number))

    def forward(self, x):
        for layer in self.layers:
            if self.recompute:
                x = x + tensor_parallel.checkpoint(lambda hidden, layer=layer: layer(hidden)[0], False, x)
            else:
                x = x + layer(x)[0]
        return x


def _config(num_layers: int, num_experts: int, top_k: int, **fields) -> TransformerConfig:
    return TransformerConfig(
        num_layers=num_layers,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        moe_ffn_hidden_size=FFN,
        num_attention_heads=1,
        num_moe_experts=num_experts,
        moe_router_topk=top_k,
        moe_router_load_balancing_type="aux_loss",
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=True,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=True,
        add_bias_linear=False,
        gradient_accumulation_fusion=False,
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        **fields,
    )


def initialize(expert_parallel: int) -> None:
    """Makes this process rank 0 of a Megatron job of ``expert_parallel`` ranks; the others do not exist."""
    if expert_parallel == 1:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=expert_parallel)
        _gather_copies()
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=expert_parallel, create_gloo_process_groups=False
    )
    model_parallel_cuda_manual_seed(1)
    experts_as_one_product()


def _gather_copies() -> None:
    # The fake backend leaves what it would receive as it was allocated; numbers of rows have to be some, and to fit.
    name = next(name for name in ("dist_all_gather_func", "_all_gather_base") if hasattr(mappings, name))
    gather = getattr(mappings, name)

    def all_gather_into_tensor(output, input, group=None, async_op=False):
        work = gather(output, input, group=group, async_op=async_op)
        output.view(-1, input.numel()).copy_(input.reshape(1, -1).expand(output.numel() // input.numel(), -1))
        return work

    setattr(mappings, name, all_gather_into_tensor)


def experts_as_one_product() -> None:
    """Has the local specs build TEGroupedMLP of ``GroupedLinear``, and rows sorted by expert as one kernel does it."""
    use_grouped_linear(GroupedLinear)
    # Not by a split into as many parts as there are experts: Transformer Engine has a kernel. Their order is of no
    # effect here, as all rows meet the same weight.
    token_dispatcher.sort_chunks_by_idxs = lambda input, split_sizes, sorted_idxs, probs=None, fused=False: (
        input.clone(),
        None if probs is None else probs.clone(),
    )


def as_on_gpu() -> None:
    """Makes what runs in each micro-batch what runs on a GPU: to be called before losses are attached.

    The kernels are taken for available, and memory of the host for the current device's, wherever the package under
    measurement has these functions. Torch's factories lose the CPU backend's wrappers, which a GPU run does not have.
    """
    cpu = torch.device("cpu")
    _replace_everywhere(unavailable=lambda device: "", current_device=lambda: cpu)
    # Megatron's code names the device by this number, and draws random numbers from its generator.
    torch.cuda.current_device = lambda: cpu
    torch.cuda.default_generators = {cpu: torch.default_generator}
    for owner, names in devices._FACTORIES.items():
        for name in [*names.split(), *(["to"] if owner is torch.Tensor else [])]:
            function = getattr(owner, name, None)
            if hasattr(function, "__wrapped__"):
                setattr(owner, name, function.__wrapped__)
    if parallel_state.get_expert_model_parallel_world_size() > 1:
        # Kernels and the fake backend write nothing: zeros are indices that fit, and numbers that cost nothing special.
        for module in (mappings, import_module("megatron_moe_spec.kernels.row_indices")):
            module.torch = ModuleType("torch")
            vars(module.torch).update(vars(torch), empty=torch.zeros, empty_like=torch.zeros_like)


def _replace_everywhere(**functions) -> None:
    """In each module of the package that has one of that name, its own or imported."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "megatron_moe_spec":
            for attribute in functions.keys() & vars(module).keys():
                setattr(module, attribute, functions[attribute])
