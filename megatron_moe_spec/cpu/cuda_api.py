"""Stand-ins for what Megatron uses of ``torch.cuda``: one device per local process, streams that run in order."""

import contextlib
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Optional

import torch

_MEMORY_BYTES = 80 << 30
# Only decides which checks Megatron's argument parser makes (it asks for CUDA_DEVICE_MAX_CONNECTIONS=1 below 10).
_CAPABILITY = (9, 0)


def constant(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


class Stream:
    """A stream on which everything has run by the time it is asked."""

    cuda_stream = 0
    stream_id = 0
    device = torch.device("cpu")
    wait_stream = constant(None)
    wait_event = constant(None)
    synchronize = constant(None)
    query = constant(True)
    priority_range = staticmethod(constant((0, -1)))
    __init__ = constant(None)
    __exit__ = constant(None)

    def __enter__(self) -> "Stream":
        return self

    def record_event(self, event: "Optional[Event]" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event


class ExternalStream(Stream):
    """Of ``torch.cuda.ExternalStream``; a separate class, since torch._dynamo refuses one with two names."""


class Event:
    """An event that has happened when it is recorded; ``elapsed_time`` is wall-clock time."""

    wait = constant(None)
    synchronize = constant(None)
    query = constant(True)

    def __init__(self, *args: Any, **kwargs: Any):
        self._time = time.perf_counter()

    def record(self, stream: Any = None) -> None:
        self._time = time.perf_counter()

    def elapsed_time(self, end_event: "Event") -> float:
        """Milliseconds from this event to ``end_event``."""
        return (end_event._time - self._time) * 1e3


def replace() -> None:
    """Replaces the names of ``torch.cuda``, ``torch.accelerator`` and ``torch.compile`` that Megatron runs into."""
    # Megatron refuses tensor parallelism on such a device without it.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    _replace_queries()
    _replace_streams()
    _replace_random_states()
    # What is not Megatron (torch's optimizers, DataLoader, checkpointing) has to see a CPU.
    _set_constants(torch.accelerator, None, "current_accelerator")
    _set_constants(torch.accelerator, False, "is_available")
    _set_constants(torch.accelerator, 0, "device_count")
    # Megatron always asks DataLoader for pinned memory.
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator is found")
    torch.compile = _compile


def _set_constants(module: Any, value: Any, *names: str) -> None:
    # Each name gets a separate function: torch._dynamo keys a table by the functions of torch.cuda.
    for name in names:
        setattr(module, name, constant(value))


def _replace_queries() -> None:
    cuda = torch.cuda
    _set_constants(cuda, True, "is_available", "is_initialized")
    _set_constants(cuda, False, "is_current_stream_capturing")
    _set_constants(
        cuda, None,
        "init", "_lazy_init", "set_device", "synchronize", "empty_cache", "ipc_collect", "check_error", "_sleep",
        "reset_peak_memory_stats", "reset_max_memory_allocated",
    )  # fmt: skip
    _set_constants(
        cuda, 0,
        "current_device", "memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved",
        "device_memory_used", "utilization", "temperature", "power_draw", "clock_rate",
    )  # fmt: skip
    _set_constants(cuda, "cpu", "get_device_name")
    _set_constants(cuda, _CAPABILITY, "get_device_capability")
    _set_constants(cuda, (_MEMORY_BYTES, _MEMORY_BYTES), "mem_get_info")
    major, minor = _CAPABILITY
    properties = SimpleNamespace(
        name="cpu", major=major, minor=minor, total_memory=_MEMORY_BYTES, multi_processor_count=1
    )
    _set_constants(cuda, properties, "get_device_properties")
    profiler = SimpleNamespace(cudaProfilerStart=constant(None), cudaProfilerStop=constant(None))
    _set_constants(cuda, profiler, "cudart")
    _set_constants(cuda.nvtx, None, "range_push", "range_pop", "mark")
    _set_constants(torch._C, None, "_cuda_attach_out_of_memory_observer")
    cuda.memory_stats = lambda *args, **kwargs: defaultdict(int)
    cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cuda.device = lambda device=None: contextlib.nullcontext()
    cuda._lazy_call = lambda function, **kwargs: function()


def _replace_streams() -> None:
    cuda = torch.cuda
    cuda.Stream, cuda.ExternalStream, cuda.Event = Stream, ExternalStream, Event
    _set_constants(cuda, Stream(), "current_stream", "default_stream")
    _set_constants(cuda, None, "set_stream")
    cuda.stream = lambda stream=None: contextlib.nullcontext()
    # Torch's own takes no other class of streams.
    torch.Tensor.record_stream = lambda self, stream: None


def _replace_random_states() -> None:
    # "cpu" and "cuda" share torch's generator, so that Megatron's random state tracker steers the numbers drawn.
    generator = torch.default_generator
    torch.cuda.default_generators = (generator,)
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = lambda device=None: generator.get_state()
        module.set_rng_state = lambda state, device=None: generator.set_state(state)
        module.get_rng_state_all = lambda: [generator.get_state()]
        module.set_rng_state_all = lambda states: generator.set_state(states[0])
        module.initial_seed = lambda: generator.initial_seed()
        module.manual_seed = lambda seed: generator.manual_seed(int(seed))
        module.manual_seed_all = lambda seed: generator.manual_seed(int(seed))


def _compile(model: Optional[Callable[..., Any]] = None, **kwargs: Any) -> Callable[..., Any]:
    # Megatron's jit_fuser. Compiling small functions takes far longer than what a run on CPU gains by it.
    return model if model is not None else _compile
