"""CUDA devices, streams and events, mapped to the CPU."""

import contextlib
import os
import threading
import time
import types

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def _is_cuda(device) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


class CudaOnCpu(TorchFunctionMode):
    """Makes tensors that are asked for on a CUDA device on the CPU; they call themselves CUDA tensors by type()."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if function in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if function is torch.Tensor.record_stream:
            return None
        if function is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        elif function is torch._C._nn._parse_to and args and _is_cuda(args[0]):  # Module.to
            args = (_CPU, *args[1:])
        elif function is torch.Tensor.type and len(args) == 1 and not kwargs:
            return "torch.cuda." + function(*args).removeprefix("torch.")
        return function(*args, **kwargs)


class _Stream:
    """A stream on which everything has happened already."""

    cuda_stream = 0
    stream_id = 0
    device = _CPU

    def __init__(self, *args, **kwargs):
        pass

    def record_event(self, event=None):
        event = event or _Event()
        event.record()
        return event

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return False

    @staticmethod
    def priority_range():
        return 0, -1


class _Event:
    def __init__(self, *args, **kwargs):
        self.record()

    def record(self, stream=None):
        self._time = time.perf_counter()

    def elapsed_time(self, later):
        return (later._time - self._time) * 1e3

    def wait(self, stream=None):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True


class _NoStatistics(dict):
    def __missing__(self, name):
        return 0


def map_cuda_to_cpu() -> None:
    """Turns the mapping on for this process, all its threads and autograd's backward."""
    _replace_torch_cuda()
    _replace_random_states()
    _hide_accelerator()
    _keep_mapping_in_backward()
    _keep_mapping_in_threads()
    CudaOnCpu().__enter__()


def _replace_torch_cuda() -> None:
    cuda = torch.cuda
    memory = 80 << 30
    properties = types.SimpleNamespace(
        name="cpu", major=9, minor=0, total_memory=memory, multi_processor_count=1
    )
    answers = [
        (
            None,
            "init _lazy_init set_device set_stream synchronize empty_cache ipc_collect check_error _sleep "
            "reset_peak_memory_stats reset_max_memory_allocated",
        ),
        (True, "is_available is_initialized"),
        (False, "is_current_stream_capturing"),
        (
            0,
            "current_device memory_allocated memory_reserved max_memory_allocated max_memory_reserved "
            "device_memory_used utilization temperature power_draw clock_rate",
        ),
    ]
    for answer, names in answers:
        for name in names.split():
            _answer(cuda, name, answer)
    stream = _Stream()
    for name, value in {
        "mem_get_info": (memory, memory),
        "memory_stats": _NoStatistics(),
        "get_device_name": "cpu",
        "get_device_capability": (9, 0),
        "get_device_properties": properties,
        "current_stream": stream,
        "default_stream": stream,
        "cudart": types.SimpleNamespace(cudaProfilerStart=lambda: None, cudaProfilerStop=lambda: None),
    }.items():
        _answer(cuda, name, value)
    for name in ("range_push", "range_pop", "mark"):
        _answer(cuda.nvtx, name, None)
    _answer(torch._C, "_cuda_attach_out_of_memory_observer", None)
    cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cuda._lazy_call = lambda function, **kwargs: function()
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.ExternalStream = type("ExternalStream", (_Stream,), {})
    cuda.stream = lambda stream=None: contextlib.nullcontext()
    cuda.device = lambda device=None: contextlib.nullcontext()


def _answer(module, name, value) -> None:
    # A function of its own for each name: torch._dynamo keeps a table by function and asserts that it is unique.
    setattr(module, name, lambda *args, **kwargs: value)


def _replace_random_states() -> None:
    # One generator serves both devices, so that Megatron's tracker of CUDA random states works as it is.
    cuda, random = torch.cuda, torch.cuda.random

    def get_rng_state(device="cuda"):
        return torch.get_rng_state()

    def set_rng_state(state, device="cuda"):
        torch.set_rng_state(state)

    def manual_seed(seed):
        torch.default_generator.manual_seed(int(seed))

    cuda.default_generators = (torch.default_generator,)
    cuda.get_rng_state = random.get_rng_state = get_rng_state
    cuda.set_rng_state = random.set_rng_state = set_rng_state
    cuda.get_rng_state_all = random.get_rng_state_all = lambda: [torch.get_rng_state()]
    cuda.initial_seed = random.initial_seed = lambda: torch.default_generator.initial_seed()
    cuda.manual_seed = random.manual_seed = manual_seed
    cuda.manual_seed_all = random.manual_seed_all = lambda seed: manual_seed(seed)


def _hide_accelerator() -> None:
    # Optimizers, data loaders and checkpoints ask here, and must not expect an accelerator's own operations.
    accelerator = torch.accelerator
    accelerator.current_accelerator = lambda check_available=False: None
    accelerator.is_available = lambda: False
    accelerator.device_count = lambda: 0
    torch.compile = lambda model=None, **kwargs: model if model is not None else (lambda function: function)


def _keep_mapping_in_backward() -> None:
    # A mode is off while it handles a call, and backward() is such a call.
    from torch._C import _len_torch_function_stack

    original = torch.autograd.graph._engine_run_backward

    def run_backward(*args, **kwargs):
        with contextlib.nullcontext() if _len_torch_function_stack() else CudaOnCpu():
            return original(*args, **kwargs)

    for module in (torch.autograd.graph, torch.autograd):
        if hasattr(module, "_engine_run_backward"):
            module._engine_run_backward = run_backward


def _keep_mapping_in_threads() -> None:
    original = threading.Thread.run

    def run(self):
        with CudaOnCpu():
            original(self)

    threading.Thread.run = run
