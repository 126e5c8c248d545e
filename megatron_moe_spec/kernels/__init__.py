"""Fused Triton kernels of the losses, for GPUs, and when to run them.

The eager references are ``megatron_moe_spec.losses`` and ``parallel.row_indices``. Importing this package does not
import triton; importing one of its modules does. Tensors that do not fit raise ValueError, which names the argument.
"""

import functools
import importlib
import importlib.util
import os
from typing import Any, Optional

import torch

OLDEST_CAPABILITY = (8, 0)


def interpreted() -> bool:
    """Whether Triton's interpreter is on, which runs the kernels on CPU, slowly: for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def module(name: str) -> Any:
    """A module of this package, which imports triton; as an import statement, but cheap in each call."""
    return importlib.import_module(f"{__name__}.{name}")


def unavailable(device: Optional[torch.device]) -> str:
    """Why the kernels cannot run on tensors of a device (None: of any device); an empty string where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted() or (device is None and torch.version.cuda is not None):
        return ""
    if device is None or device.type != "cuda" or torch.version.cuda is None:
        return "they need an NVIDIA GPU (or, for tests, TRITON_INTERPRET=1)"
    if torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        return "they need a GPU of compute capability {}.{} or newer".format(*OLDEST_CAPABILITY)
    return ""


@functools.cache  # called by every layer
def choose(kernels: str, device: Optional[torch.device]) -> bool:
    """Whether to run the losses on tensors of ``device`` by these kernels rather than by eager PyTorch.

    Args:
        kernels: ``SpecConfig.kernels``. auto: where the device is a GPU that can run them; triton; torch.
        device: None: not known yet.

    Raises:
        ValueError: ``kernels`` is triton, and they cannot run.
    """
    if kernels == "torch" or (kernels == "auto" and (device is None or device.type != "cuda")):
        return False
    reason = unavailable(device)
    if reason and kernels == "triton":
        raise ValueError(f"the Triton kernels cannot run: {reason} (set --moe-spec-kernels to auto or torch)")
    return not reason
