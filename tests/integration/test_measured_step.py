"""The end of a measured step: what it costs does not grow with the number of layers, which have values of their own."""

import json

import pytest
import torch
from forks import ranks
from processes import needs_megatron
from test_layouts import CP

pytestmark = [needs_megatron, pytest.mark.slow]

LAYERS = (2, 5)


def _assert_constant(found: list[dict], collectives: dict[str, int]) -> None:
    fewer, more = found
    assert more == fewer
    assert set(more["all-reduces"].values()) == {1}  # of an operation over a group
    operations = [operation for operation, _ in more["all-reduces"]]
    assert {operation: operations.count(operation) for operation in operations} == collectives
    assert more["waits"]["cpu"] == more["eigvalsh"] == 1


def test_one_process(megatron):
    from measured_steps import cost

    # Over the ranks of the stage, and over the stages.
    _assert_constant([cost(num_layers) for num_layers in LAYERS], {"SUM": 2, "MAX": 2})


def test_ranks_that_share_micro_batches(tmp_path):
    output = tmp_path / "cost"
    ranks(2, "measured_steps.py", output, json.dumps([{CP: 2}, LAYERS]))
    for rank in range(2):
        # The loads of micro-batches, too, and their numbers: over the ranks that share them.
        _assert_constant(torch.load(f"{output}.{rank}", weights_only=False), {"SUM": 3, "MAX": 3})


def test_layers_with_different_numbers_of_micro_batches(megatron):
    from megatron_moe_spec import SpecConfig
    from megatron_moe_spec.integration.step.clock import StepClock
    from megatron_moe_spec.integration.step.diagnostics import StepDiagnostics
    from megatron_moe_spec.integration.step.losses import StepLosses

    config = SpecConfig(metrics_interval=1)
    clock = StepClock(config)
    diagnostics = StepDiagnostics(config, clock, [0, 1, 2], num_experts=4, top_k=1)
    one, both = torch.eye(4, dtype=torch.bool)[[0, 0]], torch.eye(4, dtype=torch.bool)[[0, 1]]
    for layer, active_TE in ((0, one), (0, both), (2, both)):
        diagnostics.measure_routing(layer, active_TE.float(), active_TE, 2)
    _, measures = diagnostics.reduce(StepLosses(config, clock, [0, 1, 2]))
    assert [layer["max_violation_micro_batch"] for layer in measures["layers"]] == [2.0, None, 1.0]
    assert [layer["load"] for layer in measures["layers"]] == [[3, 1, 0, 0], [0] * 4, [1, 1, 0, 0]]
