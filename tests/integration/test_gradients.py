"""The hooks' gradients and logged values equal autograd's through the pure losses, in every supported mode."""

import inspect
from functools import partial

import pytest
import torch
from loss_names import BOTH, LOSS_NAMES, PEERS
from other_losses import losses_of_ones_own
from processes import needs_hybrid_model

FULL = dict(recompute_granularity="full", recompute_num_layers=1)
SELECTIVE = dict(recompute_granularity="selective")
# Of 1 in fp32: coupling is one minus a number, which is 1 where every token goes to all experts.
ROUNDING = 6e-8
FUSED_SWIGLU = dict(moe_grouped_gemm=True, bias_activation_fusion=True)
RECOMPUTE_FIELDS = ("recompute_granularity", "recompute_num_layers", "recompute_method", "recompute_modules")

# name -> (fields of TransformerConfig, properties of the data)
MODES = {
    "sequential_alltoall": ({}, {}),
    "sequential_allgather": (dict(moe_token_dispatcher_type="allgather"), {}),
    "grouped": (dict(moe_grouped_gemm=True), {}),
    "grouped_allgather": (dict(moe_grouped_gemm=True, moe_token_dispatcher_type="allgather"), {}),
    "grouped_moe_act_recompute": (dict(moe_grouped_gemm=True, recompute_modules=["moe_act"], **SELECTIVE), {}),
    "grouped_moe_recompute": (dict(moe_grouped_gemm=True, recompute_modules=["moe"], **SELECTIVE), {}),
    "grouped_full_recompute": (dict(moe_grouped_gemm=True, recompute_method="uniform", **FULL), {}),
    "full_recompute_uniform": (dict(recompute_method="uniform", **FULL), {}),
    "full_recompute_groups_of_two": (
        dict(recompute_method="uniform", recompute_granularity="full", recompute_num_layers=2, num_layers=4),
        {},
    ),
    "full_recompute_block": (dict(recompute_method="block", **FULL), {}),
    "moe_recompute": (dict(recompute_modules=["moe"], **SELECTIVE), {}),
    "core_attn_recompute": (dict(recompute_modules=["core_attn"], **SELECTIVE), {}),
    "shared_expert": (dict(moe_shared_expert_intermediate_size=16), {}),
    "dense_layer_between": (dict(num_layers=4, moe_layer_freq=[1, 0, 1, 1]), {}),
    "capacity_dropping": (dict(moe_expert_capacity_factor=0.7), {}),
    "capacity_dropping_by_position": (
        dict(moe_expert_capacity_factor=0.7, moe_token_drop_policy="position"),
        {},
    ),
    "capacity_with_padding": (
        dict(moe_expert_capacity_factor=0.8, moe_pad_expert_input_to_capacity=True),
        {},
    ),
    "capacity_with_padding_grouped": (
        dict(moe_grouped_gemm=True, moe_expert_capacity_factor=1.2, moe_pad_expert_input_to_capacity=True),
        {},
    ),
    "padding_mask": ({}, dict(padding=True)),
    "padding_mask_full_recompute": (dict(recompute_method="uniform", **FULL), dict(padding=True)),
    "per_token_loss": (dict(calculate_per_token_loss=True), {}),
    "per_token_loss_padding_mask": (dict(calculate_per_token_loss=True), dict(padding=True)),
    "sigmoid_expert_bias": (
        dict(
            moe_router_score_function="sigmoid",
            moe_router_enable_expert_bias=True,
            moe_router_bias_update_rate=1e-3,
        ),
        {},
    ),
    "sqrtsoftplus": (dict(moe_router_score_function="sqrtsoftplus"), {}),
    "group_limited": (
        dict(
            num_moe_experts=8,
            moe_router_num_groups=4,
            moe_router_group_topk=2,
            moe_router_pre_softmax=True,
            moe_router_topk=3,
        ),
        {},
    ),
    "top_3_of_12": (dict(num_moe_experts=12, moe_router_topk=3), {}),
    "all_experts": (dict(moe_router_topk=4), {}),
    "grouped_with_biases": (dict(moe_grouped_gemm=True, add_bias_linear=True), {}),
    "interleaved_gates": (dict(moe_grouped_gemm=True, moe_mlp_glu_interleave_size=4), {}),
    "fused_swiglu": (FUSED_SWIGLU, {}),
    "fused_swiglu_full_recompute": (dict(**FUSED_SWIGLU, recompute_method="uniform", **FULL), {}),
    "fused_swiglu_moe_recompute": (dict(**FUSED_SWIGLU, recompute_modules=["moe"], **SELECTIVE), {}),
    "fused_swiglu_moe_act_recompute": (dict(**FUSED_SWIGLU, recompute_modules=["moe_act"], **SELECTIVE), {}),
    "fused_swiglu_capacity_with_padding": (
        dict(**FUSED_SWIGLU, moe_expert_capacity_factor=1.2, moe_pad_expert_input_to_capacity=True),
        {},
    ),
    "fused_swiglu_padding_mask": (dict(**FUSED_SWIGLU, moe_router_topk=3), dict(padding=True)),
    "fused_swiglu_of_each_expert": (dict(bias_activation_fusion=True), {}),
    "sinkhorn": (dict(moe_router_load_balancing_type="sinkhorn"), {}),
}

# What differs for the kernels: rows in one part or many, recomputed, with gaps, of other tokens; every score function.
TRITON_MODES = [
    "sequential_alltoall",
    "grouped",
    "grouped_allgather",
    "grouped_moe_act_recompute",
    "grouped_full_recompute",
    "capacity_with_padding_grouped",
    "padding_mask",
    "per_token_loss",
    "sigmoid_expert_bias",
    "sqrtsoftplus",
    "top_3_of_12",
    *(mode for mode in MODES if mode.startswith("fused_swiglu")),
]


def _fields(settings: dict) -> dict:
    """Skips a mode that this release of Megatron does not have."""
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
    from megatron.core.transformer.transformer_config import TransformerConfig

    if "moe_mlp_glu_interleave_size" in settings and not hasattr(TransformerConfig, "moe_mlp_glu_interleave_size"):
        pytest.skip("this Megatron has no interleaved gates")
    if settings.get("moe_router_score_function") == "sqrtsoftplus":
        if "sqrtsoftplus" not in inspect.getsource(topk_routing_with_score_function):
            pytest.skip("this Megatron has no sqrtsoftplus scores")
    return settings


def _compare(
    settings: dict,
    data: dict,
    kind: str = "mass",
    names=BOTH,
    build=None,
    coefficients=None,
    extra_losses=(),
    options=None,
    reference=None,
    tolerance=1e-5,
    **step,
):
    """Of a model with these settings; ``reference`` are those of the model that autograd goes through, if others."""
    import megatron_models
    from reference import reference_step

    from megatron_moe_spec import SpecConfig, attach

    build = build or megatron_models.build_model
    batches = megatron_models.micro_batches(3, **data)
    plain = {k: v for k, v in (reference or settings).items() if k not in RECOMPUTE_FIELDS}
    weights = coefficients or dict.fromkeys(names, 1.0)
    fields = {"kernels": "torch", **(options or {}), **{f"{name}_coeff": weight for name, weight in weights.items()}}
    config = SpecConfig(coupling_type=kind, extra_losses=extra_losses, **fields)
    expected, expected_values = reference_step(build(**plain), batches, config)
    model = build(**settings)
    handle = attach(model, config)
    found = megatron_models.train_step(model, batches, **step)
    values = handle.end_step()
    assert values.keys() == set(config.trained_losses)
    for name, value in values.items():
        assert value == pytest.approx(expected_values[name], rel=1e-5, abs=ROUNDING), name
    scale = max(float(g.norm()) for g in expected.values())
    assert scale > 1e-4, "the reference has no gradient to compare with"
    for name, gradient in found.items():
        error = float((gradient - expected.get(name, torch.zeros_like(gradient))).norm())
        size = float(expected[name].norm()) if name in expected else 0.0
        assert error <= tolerance * (size + 0.1 * scale), f"{name}: error {error:.2e}, gradient {size:.2e}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["mass", "pathway"])
def test_gradients_equal_autograd(megatron, mode, kind):
    settings, data = MODES[mode]
    _compare(_fields(settings), data, kind)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_the_peers_equal_autograd(megatron, mode):
    settings, data = MODES[mode]
    _compare(_fields(settings), data, names=PEERS)


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_each_loss_alone(megatron, name):
    _compare({}, {}, names=[name])


@pytest.mark.parametrize("settings", [{}, dict(moe_grouped_gemm=True)])
def test_all_losses_together(megatron, settings):
    coefficients = {name: (1.0, 0.5, 0.1, 2.0, 0.3)[i % 5] for i, name in enumerate(LOSS_NAMES)}
    options = dict(erc_alpha=0.7, router_orthogonality_type="absolute")
    _compare(settings, dict(padding=True), coefficients=coefficients, options=options)


@pytest.mark.parametrize("mode", ["sequential_alltoall", "grouped_full_recompute", "per_token_loss_padding_mask"])
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_losses_of_ones_own(megatron, mode, kernels):
    if kernels == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    settings, data = MODES[mode]
    _compare(settings, data, names=[], extra_losses=losses_of_ones_own(1.0), options=dict(kernels=kernels))


@pytest.mark.slow
@pytest.mark.parametrize("mode", TRITON_MODES)
def test_gradients_of_the_kernels(megatron, mode):
    """Under Triton's interpreter."""
    pytest.importorskip("triton", reason="triton is not installed")
    settings, data = MODES[mode]
    names = [*BOTH, "orthogonality_loss"]
    _compare(_fields(settings), data, "mass", names=names, options=dict(kernels="triton"))


# Where the gradient of the SwiGLU is computed by a kernel of this package, with the loss's in it.
IN_SWIGLU = {mode for mode in MODES if mode.startswith("fused_swiglu")} - {
    "fused_swiglu_moe_act_recompute",
    "fused_swiglu_of_each_expert",
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", [mode for mode in TRITON_MODES if mode.startswith(("fused", "grouped"))])
def test_gradient_in_the_swiglu(megatron, mode, monkeypatch):
    """Of the main losses alone; and that it is taken where it can be, and nowhere else."""
    pytest.importorskip("triton", reason="triton is not installed")
    from megatron_moe_spec.kernels import swiglu

    calls, gradient = [], swiglu.swiglu_gradient
    monkeypatch.setattr(swiglu, "swiglu_gradient", lambda *args: calls.append(1) or gradient(*args))
    settings, data = MODES[mode]
    _compare(settings, data, options=dict(kernels="triton"))
    assert bool(calls) == (mode in IN_SWIGLU)


def test_gradient_scaler_is_read_in_backward(megatron):
    _compare({}, {}, names=LOSS_NAMES, scale=1024.0)


@needs_hybrid_model
@pytest.mark.parametrize("kind", ["mass", "pathway"])
@pytest.mark.parametrize("settings", [{}, dict(recompute_method="uniform", **FULL)])
def test_hybrid_model(megatron, kind, settings):
    import hybrid_models

    _compare(settings, {}, kind, build=partial(hybrid_models.build_model, "*EME-E"))
