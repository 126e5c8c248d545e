"""Fused Triton kernels of the losses, for GPUs; their eager twins are in ``megatron_moe_spec.losses``.

Importing this package does not import triton. Its modules ``rows`` and ``mass`` do.
"""

import importlib.util
import os

import torch

OLDEST_CAPABILITY = (8, 0)


def interpreted() -> bool:
    """Whether Triton's interpreter is on, which runs the kernels on CPU, slowly: for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def computed_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that kernels multiply in and write: that of their tensors, but the interpreter knows no bf16."""
    return torch.float32 if interpreted() else dtype


def unavailable(device: torch.device) -> str:
    """Why the kernels cannot run on tensors of a device; an empty string where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted():
        return ""
    if device.type != "cuda" or torch.version.cuda is None:
        return "they need an NVIDIA GPU (or, for tests, TRITON_INTERPRET=1)"
    if torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        return "they need a GPU of compute capability {}.{} or newer".format(*OLDEST_CAPABILITY)
    return ""


def choose(kernels: str, device: torch.device) -> bool:
    """Whether to run the losses on tensors of ``device`` by these kernels rather than by eager PyTorch.

    Args:
        kernels: ``SpecConfig.kernels``. auto: where the device is a GPU that can run them; triton; torch.

    Raises:
        ValueError: triton is asked for and cannot run.
    """
    if kernels == "torch" or (kernels == "auto" and device.type != "cuda"):
        return False
    reason = unavailable(device)
    if reason and kernels == "triton":
        raise ValueError(f"the Triton kernels cannot run: {reason} (set --moe-spec-kernels to auto or torch)")
    return not reason
