"""pytest plugin: records what Megatron's unit tests compute on CPU, without the losses or with them attached.

For each test, a rank appends two lines of JSON to its file: that the test has started, and what it did. Recorded are,
as hashes of all bits:

- the output of every forward pass of every module, as the output of a whole model in bf16 hides small differences;
- the gradients of the parameters and inputs of the modules that the test itself calls, after every backward pass;
- the state of the random number generators when the test has ended.

With ``--suite-coefficient``, every module with MoE layers gets all losses that it takes when it is first called.
"""

import contextlib
import ctypes
import gc
import json
import math
import os
import random
import signal
import sys
import types
import weakref

from megatron_moe_spec import cpu

cpu.enable()  # before Megatron is imported

import groups  # noqa: E402
import numpy  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from hashes import gradient_hash, value_hash  # noqa: E402

from megatron_moe_spec.losses import LOSSES  # noqa: E402

groups.replace()
# Megatron's conftest would download data, which the tests of MoE layers do not read.
download = types.ModuleType("tests.test_utils.python_scripts.download_unit_tests_dataset")
download.download_and_extract_asset = lambda assets_dir=None: False
sys.modules[download.__name__] = download

RANK, PROCESSES = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
# Of prctl(2): the signal that a process gets when its parent dies.
PR_SET_PDEATHSIG = 1
# The losses in the order in which they are tried; the diagnostics are measured with the first.
PARTS = tuple(loss.name for loss in LOSSES)


def pytest_addoption(parser):
    parser.addoption("--suite-folder", required=True, help="where the records go")
    parser.addoption("--suite-coefficient", type=float, help="attach the losses with this coefficient")
    parser.addoption("--suite-done", help="file with the names of tests to leave out")


def pytest_configure(config):
    from megatron.core import parallel_state

    _die_first()
    groups.forget_with_model_parallelism(parallel_state)
    config.pluginmanager.register(Recorder(config.option), "suite-recorder")


class Recorder:
    """The hooks of pytest, and those in torch that tell what a test does."""

    def __init__(self, options):
        self._coefficient = options.suite_coefficient
        self._done = set(open(options.suite_done).read().splitlines()) if options.suite_done else set()
        self._file = open(os.path.join(options.suite_folder, f"{RANK}.jsonl"), "a", buffering=1)
        self._ranks = Ranks(os.path.join(options.suite_folder, f"store-{len(self._done)}"))
        self._ended = os.path.join(options.suite_folder, "ended")
        self._depth = 0
        self._record = None
        self._call, self._backward = torch.nn.Module.__call__, torch.autograd.backward
        torch.nn.Module.__call__ = lambda module, *args, **kwargs: self.call(module, *args, **kwargs)
        torch.autograd.backward = self.backward

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if item.nodeid not in self._done]
        # Objects of tests run collectives when they are deleted: at the same time on all ranks.
        gc.collect()
        gc.freeze()
        gc.disable()

    def pytest_collectreport(self, report):
        if report.failed:
            record = {"test": report.nodeid, "outcome": "failed", "text": report.longreprtext}
            self._file.write(json.dumps(record) + "\n")

    def pytest_sessionfinish(self, exitstatus):
        complete = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
        if RANK == 0 and exitstatus in complete:
            open(self._ended, "w").close()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        self._file.write(json.dumps({"test": item.nodeid}) + "\n")
        self._record = {
            "test": item.nodeid, "outcome": "passed", "text": "", "forwards": [], "gradients": [], "random": None,
            "losses": {}, "refusals": [], "errors": [],
        }  # fmt: skip
        self._modules, self._inputs, self._handles = {}, [], []
        self._attached = weakref.WeakSet()
        random.seed(1)
        numpy.random.seed(1)
        torch.manual_seed(1)
        yield
        for handle in self._handles:
            try:
                handle.detach()
            except Exception as error:
                self._record["errors"].append(f"detach: {error!r}")
        record, self._record = self._record, None
        self._modules, self._inputs, self._handles = {}, [], []
        self._file.write(json.dumps(record) + "\n")
        # Where they differ, a rank may have left others in a collective: a new start is safer than to go on.
        if not self._ranks.agree(record["outcome"]):
            os._exit(1)
        gc.collect()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item):
        result = yield
        self._record["random"] = _random_hash()
        if result.excinfo is None and self._ranks.agree("passed", len(self._handles)):
            for handle in self._handles:
                self._read_losses(handle)
        elif result.excinfo is not None:
            self._ranks.agree("not passed")

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):
        result = yield
        report = result.get_result()
        if report.outcome != "passed" and self._record["outcome"] == "passed":
            self._record["outcome"] = report.outcome
            self._record["text"] = str(report.longrepr[2] if report.skipped else report.longreprtext)[-3000:]

    def call(self, module, *args, **kwargs):
        """Stands in for ``Module.__call__``."""
        if self._record is None:
            return self._call(module, *args, **kwargs)
        if not self._depth:
            self._note_test_calls(module, (*args, *kwargs.values()))
        self._depth += 1
        try:
            output = self._call(module, *args, **kwargs)
        finally:
            self._depth -= 1
        self._record["forwards"].append([type(module).__name__, value_hash(output)])
        return output

    def _note_test_calls(self, module, inputs) -> None:
        if self._coefficient is not None:
            self._attach(module)
        self._modules[id(module)] = weakref.ref(module)
        self._inputs += [x for x in inputs if torch.is_tensor(x) and x.requires_grad and x.is_leaf]

    def backward(self, *args, **kwargs):
        """Stands in for ``torch.autograd.backward``."""
        self._backward(*args, **kwargs)
        if self._record is None:
            return
        for module in filter(None, (reference() for reference in self._modules.values())):
            gradients = [w.grad if w.grad is not None else getattr(w, "main_grad", None) for w in module.parameters()]
            self._record["gradients"].append([type(module).__name__, gradient_hash(gradients)])
        self._record["gradients"].append(["inputs", gradient_hash([x.grad for x in self._inputs])])

    def _attach(self, module) -> None:
        from megatron.core.transformer.moe.moe_layer import MoELayer

        from megatron_moe_spec import SpecConfig, attach
        from megatron_moe_spec.integration.hooks.micro_batch import Notes

        layers = [layer for layer in module.modules() if isinstance(layer, MoELayer)]
        if not layers or any(layer in self._attached for layer in layers):
            return
        self._attached.update(layers)
        accepted = {}
        for part in PARTS:
            settings = {f"{part}_coeff": self._coefficient}
            if part == PARTS[0]:
                settings["metrics_interval"] = 1
            try:
                attach(module, SpecConfig(**accepted, **settings)).detach()
            except ValueError as error:
                self._record["refusals"].append(f"{part}: {error}")
            else:
                accepted.update(settings)
        if accepted:
            # Some of these tests run no backward pass, without which a value does not count.
            Notes.add = lambda self, note, *args: note(*args)
            self._handles.append(attach(module, SpecConfig(**accepted)))

    def _read_losses(self, handle) -> None:
        values = handle.end_step()
        diagnostics = values.pop("diagnostics", None)
        # A loss may be 0; then the measured routing tells whether there was any. There is none in evaluation.
        ran = diagnostics is not None and any(layer["routing_entropy"] for layer in diagnostics["layers"])
        for name, value in values.items():
            if not math.isfinite(value):
                self._record["errors"].append(f"{name} is {value}")
            elif getattr(handle.config, f"{name}_coeff") and (value or ran):  # not one that is measured alone
                self._record["losses"][name] = value


class Ranks:
    """Tells whether all ranks say the same."""

    def __init__(self, path: str):
        self._store = dist.FileStore(path, PROCESSES)
        self._store.set_timeout(2 * groups.TIMEOUT)
        self._number = 0

    def agree(self, *words) -> bool:
        self._number += 1
        self._store.set(f"{self._number}/{RANK}", repr(words))
        try:
            return len({self._store.get(f"{self._number}/{rank}") for rank in range(PROCESSES)}) == 1
        except RuntimeError:  # a rank has gone, or hangs
            os._exit(1)


def _die_first() -> None:
    """Makes Linux kill this process when torchrun has ended, and before any other when the memory is used up."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        with open("/proc/self/oom_score_adj", "w") as score:
            score.write("1000")


def _random_hash() -> str:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    tracked = get_cuda_rng_tracker().get_states()
    return value_hash([torch.get_rng_state(), repr(random.getstate()), repr(numpy.random.get_state()), tracked])
