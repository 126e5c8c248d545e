"""The Python code of Transformer Engine on CPU, unmodified, over a stand-in of its compiled extension.

``install()`` changes nothing until Transformer Engine is imported. ``.ci/transformer-engine`` makes an environment that
calls it when an interpreter starts, so that ranks and programs of tests have it as well.
"""

import importlib.machinery
import os
import sys
from pathlib import Path

STAND_IN = Path(__file__).parent / "stand_in"
# Code of this package alone is told that tensors are on a GPU: torch and Megatron choose code by the answer.
TOLD = "transformer_engine."


def install() -> None:
    # With this variable Transformer Engine does not look for CUDA's libraries.
    os.environ.setdefault("NVTE_PROJECT_BUILDING", "1")
    os.environ.setdefault("TRITON_INTERPRET", "1")  # for its kernels
    sys.path.append(str(STAND_IN))
    sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds ``transformer_engine.common``, and patches it before it is asked to load the extension."""

    def find_spec(self, name, path, target=None):
        if name != "transformer_engine.common":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def execute_and_patch(module):
            execute(module)
            module.load_framework_extension = lambda framework: None
            _say_that_tensors_are_on_a_gpu()
            _do_not_tune_kernels()

        spec.loader.exec_module = execute_and_patch
        return spec


def _called_by_transformer_engine() -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").startswith(TOLD)


def _say_that_tensors_are_on_a_gpu() -> None:
    import torch

    is_cuda = torch._C.TensorBase.is_cuda
    torch.Tensor.is_cuda = property(lambda self: _called_by_transformer_engine() or is_cuda.__get__(self))


def _do_not_tune_kernels() -> None:
    """To choose among a kernel's configurations, Triton runs them on a GPU: the first is taken."""
    try:
        import triton
    except ImportError:
        return
    autotune = triton.autotune

    def first_configuration(configs, *args, **kwargs):
        return autotune(configs[:1] if _called_by_transformer_engine() else configs, *args, **kwargs)

    triton.autotune = first_configuration
