"""Options with which each kernel is compiled: the defaults, or those that a sweep found fastest on this kind of GPU.

``benchmarks/sweep.py`` measures and writes ``tuned.json`` next to this file. The kernels read it where it is present;
what it does not list keeps its default:

    {"9.0": {"cosines": {"2": {"BLOCK_D": 64, "num_warps": 1, "num_stages": 6}}}}

by compute capability, kernel, and bytes of an element of the kernel's first argument.
"""

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional, TypeVar

import torch

from megatron_moe_spec.kernels import interpreted

Function = TypeVar("Function", bound=Callable)
TUNED = Path(__file__).with_name("tuned.json")
# ELEMENTS: of a program, from which the tokens of its block follow.
_MASS = dict(ELEMENTS=2048, num_warps=4)
DEFAULTS: dict[str, dict[int, dict[str, int]]] = {
    "cosines": {2: dict(BLOCK_D=64, num_warps=1, num_stages=6), 4: dict(BLOCK_D=32, num_warps=1, num_stages=3)},
    "mixing": {2: dict(BLOCK_D=128, num_warps=4, num_stages=3), 4: dict(BLOCK_D=32, num_warps=4, num_stages=2)},
    "swiglu_gradient": {2: dict(BLOCK_F=64, num_warps=4, STAGES=3), 4: dict(BLOCK_F=32, num_warps=4, STAGES=3)},
    "swiglu_gradient_of_sum": {
        2: dict(ROWS=4, BLOCK_F=256, num_warps=4, STAGES=3),
        4: dict(ROWS=4, BLOCK_F=128, num_warps=4, STAGES=3),
    },
    "mass": {2: _MASS, 4: _MASS},
    "row_indices": {1: dict(ELEMENTS=2048, MOST_TOKENS=32, num_warps=4)},
}
_trial: dict[tuple[str, int], dict[str, int]] = {}


def capability() -> Optional[str]:
    """Compute capability of the current device, as "9.0"; None where kernels are interpreted, or without a GPU."""
    if interpreted() or not torch.cuda.is_available():
        return None
    return "{}.{}".format(*torch.cuda.get_device_capability())


_caches: list[Any] = []


def cached(function: Function) -> Function:
    """functools.cache of what depends on the options."""
    _caches.append(functools.cache(function))
    return _caches[-1]


def forget() -> None:
    """Has the options read again."""
    for cache in _caches:
        cache.cache_clear()


@cached
def options(kernel: str, element_size: int) -> dict[str, int]:
    """Options of a kernel of ``DEFAULTS`` on the current device; one dictionary for all callers, not to be changed.

    Raises:
        ValueError: ``tuned.json`` has options of another version of the kernel.
    """
    if (kernel, element_size) in _trial:
        return _trial[kernel, element_size]
    default = DEFAULTS[kernel][element_size]
    found = _tuned().get(capability() or "", {}).get(kernel, {}).get(str(element_size), default)
    if found.keys() != default.keys():
        raise ValueError(
            f"{TUNED} has {', '.join(found)} for the kernel {kernel}, which takes {', '.join(default)}: delete the "
            'file, or measure again: make gpu GPU_ARGS="--parts sweep"'
        )
    return found


@contextmanager
def trial(kernel: str, element_size: int, candidate: dict[str, int]) -> Iterator[None]:
    """Launches a kernel with the options of ``candidate``, whatever was tuned."""
    _trial[kernel, element_size] = candidate
    forget()
    try:
        yield
    finally:
        del _trial[kernel, element_size]
        forget()


def write_tuned(of_capability: str, winners: dict[str, dict[int, dict[str, int]]], file: Path = TUNED) -> None:
    """Replaces the options of a compute capability in ``tuned.json``; those of others stay."""
    tuned = {**(json.loads(file.read_text()) if file.exists() else {}), of_capability: winners}
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(tuned, indent=1) + "\n")
    unfinished.replace(file)
    forget()


def _tuned() -> dict:
    try:
        return json.loads(TUNED.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{TUNED} is not JSON ({error}): delete it, or copy it again") from None
