import gc
import os

# Before torch: several processes share the machine's few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before triton, by whomever it is imported: kernels run on CPU, in an interpreter. 0: on the GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from interpreter import remember_builtins
from processes import HAS_MEGATRON, starts

remember_builtins()


@pytest.fixture(scope="session")
def megatron(tmp_path_factory):
    """Megatron-Core on CPU in this process, as a job of one rank."""
    if not HAS_MEGATRON:
        pytest.skip("megatron-core is not installed")
    from megatron_moe_spec.cpu import enable

    enable()
    from deep_ep_on_gloo import use_deep_ep

    use_deep_ep()
    from grouped_linear import use_torch_grouped_linear

    use_torch_grouped_linear()
    import megatron_models

    megatron_models.initialize_one_rank(str(tmp_path_factory.mktemp("store") / "store"))
    gc.collect()
    gc.freeze()  # the collector need not look through all that was imported, time and again


@pytest.fixture
def mm(megatron):
    import megatron_models

    return megatron_models


@pytest.fixture
def trainers(mm, monkeypatch):
    """With Megatron's scale of auxiliary losses as for one micro-batch, whatever ran before."""
    import torch
    import trainers
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", torch.ones(1))

    return trainers


@pytest.fixture
def random():
    """A seeded torch.randn in float64."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


# What a module imports to start other processes, from forks.py and processes.py.
STARTERS = {"ranks", "program", "torchrun", "python"}


def pytest_collection_modifyitems(items):
    """Marks each test by what it needs, so that no list of them can be wrong; the markers are in pyproject.toml."""
    for item in items:
        needs = []
        if "megatron" in item.fixturenames:
            needs.append("megatron")
        if STARTERS & vars(item.module).keys():
            needs.append("multiprocess")
        for name in needs or ["unit"]:
            item.add_marker(name)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    """What a test, with its fixtures, spent on starting processes: .ci/times.py reads it in JUnit's file."""
    for name, seconds in starts.items():
        if seconds:
            item.user_properties.append((name, f"{len(seconds)} {sum(seconds):.3f}"))
            seconds.clear()


def pytest_terminal_summary(terminalreporter):
    """The table of what the layout tests measured."""
    reports = [r for outcome in ("passed", "failed") for r in terminalreporter.stats.get(outcome, [])]
    rows = [value for r in reports for name, value in getattr(r, "user_properties", []) if name == "errors"]
    if rows:
        terminalreporter.section("relative error against one process")
        for row in ("layout | model | losses | worst gradient | worst gradient without the losses", *rows):
            terminalreporter.write_line(f"| {row} |")
