"""Fused Triton kernels of the losses, for GPUs; their eager twins are in ``megatron_moe_spec.losses``.

Importing this package does not import triton. Its modules ``rows`` and ``mass`` do.
"""

import functools
import importlib.util
import os
from typing import Optional, Union

import torch
from torch import Tensor

OLDEST_CAPABILITY = (8, 0)


def interpreted() -> bool:
    """Whether Triton's interpreter is on, which runs the kernels on CPU, slowly: for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def computed_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that kernels multiply in and write: that of their tensors, but the interpreter knows no bf16."""
    return torch.float32 if interpreted() else dtype


def weight_and_factor(
    weight: Union[Tensor, float], factor: float, device: torch.device
) -> tuple[Optional[Tensor], float]:
    """A weight as the kernels take it: fp32 on the device, if it is there, and what the host knows, multiplied.

    Raises:
        ValueError: the weight is a tensor of another number of elements than one.
    """
    if isinstance(weight, Tensor) and weight.numel() != 1:
        raise ValueError(f"weight must be a number or a tensor of one element; got {list(weight.shape)}")
    if isinstance(weight, Tensor) and weight.device == device:
        return weight.to(torch.float32), float(factor)
    return None, float(weight) * float(factor)


def unavailable(device: Optional[torch.device]) -> str:
    """Why the kernels cannot run on tensors of a device, None: of any; an empty string where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted() or (device is None and torch.version.cuda is not None):
        return ""
    if device is None or device.type != "cuda" or torch.version.cuda is None:
        return "they need an NVIDIA GPU (or, for tests, TRITON_INTERPRET=1)"
    if torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        return "they need a GPU of compute capability {}.{} or newer".format(*OLDEST_CAPABILITY)
    return ""


@functools.cache  # asked for in every layer
def choose(kernels: str, device: Optional[torch.device]) -> bool:
    """Whether to run the losses on tensors of ``device`` by these kernels rather than by eager PyTorch.

    Args:
        kernels: ``SpecConfig.kernels``. auto: where the device is a GPU that can run them; triton; torch.
        device: None: not known yet.

    Raises:
        ValueError: triton is asked for and cannot run.
    """
    if kernels == "torch" or (kernels == "auto" and (device is None or device.type != "cuda")):
        return False
    reason = unavailable(device)
    if reason and kernels == "triton":
        raise ValueError(f"the Triton kernels cannot run: {reason} (set --moe-spec-kernels to auto or torch)")
    return not reason
