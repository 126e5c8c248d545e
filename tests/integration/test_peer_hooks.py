"""The hooks of the orthogonality, score variance and ERC losses: what is theirs alone; the rest is in test_hooks."""

import dataclasses
from types import SimpleNamespace

import loss_names
import pytest
import torch
from example_loss import RoutingInformation
from loss_names import coefficients
from other_losses import LengthSpread

from megatron_moe_spec import SpecConfig

PEERS = SpecConfig(**coefficients(loss_names.PEERS))
ORTHOGONALITY, ERC = SpecConfig(orthogonality_loss_coeff=1.0), SpecConfig(erc_loss_coeff=1.0)


def _attach(model, config=PEERS):
    from megatron_moe_spec import attach

    return attach(model, config)


@pytest.mark.parametrize("grouped", [False, True])
def test_orthogonality_sends_no_gradient_into_its_router(mm, grouped):
    """The last layer's router reaches the loss only through the probability, which is divided out."""
    model = mm.build_model(num_layers=1, moe_grouped_gemm=grouped)
    _attach(model, ORTHOGONALITY)
    gradients = mm.train_step(model, mm.micro_batches(2))
    router = next(g for name, g in gradients.items() if "router.weight" in name)
    experts = max(float(g.norm()) for name, g in gradients.items() if "experts" in name and "linear_fc2" in name)
    assert experts > 1e-3
    assert float(router.norm()) < 1e-6 * experts


def test_erc_reaches_routers_and_gates_alone(mm):
    model = mm.build_model()
    _attach(model, ERC)
    for name, gradient in mm.train_step(model, mm.micro_batches(2)).items():
        if "router.weight" in name:
            assert gradient.norm() > 1e-3
        elif "experts" in name and "linear_fc1" in name:
            gate, linear = gradient.chunk(2)
            assert gate.norm() > 1e-3 and linear.abs().max() == 0.0
        else:
            assert gradient.abs().max() == 0.0, name


def test_erc_does_not_depend_on_the_data(mm):
    """Neither the value nor the gradient: not on tokens, on their number, or on the number of micro-batches."""
    seen = []
    for batches in (mm.micro_batches(1), mm.micro_batches(3, seed=5)):
        model = mm.build_model()
        handle = _attach(model, ERC)
        seen.append((mm.train_step(model, batches), handle.end_step()))
    (gradients, values), (other_gradients, other_values) = seen
    assert values == pytest.approx(other_values, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-5, atol=1e-7)


def test_noise_of_erc_is_drawn_per_layer_and_step(mm, monkeypatch):
    from megatron_moe_spec.integration.taps import expert_weights

    draw, seeds = expert_weights.router_noise, []
    monkeypatch.setattr(expert_weights, "router_noise", lambda weight, seed: seeds.append(seed) or draw(weight, seed))
    model = mm.build_model(num_layers=2)
    handle = _attach(model, ERC)
    values = []

    def step(number_of_micro_batches):
        for batch in mm.micro_batches(number_of_micro_batches):
            mm.run_model(model, batch).sum().backward()
        values.append(handle.end_step()["erc_loss"])

    step(2)
    step(1)
    handle.start_after(0)  # a resumed run
    step(1)
    first, second, third = seeds[:2], seeds[4:6], seeds[6:]
    assert seeds[2:4] == first == third, "the micro-batches of a step share their noise"
    assert len({*first, *second}) == 4
    assert values[0] == pytest.approx(values[2], rel=1e-6) and values[1] != values[0]


@pytest.mark.parametrize("first", ["adds", "overwrites"])
def test_erc_adds_to_gradients_that_a_fused_linear_layer_accumulates(mm, monkeypatch, first):
    """--gradient-accumulation-fusion: linear layers write into main_grad, and DDP drops what comes by autograd.

    Transformer Engine's overwrite it in the first micro-batch (``is_first_microbatch`` in its module/linear.py).
    """
    from megatron.core.tensor_parallel import layers

    written = set()

    def accumulate(inputs, output_gradients, main_gradient):
        if first == "overwrites" and main_gradient.data_ptr() not in written:
            main_gradient.zero_()
        written.add(main_gradient.data_ptr())
        main_gradient.add_(output_gradients.T @ inputs)

    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    fused = SimpleNamespace(wgrad_gemm_accum_fp32=accumulate)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", fused, raising=False)
    batches, found = mm.micro_batches(2), []
    for fusion in (False, True):
        model = mm.build_model(gradient_accumulation_fusion=fusion)
        _attach(model)
        found.append(mm.train_step(model, batches, main_loss_weight=1.0))
        if fusion:
            assert any(getattr(p, "grad_added_to_main_grad", False) for p in model.parameters())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    model = mm.build_model()
    _attach(model, dataclasses.replace(PEERS, erc_loss_coeff=0.0))
    without = mm.train_step(model, batches, main_loss_weight=1.0)
    assert any((found[1][name] - g).norm() > 0.01 * g.norm() for name, g in without.items() if "linear_fc1" in name)


def test_losses_of_a_measured_step(mm):
    """Measuring adds the two losses of this package's paper, whatever is trained on."""
    model = mm.build_model()
    handle = _attach(model, SpecConfig(score_variance_loss_coeff=1.0, metrics_interval=2))
    for expected in ({"score_variance_loss"}, {"score_variance_loss", "specialization_loss", "coupling_loss"}):
        mm.run_model(model, mm.micro_batches(1)[0]).sum().backward()
        assert handle.end_step().keys() - {"diagnostics"} == expected


def test_losses_of_the_scores_share_one_node_and_one_normalisation_each_way(mm, monkeypatch):
    from megatron_moe_spec.integration.taps import scores

    normalize, calls = scores.normalized_scores, []
    monkeypatch.setattr(
        scores, "normalized_scores", lambda *args, **options: calls.append(args) or normalize(*args, **options)
    )
    nodes, add_gradient = [], scores.add_gradient
    monkeypatch.setattr(scores, "add_gradient", lambda *args: nodes.append(args) or add_gradient(*args))
    model = mm.build_model(num_layers=3)
    handle = _attach(model, SpecConfig(score_variance_loss_coeff=1.0, extra_losses=(RoutingInformation(1.0),)))
    loss = mm.run_model(model, mm.micro_batches(1)[0]).sum()
    assert len(nodes) == len(calls) == 3
    loss.backward()
    assert len(calls) == 6
    assert handle.end_step().keys() == {"score_variance_loss", "routing_information_loss"}


@pytest.mark.parametrize("stride, number", [(1, 1), (3, 2)])
def test_losses_of_the_same_rows_share_a_tap_unless_their_strides_differ(mm, stride, number):
    model = mm.build_model(num_layers=1)
    settings = dict(
        specialization_loss_coeff=1.0, specialization_token_stride=stride, extra_losses=(LengthSpread(1.0),)
    )
    _attach(model, SpecConfig(**settings))
    for expert in model.decoder.layers[0].mlp.experts.local_experts:
        assert len(expert.linear_fc2._forward_pre_hooks) == number
