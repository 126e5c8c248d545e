"""A stand-in in plain torch for Transformer Engine's compiled extension, for tensors on CPU.

The contract: the functions that ``csrc/extensions/pybind.cpp`` of the source package transformer-engine-torch binds,
with their names and arguments, and the enumerations of its ``common_headers``; ``test_te_stand_in.py`` compares. It
computes what training a GPT with experts in fp32, bf16 and fp8 with one scale a tensor calls. Any other function raises
NotImplementedError with its name when it is called. What the kernels round, where they run and what they overlap is
not stood for.

Suffixes of comments: [a, b] shapes, row-major.
"""

from . import activations, attention, machine, many_tensors, matrices, norms, quantization, routers, rows  # noqa: F401
from .enums import *  # noqa: F403
from .registry import calls, functions, missing  # noqa: F401

globals().update(functions)


def __getattr__(name: str):
    if name.startswith("_"):
        raise AttributeError(name)
    return missing(name)
