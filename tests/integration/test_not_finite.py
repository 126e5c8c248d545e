"""What is not finite is logged as such, and ends nothing."""

import math

import pytest
import torch
from loss_names import LOSS_NAMES, coefficients

from megatron_moe_spec import SpecConfig


@pytest.fixture
def step(mm):
    from megatron_moe_spec import attach

    def run(value, config):
        model = mm.build_model()
        with torch.no_grad():
            model.decoder.layers[0].mlp.router.weight[0, 0] = value
        handle = attach(model, config)
        mm.run_model(model, mm.micro_batches(1)[0]).mean().backward()
        return handle.end_step()

    return run


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_measured_step(step, value):
    values = step(value, SpecConfig(metrics_interval=1))
    first, *others = values["diagnostics"]["layers"]
    assert first["routing_entropy"] is None and first["router_singular_values"] is None
    assert first["specialization_loss"] != first["specialization_loss"]
    assert all(math.isfinite(layer["router_mean_abs_cos"]) for layer in others)


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_a_loss_is_nan_and_not_zero(step, name):
    assert math.isnan(step(math.nan, SpecConfig(**coefficients([name])))[name])


def test_the_file_has_null(step):
    from megatron_moe_spec.metrics.json_lines import finite

    values = finite(step(math.nan, SpecConfig(metrics_interval=1)))
    assert values["specialization_loss"] is None
    assert values["diagnostics"]["layers"][0]["specialization_loss"] is None
