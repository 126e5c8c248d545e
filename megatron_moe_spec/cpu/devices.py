"""The device ``cuda`` read as ``cpu`` in every torch function, in backward passes and threads too."""

import contextlib
import threading

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

_CPU = torch.device("cpu")


def _is_cuda(device) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.split(":")[0] == "cuda"
    # Torch takes a bare number for a device of the current accelerator.
    return isinstance(device, int) and not isinstance(device, bool)


class CudaToCpu(TorchFunctionMode):
    """Runs torch functions that are asked for a cuda device, or for pinned memory, on plain CPU tensors."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        elif func is torch._C._nn._parse_to and args and _is_cuda(args[0]):
            # nn.Module.to
            args = (_CPU, *args[1:])
        elif func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's optimizers take torch.cuda.FloatTensor and its like, and no others.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


def map_cuda_to_cpu() -> None:
    """Turns the mapping on in this thread, in backward passes, and in threads that are started from now on."""
    _keep_in_backward()
    _keep_in_threads()
    CudaToCpu().__enter__()


def _keep_in_backward() -> None:
    # A mode is off while it handles a call, and torch.autograd.backward is such a call: the backward methods of
    # Python autograd functions (and the forward passes that recomputation repeats there) would run without it.
    run = torch.autograd.graph._engine_run_backward

    def run_backward(*args, **kwargs):
        active = any(isinstance(mode, CudaToCpu) for mode in _get_current_function_mode_stack())
        with contextlib.nullcontext() if active else CudaToCpu():
            return run(*args, **kwargs)

    torch.autograd.graph._engine_run_backward = run_backward
    torch.autograd._engine_run_backward = run_backward


def _keep_in_threads() -> None:
    # The stack of modes is thread-local, and `run` is what subclasses of Thread override.
    bootstrap = threading.Thread._bootstrap_inner  # type: ignore[attr-defined]

    def bootstrap_inner(self):
        with CudaToCpu():
            bootstrap(self)

    threading.Thread._bootstrap_inner = bootstrap_inner  # type: ignore[attr-defined]
