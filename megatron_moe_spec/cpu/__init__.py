"""Megatron on CPU and gloo, without a GPU: for development, teaching and tests, not for real training."""

import functools
import sys


@functools.cache
def enable() -> None:
    """Makes an unmodified Megatron run on CPU in this process.

    To be called once, first of all: Megatron binds many names of ``torch`` when it is imported. Afterwards, in this
    process and until it ends,

    - the device ``cuda`` means ``cpu`` in every torch function, and the ``torch.cuda`` functions and classes that
      Megatron uses have stand-ins. ``torch.cuda.is_available()`` is True, while ``tensor.is_cuda`` is False and
      ``tensor.device`` is ``cpu``: choose code by the tensor, not by availability;
    - ``torch.compile`` returns its function as it is;
    - process groups are gloo's where NCCL is asked for, which is said once;
    - gloo takes all_gather and reduce_scatter of tensors that differ in shape, and all_gather_into_tensor and
      reduce_scatter_tensor of any shapes;
    - the few places of Megatron that assume a GPU, Transformer Engine or Apex are patched as their modules are
      imported: see ``megatron_moe_spec.cpu.megatron``.

    Training takes ``--transformer-impl local --no-gradient-accumulation-fusion --no-masked-softmax-fusion
    --no-persist-layer-norm --no-rope-fusion``, and ``torchrun`` for one process too.
    A second call does nothing. Names that were imported from torch before the call (``from torch import zeros``) keep
    their view of devices. The processes that Megatron spawns to save checkpoints import the main script again, with no
    more of this backend than they need: keep the script's run under ``if __name__ == "__main__"``.

    Raises:
        RuntimeError: ``megatron.core`` is imported already.
    """
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "megatron_moe_spec.cpu.enable() has to come before Megatron is imported, and megatron.core "
            "is imported already: call it at the top of the script, or run the script with "
            "`torchrun ... -m megatron_moe_spec.launch --cpu SCRIPT`"
        )
    from megatron_moe_spec.cpu import cuda_api, devices, distributed, megatron

    cuda_api.replace()
    distributed.replace()
    sys.meta_path.insert(0, megatron.PatchingFinder())
    devices.map_cuda_to_cpu()
