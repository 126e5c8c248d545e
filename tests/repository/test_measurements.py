"""What the benchmarks measure and check: faults by which their figures, or a missing error, would mislead."""

import importlib
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from processes import ROOT

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("torch")

import torch
from torch.utils._python_dispatch import TorchDispatchMode

OPERATIONS = {
    "cosines": 3,
    "mixing gradient": 1,
    "cosines gradient": 1,
    "SwiGLU gradient": 2,
    "SwiGLU gradient of a sum": 2,
    "row indices": 2,
    "mass": 2,
    "mass gradient": 1,
}
GRADIENTS = [name for name in OPERATIONS if name.endswith("gradient")]
NAMES = ("common", "operations", "sweep")


@pytest.fixture
def benchmarks(monkeypatch):
    """The modules of NAMES, which import each other by these names."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    for name in NAMES:
        sys.modules.pop(name, None)


def _operations(benchmarks) -> dict:
    """By name, on tiny shapes."""
    return {
        operation.name: operation
        for operation in benchmarks.operations.operations(benchmarks.common.Shape(16, 24, 8, 2), 12)
    }


class _Calls(TorchDispatchMode):
    """Names of the operators that run, and whether they write to an argument."""

    def __init__(self):
        super().__init__()
        self.names, self.written = [], []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.append(function._schema.name)
        for argument, value in zip(function._schema.arguments, arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.written.append(value)
        return function(*arguments, **(options or {}))


# Checks


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_check_finds_the_kernels_right(benchmarks, name):
    rows = benchmarks.operations.errors(_operations(benchmarks)[name])
    assert len(rows) == OPERATIONS[name] * (2 if name in GRADIENTS else 1)
    assert all(row["right"] for row in rows), rows


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("left_out", ["the loss's", "the incoming"])
def test_the_check_finds_what_a_gradient_leaves_out(benchmarks, name, left_out):
    """Even where the loss's is so small that its sum with the incoming one is right without it."""
    operation = _operations(benchmarks)[name]
    run = operation.kernel

    def faulty(*inputs):
        *others, weight, incoming = inputs
        weight, incoming = (0.0, incoming) if left_out == "the loss's" else (weight, torch.zeros_like(incoming))
        return run(*others, weight, incoming)

    *others, weight, incoming = operation.inputs
    operation = replace(operation, inputs=(*others, weight / 1000, incoming))
    assert all(row["right"] for row in benchmarks.operations.errors(operation))
    rows = benchmarks.operations.errors(replace(operation, kernel=faulty))
    assert not all(row["right"] for row in rows), rows


@pytest.mark.parametrize("name, output", [(name, i) for name, number in OPERATIONS.items() for i in range(number)])
def test_the_check_reads_every_output(benchmarks, name, output):
    operation = _operations(benchmarks)[name]

    def faulty(*inputs):
        result = operation.kernel(*inputs)
        found = list(result) if isinstance(result, tuple) else [result]
        wrong = found[output]
        found[output] = 1.02 * wrong if wrong.is_floating_point() else ~wrong
        return tuple(found)

    rows = benchmarks.operations.errors(replace(operation, kernel=faulty))
    assert {row["output"] for row in rows if not row["right"]} == {output}


@pytest.mark.parametrize("name", GRADIENTS)
def test_baselines_gather(benchmarks, name):
    """Adding by index, with atomics, would make them slower than they need be."""
    operation = _operations(benchmarks)[name]
    with _Calls() as calls:
        operation.run_eager()
    assert len(calls.names) > 3 and not [name for name in calls.names if "index_add" in name or "scatter" in name]


# Times


def test_the_cache_is_emptied_by_reading(benchmarks, monkeypatch):
    """What a flush writes is written back while the next kernel is timed."""
    properties = SimpleNamespace(L2_cache_size=1000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    flush = benchmarks.common.CacheFlush()
    assert flush.buffer.numel() * flush.buffer.element_size() > properties.L2_cache_size
    version, before = flush.buffer._version, flush.buffer.clone()
    with _Calls() as calls:
        flush()
    assert calls.names == ["aten::sum"] and not calls.written
    assert flush.buffer._version == version and torch.equal(flush.buffer, before)


class _GPU:
    """What ``timed`` calls of torch.cuda; notes what is enqueued, and advances a clock."""

    def __init__(self, monkeypatch, common):
        self.enqueued, self.host = [], 0.0
        self.sleeps = []
        monkeypatch.setattr(common, "on_gpu", lambda: True)
        monkeypatch.setattr(common, "_cache_flush", lambda: lambda: self.enqueued.append("flush"))
        monkeypatch.setattr(common, "_sleep_cycles_per_millisecond", lambda: 1000.0)
        monkeypatch.setattr(common.time, "perf_counter", lambda: self.host)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.enqueued.append("synchronize"))
        monkeypatch.setattr(torch.cuda, "_sleep", self._sleep)
        monkeypatch.setattr(torch.cuda, "Event", self._event)

    def _sleep(self, cycles):
        self.enqueued.append("sleep")
        self.sleeps.append(cycles)

    def _event(self, enable_timing):
        return SimpleNamespace(record=lambda: self.enqueued.append("event"), elapsed_time=lambda end: 0.25)

    def run(self):
        """Takes the host 3 ms to enqueue."""
        self.enqueued.append("run")
        self.host += 3e-3


def test_a_timed_call_is_enqueued_while_the_gpu_sleeps(benchmarks, monkeypatch):
    """A gap between its launches would otherwise count as its time."""
    gpu = _GPU(monkeypatch, benchmarks.common)
    times = benchmarks.common.timed(gpu.run, repeats=2, warm_up=1)
    assert times.device == 0.25 and times.host == pytest.approx(3.0)
    of_host = ["synchronize", "run"]
    of_gpu = ["flush", "sleep", "event", "run", "event"]
    assert gpu.enqueued == ["run", *of_host, *of_host, *of_gpu, *of_gpu, "synchronize"]
    assert all(cycles > 3 * 1000 for cycles in gpu.sleeps)


@pytest.mark.parametrize("only_reads", [False, True])
def test_a_transfer_moves_as_many_bytes_as_the_operation(benchmarks, monkeypatch, only_reads):
    tensors = []

    class Moved(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            if function._schema.name in ("aten::copy_", "aten::sum"):
                tensors.extend(x for x in arguments if isinstance(x, torch.Tensor))
            return function(*arguments, **(options or {}))

    def once(run):
        with Moved():
            run()
        return 2.0

    monkeypatch.setattr(benchmarks.common, "milliseconds", once)
    columns = benchmarks.common.against_transfer(4.0, 80_000_000, only_reads)
    assert len(tensors) == (1 if only_reads else 2)
    assert sum(x.numel() * x.element_size() for x in tensors) == 80_000_000
    assert columns["transfer"] == ("sum" if only_reads else "copy")
    assert columns["percent_of_transfer"] == 50.0 and columns["GB_per_s"] == 20.0


# Sweep


class _Case:
    """Milliseconds of a model by the options of the kernel, or what is raised."""

    def __init__(self, options_of, took):
        self._options_of, self._took = options_of, took

    def measure(self, kernel, repeats):
        took = self._took(self._options_of(kernel, 4))
        if isinstance(took, Exception):
            raise took
        return took


def _swept(benchmarks, took, other=lambda options: 1.0):
    """A sweep of the kernel ``mass`` on two models."""
    from megatron_moe_spec.kernels.options import options

    sweep = benchmarks.sweep.Sweep({"a": _Case(options, took), "b": _Case(options, other)})
    for candidate in benchmarks.sweep.candidates("mass"):
        sweep.measure("mass", candidate)
    return sweep


def test_the_fastest_over_all_models_wins(benchmarks):
    took = lambda options: {1: 0.9, 2: 0.5, 4: 1.0, 8: 1.1}[options["num_warps"]]  # noqa: E731
    other = lambda options: 1.1 if options["ELEMENTS"] == 1024 else 1.0  # noqa: E731
    sweep = _swept(benchmarks, took, other)
    assert sweep.winners()["mass"][4]["num_warps"] == 2 and sweep.winners()["mass"][4]["ELEMENTS"] != 1024
    assert not sweep.missing_defaults()


def test_the_default_stays_unless_another_is_faster_by_more_than_noise(benchmarks):
    assert _swept(benchmarks, lambda options: 1.0 if options["num_warps"] == 4 else 0.99).winners() == {}


def test_what_fails_is_skipped_and_named(benchmarks):
    took = lambda options: RuntimeError("out of resource: registers") if options["num_warps"] == 8 else 1.0  # noqa: E731
    sweep = _swept(benchmarks, took)
    skipped = [row for row in sweep.rows if row["result"] == "skipped: RuntimeError: out of resource: registers"]
    assert len(skipped) == 3 and all(row["options"]["num_warps"] == 8 for row in skipped)
    assert sweep.winners() == {} and not sweep.missing_defaults()
    assert _swept(benchmarks, lambda options: RuntimeError("no GPU")).missing_defaults() == ["mass"]


def test_what_is_wrong_does_not_win(benchmarks, monkeypatch):
    from megatron_moe_spec.kernels.options import DEFAULTS, options

    case = benchmarks.sweep.Case(benchmarks.common.Shape(16, 24, 8, 2), 6, 6)
    right = benchmarks.operations.mass_kernels.routed_mass

    def faulty(*inputs):
        mass, products = right(*inputs)
        return mass * (1.0 if options("mass", 4) == DEFAULTS["mass"][4] else 1.01), products

    monkeypatch.setattr(benchmarks.operations.mass_kernels, "routed_mass", faulty)
    sweep = benchmarks.sweep.Sweep({"a": case}, repeats=1)
    first, second = (sweep.measure("mass", candidate) for candidate in benchmarks.sweep.candidates("mass")[:2])
    assert first["result"] == "measured" and first["rating"] == 1.0
    assert second["result"].startswith("skipped: ArithmeticError: mass is wrong") and sweep.winners() == {}


def test_candidates_of_each_kernel_begin_with_its_default(benchmarks):
    from megatron_moe_spec.kernels.options import DEFAULTS

    turns = list(benchmarks.sweep.by_turns(DEFAULTS))
    assert [kernel for kernel, _ in turns[: len(DEFAULTS)]] == list(DEFAULTS)
    for kernel in DEFAULTS:
        default = DEFAULTS[kernel][benchmarks.sweep.ELEMENT_SIZES[kernel]]
        own = [candidate for name, candidate in turns if name == kernel]
        assert own[0] == default and len(own) > 5
        assert all(candidate.keys() == default.keys() for candidate in own)
