"""Patches for the places of Megatron that assume a GPU, Transformer Engine or Apex; applied at import."""

import importlib.abc
import logging
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, Optional
from unittest import mock

import torch
from torch import Tensor

Patch = Callable[[Any], None]  # of a module
_PATCHES: dict[str, Patch] = {}  # by the module's name
_async_loop: Optional[Callable[..., None]] = None  # Megatron's, once it is replaced


class PatchingFinder(importlib.abc.MetaPathFinder):
    """Patches every module that a patch below names, right after its import."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Optional[ModuleSpec]:
        spec = PathFinder.find_spec(name, path, target) if name in _PATCHES else None
        if spec is None:
            return None
        # Set on this module's loader, not wrapped in another: inspect and linecache ask the loader for the source.
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_patch(module: ModuleType) -> None:
            execute(module)
            _PATCHES[name](module)

        loader.exec_module = execute_and_patch
        return spec


def _after_import(name: str) -> Callable[[Patch], Patch]:
    return lambda patch: _PATCHES.setdefault(name, patch)


@_after_import("megatron.core.transformer.moe.moe_utils")
def _do_without_cuda_tensors(module: Any) -> None:
    # Only for tensors that say is_cuda does Megatron turn the all-to-all's split sizes into what gloo takes.
    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    module.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu
    # 0.16 reads this name without Transformer Engine too, where it does not define it.
    if not hasattr(module, "te_general_gemm"):
        module.te_general_gemm = None


@_after_import("megatron.core.transformer.torch_norm")
def _allow_sequence_parallel_norm(module: Any) -> None:
    # Torch's norms are refused under sequence parallelism. They compute the same; what they lack is the mark by
    # which finalize_model_grads sums their weights' gradients over the tensor-parallel group.
    new = module.WrappedTorchNorm.__new__

    def new_norm(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(config, "sequence_parallel", False):
            norm = new(cls, config, *args, **kwargs)
        for weight in norm.parameters():
            weight.sequence_parallel = config.sequence_parallel
        return norm

    module.WrappedTorchNorm.__new__ = staticmethod(new_norm)


@_after_import("megatron.core.transformer.dot_product_attention")
def _allow_context_parallel_attention(module: Any) -> None:
    # The local attention refuses context parallelism. Here every rank gathers all keys and values, and masks them
    # by their true positions: rank r of n holds the chunks r and 2n - 1 - r of 2n.
    attention = module.DotProductAttention
    init, forward = attention.__init__, attention.forward

    def patched_init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        with mock.patch.object(config, "context_parallel_size", 1):
            init(self, config, *args, **kwargs)

    def patched_forward(
        self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> Tensor:
        if self.config.context_parallel_size > 1:
            if self.attn_mask_type != module.AttnMaskType.causal or getattr(self.config, "window_size", None):
                raise NotImplementedError("context parallelism on CPU: causal attention without a window only")
            from megatron.core import parallel_state
            from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

            group = parallel_state.get_context_parallel_group()
            attention_mask = _zigzag_causal_mask(query.size(0), group.rank(), group.size())
            key = gather_from_sequence_parallel_region(key.contiguous(), group=group)
            value = gather_from_sequence_parallel_region(value.contiguous(), group=group)
        return forward(self, query, key, value, attention_mask, *args, **kwargs)

    attention.__init__, attention.forward = patched_init, patched_forward


def _zigzag_causal_mask(length: int, rank: int, size: int) -> Tensor:
    """[1, 1, length, size * length], True where a query of this rank may not look."""
    chunks = torch.arange(size * length).view(2 * size, length // 2)
    keys = torch.cat([chunks[[r, 2 * size - 1 - r]].flatten() for r in range(size)])
    queries = keys.view(size, length)[rank]
    return (keys > queries[:, None])[None, None]


@_after_import("megatron.core.tensor_parallel.random")
def _recompute_on_cpu(module: Any) -> None:
    # The constructor takes fp8=False for fp8 (it tests `is not None`), and calls Transformer Engine for it.
    checkpoint = module.CheckpointWithoutOutput
    init = checkpoint.__init__

    def patched_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.fp8 = self.fp8 and module.HAVE_TE

    checkpoint.__init__ = patched_init

    def copy_storage(destination: Tensor, source: Tensor) -> None:
        storage = destination.untyped_storage()
        storage.resize_(source.untyped_storage().nbytes())
        storage.copy_(source.untyped_storage())

    # Newer versions compile a C++ extension on first use, so that the discarded tensor shares the recomputed one's
    # storage. A copy into the discarded storage reaches all of its views as well.
    if hasattr(module, "_get_share_storage"):
        module._get_share_storage = lambda: copy_storage
    # "cuda" and "cpu" share one generator here, so what this warning reports is no fault.
    logging.getLogger(module.__name__).addFilter(
        lambda record: "CPU RNG state changed within GPU RNG context" not in record.getMessage()
    )


@_after_import("megatron.core.optimizer.distrib_optimizer")
def _resume_torch_adam(module: Any) -> None:
    optimizer = module.DistributedOptimizer
    state_dict, set_states = optimizer.state_dict, optimizer._set_main_param_and_optimizer_states

    # Without Transformer Engine and Apex the optimizer is torch's, whose state is empty until the first step, which
    # state_dict() cannot take: a torch_dist checkpoint could not be loaded. Loading overwrites the state made here.
    def patched_state_dict(self: Any) -> Any:
        if not module.HAVE_APEX_OR_TE and not self.optimizer.state:
            for group in self.optimizer.param_groups:
                for weight in group["params"]:
                    averages = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
                    self.optimizer.state[weight] = {"step": torch.tensor(0.0), **averages}
        return state_dict(self)

    # no_grad: in fp32 the main weights are views of the model's, which require grad, and they are written in place.
    @torch.no_grad()
    def patched_set_states(self: Any, model_param: Any, tensors: Any) -> None:
        group, index = self.model_param_group_index_map[model_param]
        weight = self.optimizer.param_groups[group]["params"][index]
        # The step has come with the parameter group; the weight's own tensors hold none. One tensor serves all weights
        # then, which each weight's update would advance.
        step = self.optimizer.state[weight].pop("step", None)
        set_states(self, model_param, tensors)
        if step is not None:
            self.optimizer.state[weight]["step"] = step.clone()

    optimizer.state_dict = patched_state_dict
    optimizer._set_main_param_and_optimizer_states = patched_set_states


@_after_import("megatron.core.dist_checkpointing.strategies.async_utils")
def _save_in_worker(module: Any) -> None:
    # --use-persistent-ckpt-worker. The worker's process, where this backend is not enabled, gets a reference to the
    # function, and would die in it for want of a GPU, for which the training process waits without end.
    if hasattr(module.PersistentAsyncCaller, "async_loop"):
        global _async_loop
        _async_loop = module.PersistentAsyncCaller.async_loop
        module.PersistentAsyncCaller.async_loop = staticmethod(run_checkpoint_worker)


def run_checkpoint_worker(*args: Any) -> None:
    """Megatron's loop of the worker that saves checkpoints, in a process that has no GPU."""
    from megatron_moe_spec.cpu import cuda_api

    cuda_api.replace()
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    # A main script that enables the backend whenever it is imported has patched it in this process, too.
    (_async_loop or PersistentAsyncCaller.async_loop)(*args)


@_after_import("megatron.core.datasets.utils")
def _use_compiled_helpers(module: Any) -> None:
    # initialize_megatron() always runs `make`; the wheel ships the compiled helpers and no Makefile.
    compile_helpers = module.compile_helpers

    def compile_if_missing() -> None:
        try:
            import megatron.core.datasets.helpers_cpp  # noqa: F401
        except ImportError:
            compile_helpers()

    module.compile_helpers = compile_if_missing


@_after_import("megatron.legacy.fused_kernels")
def _skip_fused_kernels(module: Any) -> None:
    # initialize_megatron() of the 0.16 source tree asks nvcc for its version.
    module.load = lambda args: None
