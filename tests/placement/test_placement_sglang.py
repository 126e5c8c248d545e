"""SGLang's own loader, from its wheel, reads the files."""

import importlib
import os
import subprocess
import sys
import zipfile
from types import ModuleType, SimpleNamespace

import pytest
import torch
from traces import random_trace

from megatron_moe_spec.placement.eplb import rebalance_experts
from megatron_moe_spec.placement.formats import FORMATS
from megatron_moe_spec.placement.objectives import place_by_load
from megatron_moe_spec.placement.placement import Cluster
from megatron_moe_spec.traces.counts import loads

pytestmark = [pytest.mark.slow, pytest.mark.once]

_TRACE = random_trace(400, 3, 12, 2, seed=0, num_dense=2)
_CLUSTER = Cluster(12, 4, num_redundant=4)


@pytest.fixture(scope="module")
def wheel_folder(tmp_path_factory):
    """The part of SGLang's wheel that places experts."""
    folder = tmp_path_factory.mktemp("sglang")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--python-version",
        "3.11",
    ]
    done = subprocess.run([*command, "--dest", folder, "sglang==0.5.23"], capture_output=True, text=True)
    if done.returncode:
        assert "CI" not in os.environ, done.stderr
        pytest.skip("SGLang's wheel cannot be downloaded")
    with zipfile.ZipFile(next(folder.glob("sglang-*.whl"))) as wheel:
        wheel.extractall(folder, [name for name in wheel.namelist() if name.startswith("sglang/srt/eplb/")])
    return folder


@pytest.fixture
def load(wheel_folder, monkeypatch):
    """SGLang's reading of ``--init-expert-location``, with the settings of the server that it asks for."""
    settings = SimpleNamespace(
        ep_num_redundant_experts=_CLUSTER.num_redundant,
        moe_a2a_backend="none",
        ep_dispatch_algorithm=None,
        eplb_algorithm="deepseek",
    )
    parallel = SimpleNamespace(ep_size=_CLUSTER.num_devices, nnodes=1, elastic_ep_initial_size=None)
    context = ModuleType("sglang.srt.runtime_context")
    context.get_device = lambda: SimpleNamespace(device="cpu")
    context.get_exec = lambda: SimpleNamespace(moe=settings)
    context.get_parallel = lambda: parallel
    context.get_resources = None
    monkeypatch.syspath_prepend(wheel_folder)
    monkeypatch.setitem(sys.modules, context.__name__, context)
    location = importlib.import_module("sglang.srt.eplb.expert_location")
    of_model = location.ModelConfigForExpertLocation(_TRACE.num_layers, _TRACE.num_experts)
    model = SimpleNamespace(get_model_config_for_expert_location=lambda config: of_model)
    loader = ModuleType("sglang.srt.model_loader")
    loader.get_model_architecture = lambda config: (model, None)
    monkeypatch.setitem(sys.modules, loader.__name__, loader)

    def read(path):
        settings.init_expert_location = str(path)
        return location.compute_initial_expert_location_metadata(SimpleNamespace(hf_config=None), moe_ep_rank=0)

    yield read
    for name in [name for name in sys.modules if name.partition(".")[0] == "sglang"]:
        del sys.modules[name]


@pytest.mark.parametrize("suffix", FORMATS["sglang"].suffixes)
def test_it_reproduces_the_placement(suffix, load, tmp_path):
    placement = place_by_load(_TRACE, _CLUSTER)
    FORMATS["sglang"].write(placement, _TRACE, tmp_path / f"experts{suffix}")
    found = load(tmp_path / f"experts{suffix}")
    assert torch.equal(found.physical_to_logical_map[2:], placement.logical_MS)
    assert torch.equal(found.logical_to_all_physical_map_num_valid[2:], placement.replicas())
    devices = [
        [[int(slot) // 4 for slot in row if slot >= 0] for row in rows] for rows in found.logical_to_all_physical_map
    ]
    expected = [[[device for device in row if device >= 0] for row in rows] for rows in placement.devices().tolist()]
    assert devices[2:] == expected


def test_it_takes_the_counts_for_its_own_load_balancer(load, tmp_path):
    FORMATS["ktransformers"].write(place_by_load(_TRACE, _CLUSTER), _TRACE, tmp_path / "experts.pt")
    found = load(tmp_path / "experts.pt")
    assert torch.equal(found.physical_to_logical_map[2:], rebalance_experts(loads(_TRACE), 16, 1, 1, 4))
