"""Running unmodified Megatron on CPU with gloo: for development, teaching and tests, not for real training."""

import os
import sys


def enable() -> None:
    """Makes this process run Megatron without a GPU. A second call does nothing.

    Tensors asked for on a CUDA device are made on the CPU, streams and events do nothing, and what Megatron or
    gloo cannot do on CPU is mended as Megatron's modules are imported. Every process of a job calls it first.

    Raises:
        RuntimeError: Megatron was imported before, too early to be mended.
    """
    if "megatron_moe_spec.integration.cpu.megatron" in sys.modules:
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError("enable the CPU backend before anything of megatron is imported")
    # Megatron's jit_fuser is torch.compile, which costs minutes on CPU and cannot see the device mapping.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    from megatron_moe_spec.integration.cpu import collectives, devices, megatron

    devices.map_cuda_to_cpu()
    collectives.allow_uneven_sizes()
    megatron.mend_on_import()
