"""What Megatron's own code needs mended to run on CPU, as its modules are imported."""

import functools
import importlib.abc
import importlib.util
import logging
import sys

import torch


def mend_on_import() -> None:
    # Both devices share a generator, which Megatron's tracker rightly finds suspicious.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
    sys.meta_path.insert(0, _MendingFinder())


class _MendingFinder(importlib.abc.MetaPathFinder):
    """Finds the modules to mend as others would, and mends them once they are loaded."""

    def find_spec(self, name, path=None, target=None):
        mend = _MENDS.get(name)
        if mend is None:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None:
            load = spec.loader.exec_module

            def exec_module(module):
                load(module)
                mend(module)

            spec.loader.exec_module = exec_module
        return spec


def _mend_moe_utils(module) -> None:
    # Only for CUDA tensors does Megatron make the numpy split sizes that its all-to-all expects.
    def maybe_move_tensor_to_cpu(tensor, as_numpy=False, record_stream=False):
        return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor

    module.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu
    if not hasattr(module, "te_general_gemm"):
        module.te_general_gemm = None  # 0.16 leaves it undefined without transformer-engine


def _mend_torch_norm(module) -> None:
    # The plain norm refuses sequence parallelism. It needs only the mark by which Megatron sums its gradient
    # over tensor-parallel ranks.
    make = module.WrappedTorchNorm.__new__

    def __new__(cls, config, hidden_size, eps=1e-5, **kwargs):
        sequence_parallel, config.sequence_parallel = config.sequence_parallel, False
        try:
            norm = make(cls, config, hidden_size, eps, **kwargs)
        finally:
            config.sequence_parallel = sequence_parallel
        for weight in norm.parameters():
            weight.sequence_parallel = sequence_parallel
        return norm

    module.WrappedTorchNorm.__new__ = staticmethod(__new__)


def _mend_dataset_helpers(module) -> None:
    # The wheel holds the compiled helpers but not the Makefile that Megatron always runs. True on GPUs as well.
    compile_helpers = module.compile_helpers

    def compile_if_missing():
        if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
            compile_helpers()

    module.compile_helpers = compile_if_missing


def _mend_activation_checkpoint(module) -> None:
    # Selective recomputation takes "fp8 is not None" for fp8, and then needs transformer-engine.
    checkpoint = module.CheckpointWithoutOutput
    initialize = checkpoint.__init__

    @functools.wraps(initialize)
    def __init__(self, *args, **kwargs):
        initialize(self, *args, **kwargs)
        self.fp8 = self.fp8 and module.HAVE_TE

    checkpoint.__init__ = __init__
    if hasattr(module, "_get_share_storage"):  # 0.17 and newer build a C++ extension for this at run time

        def share_storage(target, source):
            target.untyped_storage().resize_(source.untyped_storage().nbytes())
            target.untyped_storage().copy_(source.untyped_storage())

        module._get_share_storage = lambda: share_storage


def _mend_fused_kernels(module) -> None:
    module.load = lambda args: None  # 0.16 source trees run nvcc here


def _mend_distributed_optimizer(module) -> None:
    # Without transformer-engine or apex the optimizer is torch's Adam, whose empty state Megatron cannot resume
    # into: give it one, and keep its step apart for every parameter.
    optimizer = module.DistributedOptimizer
    state_dict = optimizer.state_dict

    def state_dict_of_filled(self):
        if not module.HAVE_APEX_OR_TE and not self.optimizer.state:
            for group in self.optimizer.param_groups:
                for weight in group["params"]:
                    self.optimizer.state[weight] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(weight),
                        "exp_avg_sq": torch.zeros_like(weight),
                    }
        return state_dict(self)

    optimizer.state_dict = state_dict_of_filled
    if hasattr(optimizer, "_set_main_param_and_optimizer_states"):
        set_states = optimizer._set_main_param_and_optimizer_states

        @torch.no_grad()
        def set_states_keeping_step(self, model_param, tensors):
            group, index = self.model_param_group_index_map[model_param]
            state = self.optimizer.state[self.optimizer.param_groups[group]["params"][index]]
            step = state.pop("step", None)
            set_states(self, model_param, tensors)
            if step is not None:
                state["step"] = step.clone()

        optimizer._set_main_param_and_optimizer_states = set_states_keeping_step


def _mend_attention(module) -> None:
    # The plain attention knows no context parallelism: gather keys and values over its group (backward:
    # reduce-scatter) and mask by the tokens' true positions, which lie in a zigzag over the ranks.
    attention = module.DotProductAttention
    initialize, forward = attention.__init__, attention.forward

    @functools.wraps(initialize)
    def __init__(self, config, *args, **kwargs):
        size, config.context_parallel_size = config.context_parallel_size, 1
        try:
            initialize(self, config, *args, **kwargs)
        finally:
            config.context_parallel_size = size

    @functools.wraps(forward)
    def forward_all_keys(self, query, key, value, attention_mask, *args, **kwargs):
        if self.config.context_parallel_size > 1:
            from megatron.core import parallel_state
            from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region as gather

            group = parallel_state.get_context_parallel_group()
            size, chunk = group.size(), query.size(0) // 2

            def positions(rank):
                first, last = rank * chunk, (2 * size - 1 - rank) * chunk
                return torch.cat([torch.arange(first, first + chunk), torch.arange(last, last + chunk)])

            key, value = gather(key.contiguous(), group=group), gather(value.contiguous(), group=group)
            keys = torch.cat([positions(rank) for rank in range(size)])
            attention_mask = (keys[None, :] > positions(group.rank())[:, None])[None, None]
        return forward(self, query, key, value, attention_mask, *args, **kwargs)

    attention.__init__, attention.forward = __init__, forward_all_keys


_MENDS = {
    "megatron.core.transformer.moe.moe_utils": _mend_moe_utils,
    "megatron.core.transformer.torch_norm": _mend_torch_norm,
    "megatron.core.transformer.dot_product_attention": _mend_attention,
    "megatron.core.tensor_parallel.random": _mend_activation_checkpoint,
    "megatron.core.optimizer.distrib_optimizer": _mend_distributed_optimizer,
    "megatron.core.datasets.utils": _mend_dataset_helpers,
    "megatron.legacy.fused_kernels": _mend_fused_kernels,
}
