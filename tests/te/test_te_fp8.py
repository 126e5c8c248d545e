"""Training in fp8 with Transformer Engine's quantizers, one scale a tensor: its own padding, checkpoints and states.

The forward pass is bitwise that of Megatron without the losses. Gradients are compared with autograd's through the same
quantized model, to a hundredth: one that differs in its last bit may be rounded to another of fp8's few numbers, which
are a quarter apart. Logged values, which are of the forward pass, are compared as everywhere.
"""

import pytest
import torch
from loss_names import BOTH, LOSS_NAMES, coefficients
from test_gradients import SELECTIVE, _compare
from test_layouts import FULL_RECOMPUTE

# Rows are padded to multiples of 16, as on Hopper.
F8 = dict(fp8="hybrid", moe_ffn_hidden_size=32, num_layers=2)
GROUPED = dict(moe_grouped_gemm=True)
TOLERANCE = 1e-2
RECIPES = ["tensorwise", "delayed"]
MODELS = {
    "grouped": GROUPED,
    "sequential": {},
    "moe_act recompute": dict(**GROUPED, **SELECTIVE, recompute_modules=["moe_act"]),
    "moe recompute": dict(**GROUPED, **SELECTIVE, recompute_modules=["moe"]),
    "full recompute": dict(**GROUPED, **FULL_RECOMPUTE),
    "full recompute, sequential": FULL_RECOMPUTE,
    "rows padded by the router": dict(**GROUPED, moe_router_padding_for_quantization=True),
    "its activation": dict(**GROUPED, use_te_activation_func=True),
}


@pytest.fixture
def calls(calls):
    yield calls
    assert calls["quantize"] and calls["split_quantize"] + calls["generic_gemm"], "nothing was quantized"


# Megatron has no recomputation of moe_act with delayed scaling.
CASES = [
    (recipe, model) for recipe in RECIPES for model in MODELS if (recipe, model) != ("delayed", "moe_act recompute")
]


@pytest.mark.parametrize("recipe, model", CASES)
def test_gradients_equal_autograd(calls, recipe, model):
    _compare(dict(fp8_recipe=recipe, **F8, **MODELS[model]), {}, names=LOSS_NAMES, tolerance=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_kernels(calls, recipe):
    settings = dict(fp8_recipe=recipe, bias_activation_fusion=True, **F8, **GROUPED)
    _compare(settings, {}, options=dict(kernels="triton"), tolerance=TOLERANCE)


def _histories(model) -> dict:
    """Of the quantizers, which delayed scaling keeps from step to step."""
    kinds = ("scaling_fwd", "scaling_bwd")
    return {
        (name, kind): module.fp8_meta[kind].amax_history.clone()
        for name, module in model.named_modules()
        for kind in kinds
        if hasattr(getattr(module, "fp8_meta", {}).get(kind), "amax_history")
    }


@pytest.mark.parametrize("recipe, model", CASES)
def test_a_step_in_bf16_is_megatrons(calls, mm, recipe, model):
    """Bit by bit, forward and the quantizers' histories after it; gradients are finite."""
    from megatron_moe_spec import SpecConfig, attach

    settings = dict(fp8_recipe=recipe, bf16=True, params_dtype=torch.bfloat16, **F8, **MODELS[model])
    found = []
    for names in ([], LOSS_NAMES):
        built = mm.build_model(**settings)
        attach(built, SpecConfig(**coefficients(names, 1e-3)))
        output, histories = mm.run_model(built, mm.micro_batches(1)[0]), _histories(built)
        gradients = mm.train_step(built, mm.micro_batches(2), main_loss_weight=0.1)
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        found.append((output, histories))
    (plain, plain_histories), (output, histories) = found
    assert torch.equal(plain, output)
    assert bool(plain_histories) == (recipe == "delayed") and histories.keys() == plain_histories.keys()
    assert all(torch.equal(history, histories[name]) for name, history in plain_histories.items())


@pytest.mark.parametrize("recipe", RECIPES)
def test_erc_beside_accumulation_fusion(calls, mm, recipe):
    """With fp8, Megatron marks the first micro-batch of every step."""
    from test_te_accumulation import FUSION, check_accumulation

    settings = dict(fp8_recipe=recipe, **F8, **GROUPED)
    check_accumulation(mm, settings, {**settings, **FUSION}, [*BOTH, "erc_loss"], True, 0.1)
