"""The caller's inference mode, autocast, default device and default dtype change nothing of what the losses compute."""

import contextlib

import pytest
import torch
from loss_names import LOSS_NAMES, coefficients

from megatron_moe_spec import SpecConfig

ALL = SpecConfig(**coefficients(LOSS_NAMES), metrics_interval=1)
PATHWAY = SpecConfig(**coefficients(LOSS_NAMES), coupling_type="pathway", metrics_interval=1)


@contextlib.contextmanager
def _default_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def _default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default device": _default_device,
    "default dtype": _default_dtype,
}


@pytest.fixture
def train(mm, trainers):
    def train(model):
        for batch in mm.micro_batches(2):
            (0.0 * mm.run_model(model, batch).mean()).backward()
        return trainers.gradients_of(model)

    return train


@pytest.mark.parametrize("config", [ALL, PATHWAY], ids=["mass", "pathway"])
@pytest.mark.parametrize("mode", MODES)
def test_calls_from_another_mode(mm, trainers, train, mode, config):
    """Of every public call; training itself runs as it always does."""
    from megatron_moe_spec import attach

    found = []
    for around in (contextlib.nullcontext, MODES[mode]):
        model = mm.build_model()
        with around():
            handle = attach(model, config)
            handle.start_after(4)
        values = []
        for _ in range(2):
            gradients = train(model)
            with around():
                values.append(handle.end_step())
        with around():
            handle.detach()
        found.append((gradients, values))
    (expected, expected_values), (gradients, values) = found
    assert values == expected_values
    trainers.assert_identical(gradients, expected)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_training_under_autocast_computes_the_losses_in_their_own_precision(mm, train, kernels):
    """The experts' rows are rounded by what made them; what is computed of them, and of the weights, is not."""
    from megatron_moe_spec import attach

    if kernels == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    config = SpecConfig(specialization_loss_coeff=1.0, coupling_loss_coeff=1.0, erc_loss_coeff=1.0, kernels=kernels)
    found = []
    for around in (contextlib.nullcontext, MODES["autocast"]):
        model = mm.build_model()
        handle = attach(model, config)
        with around():
            gradients = train(model)
        found.append((gradients, handle.end_step()))
    (expected, expected_values), (gradients, values) = found
    assert values["erc_loss"] == pytest.approx(expected_values["erc_loss"], rel=1e-6)
    assert values == pytest.approx(expected_values, rel=0.05)
    assert gradients.keys() == expected.keys()
    for name in (name for name in gradients if "linear_fc1" in name):
        torch.testing.assert_close(gradients[name], expected[name], rtol=0.1, atol=0.05, msg=name)


def test_training_under_another_default_dtype(mm, train):
    from megatron_moe_spec import attach

    found = []
    for around in (contextlib.nullcontext, _default_dtype):
        model = mm.build_model()
        handle = attach(model, PATHWAY)
        with around():
            gradients = train(model)
        found.append((gradients, handle.end_step()))
    (expected, expected_values), (gradients, values) = found
    assert {name: values[name] for name in LOSS_NAMES} == pytest.approx(
        {name: expected_values[name] for name in LOSS_NAMES}, rel=1e-5
    )
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
