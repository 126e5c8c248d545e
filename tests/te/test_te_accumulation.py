"""Gradient accumulation fusion, Megatron's default: linear layers write their weights' gradients into ``main_grad``.

Transformer Engine's overwrite what is there in what they take for the first micro-batch, and add in the others:
whatever else trains an expert's weight has to come after them. Megatron marks the first micro-batch of a run, and with
fp8 or fp4 of every step.
"""

import pytest
from loss_names import BOTH, LOSS_NAMES, coefficients
from test_gradients import SELECTIVE
from test_layouts import FULL_RECOMPUTE

from megatron_moe_spec import SpecConfig, attach

FUSION = dict(gradient_accumulation_fusion=True)
GROUPED = dict(moe_grouped_gemm=True)
MODELS = {
    "sequential": {},
    "grouped": GROUPED,
    "grouped, moe_act recompute": dict(
        **GROUPED, **SELECTIVE, recompute_modules=["moe_act"], bias_activation_fusion=True
    ),
    "grouped, moe recompute": dict(**GROUPED, **SELECTIVE, recompute_modules=["moe"]),
    "sequential, full recompute": FULL_RECOMPUTE,
}


def _train(mm, settings: dict, names, marks_every_step: bool, main_loss_weight: float) -> list[tuple]:
    """(gradients, logged values) of two steps of two micro-batches."""
    model = mm.build_model(**settings)
    handle = attach(model, SpecConfig(kernels="torch", **coefficients(names, 1.0)))
    steps = []
    for _ in range(2):
        handle.start_after(0)  # the same noise in both
        for module in model.modules():
            if marks_every_step and hasattr(module, "is_first_microbatch"):
                module.is_first_microbatch = True
        steps.append((mm.train_step(model, mm.micro_batches(2), main_loss_weight=main_loss_weight), handle.end_step()))
    return steps


def check_accumulation(mm, plain: dict, fused: dict, names, marks_every_step: bool, main_loss_weight: float) -> None:
    """That a model of the second settings gets the gradients and logged values of the first's."""
    expected_steps = _train(mm, plain, names, marks_every_step, main_loss_weight)
    found_steps = _train(mm, fused, names, marks_every_step, main_loss_weight)
    for (expected, expected_values), (found, values) in zip(expected_steps, found_steps):
        assert values == pytest.approx(expected_values, rel=1e-6)
        scale = max(float(gradient.norm()) for gradient in expected.values())
        assert scale > 1e-4
        for name, gradient in expected.items():
            assert float((found[name] - gradient).norm()) <= 1e-5 * (float(gradient.norm()) + 0.1 * scale), name


@pytest.mark.parametrize("names", [[], ["erc_loss"], LOSS_NAMES], ids=["none", "ERC", "all"])
@pytest.mark.parametrize("marks_every_step", [False, True], ids=["marked once", "marked every step"])
@pytest.mark.parametrize("model", MODELS)
def test_accumulated_gradients_are_those_of_autograd(mm, model, marks_every_step, names):
    settings, weight = MODELS[model], 0.0 if names == ["erc_loss"] else 0.1
    check_accumulation(mm, settings, {**settings, **FUSION}, names, marks_every_step, weight)


def test_linear_layers_overwrite_in_the_first_micro_batch(mm):
    """What the tests above are there for: it is so in this release of Transformer Engine."""
    model = mm.build_model(num_layers=1, **GROUPED, **FUSION)
    mm.train_step(model, mm.micro_batches(1), main_loss_weight=0.1)
    experts, (batch,) = model.decoder.layers[0].mlp.experts, mm.micro_batches(1)
    weight = experts.linear_fc1.weight0
    found = []
    for first in (True, False):
        for module in model.modules():
            if hasattr(module, "is_first_microbatch"):
                module.is_first_microbatch = first
        weight.main_grad.fill_(1e3)
        mm.run_model(model, batch).sum().backward()
        found.append(float(weight.main_grad.abs().max()))
    assert found[0] < 500 < found[1]


def test_backward_of_dispatch_overlapped_with_the_experts_weights(mm):
    """The experts' weight gradients come later, by a call of theirs. ERC, which adds to them, is refused there."""
    settings = {**GROUPED, **FUSION}
    overlapped = dict(overlap_dispatch_backward_with_experts_wgrad=True, **settings)
    check_accumulation(mm, settings, overlapped, [*BOTH, "orthogonality_loss"], False, 0.1)
    with pytest.raises(ValueError, match="ERC.*overlap-dispatch-backward-with-experts-wgrad"):
        _train(mm, overlapped, ["erc_loss"], False, 0.1)
