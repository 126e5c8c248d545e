"""Placements as files: what an engine reads from them is the placement."""

import json

import pytest
import torch
from traces import random_trace

from megatron_moe_spec.placement.formats import FORMATS
from megatron_moe_spec.placement.placement import Cluster, random
from megatron_moe_spec.traces.counts import loads

pytestmark = pytest.mark.once

# Layers 2 to 4 of 5 have experts: 12 on 4 devices, with 4 redundant ones.
_TRACE = random_trace(50, 3, 12, 2, seed=0, num_dense=2)
_PLACEMENT = random(Cluster(12, 4, num_redundant=4), _TRACE.layers)


def _write(name, path):
    FORMATS[name].write(_PLACEMENT, _TRACE, path)
    return path


@pytest.mark.parametrize("suffix", FORMATS["sglang"].suffixes)
def test_sglang_maps_the_slots_of_all_layers(suffix, tmp_path):
    path = _write("sglang", tmp_path / f"experts{suffix}")
    found = torch.load(path, weights_only=True) if suffix == ".pt" else json.loads(path.read_text())
    assert list(found) == ["physical_to_logical_map"]
    rows = torch.as_tensor(found["physical_to_logical_map"])
    assert rows[:2].tolist() == [[*range(12), 0, 1, 2, 3]] * 2
    assert torch.equal(rows[2:], _PLACEMENT.logical_MS)


def test_ktransformers_counts_the_tokens_of_all_layers(tmp_path):
    found = torch.load(_write("ktransformers", tmp_path / "experts.pt"), weights_only=True)
    assert list(found) == ["logical_count"] and found["logical_count"].shape == (1, 5, 12)
    assert not found["logical_count"][0, :2].any()
    assert torch.equal(found["logical_count"][0, 2:], loads(_TRACE))


def test_trtllm_assigns_slots_by_the_number_of_the_layer(tmp_path):
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load(_write("trtllm", tmp_path / "experts.yaml").read_text())
    assert found == {
        "num_slots": 16,
        "initial_global_assignments": dict(zip((2, 3, 4), _PLACEMENT.logical_MS.tolist())),
        "layer_updates_per_iter": 0,
    }


def test_vllm_ascend_lists_the_experts_of_devices_by_moe_layer(tmp_path):
    found = json.loads(_write("vllm-ascend", tmp_path / "experts.json").read_text())
    assert found["moe_layer_count"] == 3
    for number, layer in enumerate(found["layer_list"]):
        assert layer["layer_id"] == number and layer["device_count"] == 4
        assert [device["device_id"] for device in layer["device_list"]] == [0, 1, 2, 3]
        experts = [device["device_expert"] for device in layer["device_list"]]
        assert experts == _PLACEMENT.logical_MS[number].view(4, 4).tolist()
