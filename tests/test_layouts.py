"""Any parallel layout trains as one process does: every parameter's gradient and the logged values, both losses on."""

import json

import pytest
import torch
from processes import needs_megatron, torchrun

pytestmark = needs_megatron

FULL_RECOMPUTE = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
MOE_ACT = dict(moe_grouped_gemm=True, recompute_granularity="selective", recompute_modules=["moe_act"])
SIGMOID = dict(
    moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True, moe_router_bias_update_rate=1e-3
)
ODD = dict(num_moe_experts=12, moe_router_topk=3, moe_shared_expert_intermediate_size=16, **SIGMOID)

TP, CP, EP, ETP, PP, VPP = (
    f"{name}_parallel_size"
    for name in ("tensor_model", "context", "expert_model", "expert_tensor", "pipeline_model", "virtual_pipeline_model")
)
# name -> (number of processes, sizes of the parallel groups)
LAYOUTS = {
    "one process": (1, {}),
    "DP2": (2, {}),
    "EP2": (2, {EP: 2}),
    "TP2+SP, ETP1, EP2": (2, {TP: 2, ETP: 1, EP: 2}),
    "TP2+SP, ETP2": (2, {TP: 2, ETP: 2}),
    "CP2": (2, {CP: 2}),
    "CP2+EP2": (2, {CP: 2, EP: 2}),
    "PP2": (2, {PP: 2}),
    "PP2+VPP2": (2, {PP: 2, VPP: 2}),
    "EP4": (4, {EP: 4}),
    "PP2+EP2": (4, {PP: 2, EP: 2}),
    "TP2+SP, ETP2, EP2": (4, {TP: 2, ETP: 2, EP: 2}),
    "TP2+SP, ETP1, CP2, EP4": (4, {TP: 2, ETP: 1, CP: 2, EP: 4}),
}
# name -> what the model and its data are like; each is run in one process for comparison
MODELS = {
    "plain": {},
    "allgather dispatcher": dict(model=dict(moe_token_dispatcher_type="allgather")),
    "full recompute": dict(model=FULL_RECOMPUTE),
    "grouped experts, moe_act recompute": dict(model=MOE_ACT),
    "per-token loss": dict(model=dict(calculate_per_token_loss=True)),
    "per-token loss, padding": dict(model=dict(calculate_per_token_loss=True), padding=True),
    "pathway": dict(coupling_type="pathway"),
    "top-3 of 12, sigmoid with bias, shared expert": dict(model=ODD),
    "dense layers at the stage boundary": dict(model=dict(moe_layer_freq=[1, 0, 0, 1])),
    "no MoE layer in the first stage": dict(model=dict(moe_layer_freq=[0, 0, 1, 1])),
}


def _case(properties: dict, coefficient: float) -> dict:
    config = dict(
        specialization_loss_coeff=coefficient,
        coupling_loss_coeff=coefficient,
        coupling_type=properties.get("coupling_type", "mass"),
        metrics_interval=1,
    )
    return dict(
        model=properties.get("model", {}),
        padding=properties.get("padding", False),
        bf16=properties.get("bf16", False),
        config=config,
    )


def _models(sizes: dict) -> list[str]:
    """The grouped linears of these tests know no expert tensor parallelism."""
    return [name for name in MODELS if sizes.get(ETP, 1) == 1 or "grouped" not in name]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Everything that is compared, from one torchrun job a layout: (layout, model, coefficient) -> result."""
    folder = tmp_path_factory.mktemp("layouts")
    found = {}
    for layout, (processes, sizes) in LAYOUTS.items():
        job, output = folder / "job.json", folder / "results.pt"
        keys = [(layout, model, coefficient) for model in _models(sizes) for coefficient in (0.0, 1.0)]
        job.write_text(json.dumps([sizes, [_case(MODELS[model], coefficient) for _, model, coefficient in keys]]))
        torchrun(processes, "layouts.py", job, output)
        found.update(zip(keys, torch.load(output), strict=True))
    return found


def _worst_error(found: dict, expected: dict) -> float:
    """Largest relative error over all parameters' gradients."""
    assert found.keys() == expected.keys()
    return max(float((found[key] - g).norm() / g.norm()) for key, g in expected.items())


@pytest.mark.parametrize(
    "layout, model",
    [(layout, model) for layout in list(LAYOUTS)[1:] for model in _models(LAYOUTS[layout][1])],
)
def test_layout_trains_as_one_process(results, layout, model):
    expected, found = results["one process", model, 1.0], results[layout, model, 1.0]
    megatrons_own = _worst_error(
        results[layout, model, 0.0]["gradients"], results["one process", model, 0.0]["gradients"]
    )
    error = _worst_error(found["gradients"], expected["gradients"])
    print(f"\n{layout} | {model} | gradients {error:.1e} | Megatron's own {megatrons_own:.1e}")
    assert error <= max(1e-5, megatrons_own)
    for name in ("specialization_loss", "coupling_loss"):
        assert found["metrics"][name] == pytest.approx(expected["metrics"][name], rel=1e-5), name
    for part in ("layers", "pairs"):
        for one, other in zip(expected["metrics"]["diagnostics"][part], found["metrics"]["diagnostics"][part], strict=True):
            # Which tokens are shuffled depends on where they are.
            for name in set(one) - {"layer", "layers", "null_normalized_mutual_information"}:
                assert other[name] == pytest.approx(one[name], rel=1e-4), (part, name)


def test_the_losses_change_every_compared_model(results):
    for model in MODELS:
        with_losses, without = results["one process", model, 1.0], results["one process", model, 0.0]
        assert _worst_error(with_losses["gradients"], without["gradients"]) > 0.01, model
