"""A plain-torch stand-in for Transformer Engine's GroupedLinear, to build Megatron's TEGroupedMLP on CPU.

Import only after the CPU backend is enabled.
"""

from functools import partial

import torch
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.transformer.moe import experts
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


class TorchGroupedLinear(torch.nn.Module):
    """One linear layer per local expert, ``weight0`` ... as in Transformer Engine; without expert tensor parallelism.

    Biases start at 0.

    Args:
        num_gemms: number of local experts.
        others: as Megatron's TEGroupedMLP passes them.
    """

    def __init__(
        self, num_gemms, input_size, output_size, *, config, init_method, bias, skip_bias_add, pg_collection, **others
    ):
        super().__init__()
        if pg_collection.expt_tp.size() > 1:
            raise NotImplementedError("TorchGroupedLinear knows no expert tensor parallelism")
        self.adds_bias = not skip_bias_add
        self.num_gemms = num_gemms
        self.pg_collection = pg_collection
        for i in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
            if config.perform_initialization:
                with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                    init_method(weight)
            # Whether data-parallel ranks hold the same weights, as for what is no expert's.
            weight.allreduce = (
                config.expert_model_parallel_size == 1
                and config.expert_tensor_parallel_size == config.tensor_model_parallel_size
            )
            self.register_parameter(f"weight{i}", weight)
            self.register_parameter(f"bias{i}", torch.nn.Parameter(torch.zeros(output_size)) if bias else None)

    def forward(self, x, m_splits):
        """``x`` [rows, input_size], by expert, ``m_splits`` rows for each; returns (output, biases yet to be added)."""
        rows = torch.split(x, [int(split) for split in m_splits])
        weights, biases = ([getattr(self, f"{name}{i}") for i in range(len(rows))] for name in ("weight", "bias"))
        left = None if self.adds_bias or biases[0] is None else biases
        added = biases if left is None else [None] * len(rows)
        return torch.cat([torch.nn.functional.linear(*part) for part in zip(rows, weights, added)]), left

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """As Transformer Engine's layer in Megatron: an axis over all experts in front of each weight."""
        number, first = self.pg_collection.ep.size() * self.num_gemms, self.pg_collection.ep.rank() * self.num_gemms
        if self.bias0 is not None:
            raise NotImplementedError("TorchGroupedLinear saves no biases")
        state = {}
        for i in range(self.num_gemms):
            offsets = (*sharded_offsets, (len(sharded_offsets), first + i, number))
            weight = make_sharded_tensors_for_checkpoint({f"{i}.weight": getattr(self, f"weight{i}")}, "", {}, offsets)
            replace_prefix_for_sharding(weight, f"{i}.", prefix)
            state[f"{prefix}weight{i}"] = weight[f"{i}.weight"]
        for tensor in state.values():
            tensor.replica_id = (0, 0, self.pg_collection.expt_dp.rank())
        return state


def use_torch_grouped_linear() -> None:
    """Has the local GPT layer specs build TEGroupedMLP of these layers when ``moe_grouped_gemm`` is set."""
    modules = LocalSpecProvider.grouped_mlp_modules

    def grouped_mlp_modules(self, moe_use_grouped_gemm, *legacy):
        if not moe_use_grouped_gemm:
            return modules(self, moe_use_grouped_gemm, *legacy)
        if hasattr(experts, "GroupedMLPSubmodules"):
            submodules = experts.GroupedMLPSubmodules(linear_fc1=TorchGroupedLinear, linear_fc2=TorchGroupedLinear)
            return partial(experts.TEGroupedMLP, submodules=submodules)
        # 0.16: a provider returns the class and its submodules.
        submodules = experts.MLPSubmodules(linear_fc1=TorchGroupedLinear, linear_fc2=TorchGroupedLinear)
        return experts.TEGroupedMLP, submodules

    LocalSpecProvider.grouped_mlp_modules = grouped_mlp_modules
