"""The device ``cuda`` read as ``cpu`` by every function of torch that takes a device.

A ``TorchFunctionMode`` would do so for torch's functions by whatever name, but it runs Python at each of the ten
thousand functions and attributes of tensors in a training step, and has to be turned on in every thread.
"""

import functools
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch.utils._device import DeviceContext, _device_constructors

Function = Callable[..., Any]
_CPU = torch.device("cpu")
# Those that a release of torch lacks are passed over.
_FACTORIES = {
    torch: """
        arange as_tensor asarray bartlett_window blackman_window empty empty_like empty_permuted empty_quantized
        empty_strided eye from_file full full_like hamming_window hann_window kaiser_window linspace logspace normal
        ones ones_like rand rand_like randint randint_like randn randn_like randperm range scalar_tensor
        sparse_bsc_tensor sparse_bsr_tensor sparse_compressed_tensor sparse_coo_tensor sparse_csc_tensor
        sparse_csr_tensor tensor tril_indices triu_indices zeros zeros_like
        """,
    torch.Tensor: "is_pinned new new_empty new_empty_strided new_full new_ones new_tensor new_zeros",
    torch.fft: "fftfreq rfftfreq",
    torch.nested: "as_nested_tensor nested_tensor",
}


def map_cuda_to_cpu() -> None:
    """Wraps the functions of torch that take a device, for all threads."""
    # Under `with torch.device(...)` torch looks for its own functions in this set, which it makes once.
    _device_constructors()
    for owner, names in _FACTORIES.items():
        for name in names.split():
            if hasattr(owner, name):
                _replace(owner, name, _on_cpu)
    _replace(torch.Tensor, "to", functools.partial(_on_cpu, position=1))
    # Torch lets these methods of a lazy module's parameters pass.
    torch.nn.parameter.UninitializedTensorMixin._allowed_methods.append(torch.Tensor.to)
    _replace(torch.Tensor, "cuda", _itself)
    _replace(torch.Tensor, "pin_memory", _itself)
    _replace(torch.Tensor, "type", _type_on_cuda)
    # nn.Module.to
    _replace(torch._C._nn, "_parse_to", functools.partial(_on_cpu, position=0))
    # `with torch.device(...)` and torch.set_default_device
    _replace(DeviceContext, "__init__", functools.partial(_on_cpu, position=1))


def _replace(owner: Any, name: str, wrap: Callable[[Function], Function]) -> None:
    function = getattr(owner, name)
    replacement = functools.wraps(function)(wrap(function))
    # Pickle looks for functions by these names.
    of_class = isinstance(owner, type)
    replacement.__module__ = owner.__module__ if of_class else owner.__name__
    replacement.__qualname__ = f"{owner.__qualname__}.{name}" if of_class else name
    # torch.jit.script knows torch's functions by their identity.
    operators = torch.jit._builtins._get_builtin_table()
    if id(function) in operators:
        operators[id(replacement)] = operators[id(function)]
    setattr(owner, name, replacement)


def _is_cuda(device: object) -> bool:
    if isinstance(device, (str, torch.device)):
        return str(device).partition(":")[0] == "cuda"
    # Torch takes a bare number for a device of the current accelerator.
    return isinstance(device, int) and not isinstance(device, bool)


def _on_cpu(function: Function, position: Optional[int] = None) -> Function:
    """The function on pageable CPU memory for a cuda device (at ``position``, or by keyword) or pinned memory."""

    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if position is not None and len(args) > position and _is_cuda(args[position]):
            args = (*args[:position], _CPU, *args[position + 1 :])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return on_cpu


def _itself(method: Function) -> Function:
    return lambda self, *args, **kwargs: self


def _type_on_cuda(method: Function) -> Function:
    # Megatron's optimizers take torch.cuda.FloatTensor and its like, and no others.
    def type_on_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        return result if args or kwargs else result.replace("torch.", "torch.cuda.", 1)

    return type_on_cuda
