"""Any parallel layout trains as one process does: every parameter's gradient and the logged values, both losses on."""

import json
from importlib.metadata import version

import pytest
import torch
from processes import HAS_MEGATRON, needs_megatron, torchrun

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
    "TP2+SP, ETP1": (2, {TP: 2, ETP: 1}),
    "TP2+SP, ETP1, EP2": (2, {TP: 2, ETP: 1, EP: 2}),
    "TP2+SP, ETP2": (2, {TP: 2, ETP: 2}),
    "CP2": (2, {CP: 2}),
    "CP2+EP2": (2, {CP: 2, EP: 2}),
    "PP2": (2, {PP: 2}),
    "PP2+VPP2": (2, {PP: 2, VPP: 2}),
    "EP4": (4, {EP: 4}),
    "TP2+SP, ETP2, EP2": (4, {TP: 2, ETP: 2, EP: 2}),
    "TP2+SP, ETP1, CP2, EP4": (4, {TP: 2, ETP: 1, CP: 2, EP: 4}),
    "PP2+EP2": (4, {PP: 2, EP: 2}),
    "PP2+VPP2, TP2+SP, ETP1, EP2": (4, {PP: 2, VPP: 2, TP: 2, ETP: 1, EP: 2}),
}
if HAS_MEGATRON and version("megatron-core").startswith("0.16."):
    # With TP2+SP, ETP1 and EP1 this release does not sum expert gradients over the tensor-parallel ranks.
    for name in ("TP2+SP, ETP1", "CP2", "EP4", "TP2+SP, ETP1, CP2, EP4", "PP2+VPP2, TP2+SP, ETP1, EP2"):
        del LAYOUTS[name]
# name -> what the model and its data are like; each is run in one process for comparison
MODELS = {
    "plain": {},
    "allgather dispatcher": dict(model=dict(moe_token_dispatcher_type="allgather")),
    "full recompute": dict(model=FULL_RECOMPUTE),
    "grouped experts, moe_act recompute": dict(model=MOE_ACT),
    "per-token loss": dict(model=dict(calculate_per_token_loss=True)),
    "per-token loss, padding": dict(model=dict(calculate_per_token_loss=True), padding=True),
    "pathway": dict(coupling_type="pathway"),
    "token stride": dict(stride=3, like="plain"),
    "token stride, allgather dispatcher": dict(
        model=dict(moe_token_dispatcher_type="allgather"), stride=2, like="allgather dispatcher"
    ),
    "top-3 of 12, sigmoid with bias, shared expert": dict(model=ODD),
    "dense layers at the stage boundary": dict(model=dict(moe_layer_freq=[1, 0, 0, 1])),
    "no MoE layer in the first stage": dict(model=dict(moe_layer_freq=[0, 0, 1, 1])),
}


def _case(properties: dict, coefficient: float) -> dict:
    config = dict(
        specialization_loss_coeff=coefficient,
        coupling_loss_coeff=coefficient,
        coupling_type=properties.get("coupling_type", "mass"),
        specialization_token_stride=properties.get("stride", 1),
        metrics_interval=1,
    )
    return dict(
        model=properties.get("model", {}),
        padding=properties.get("padding", False),
        bf16=properties.get("bf16", False),
        config=config,
    )


def _cases(layout: str) -> list[tuple[str, float]]:
    """(model, coefficient of the losses) to run; with 0, what remains is Megatron's own error."""
    # The grouped linears of these tests know no expert tensor parallelism.
    models = [name for name in MODELS if LAYOUTS[layout][1].get(ETP, 1) == 1 or "grouped" not in name]
    return [(name, c) for name in models for c in (0.0, 1.0) if c > 0 or "like" not in MODELS[name]]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Everything that is compared, from one torchrun job a layout: (layout, model, coefficient) -> result."""
    folder = tmp_path_factory.mktemp("layouts")
    found = {}
    for layout, (processes, sizes) in LAYOUTS.items():
        job, output = folder / "job.json", folder / "results.pt"
        cases = _cases(layout)
        job.write_text(json.dumps([sizes, [_case(MODELS[model], coefficient) for model, coefficient in cases]]))
        torchrun(processes, "layouts.py", job, output)
        found.update(zip([(layout, *case) for case in cases], torch.load(output), strict=True))
    return found


def _worst_error(found: dict, expected: dict) -> float:
    """Largest relative error over all parameters' gradients."""
    assert found.keys() == expected.keys()
    return max(float((found[key] - g).norm() / g.norm()) for key, g in expected.items())


@pytest.mark.parametrize(
    "layout, model", [(layout, model) for layout in list(LAYOUTS)[1:] for model, c in _cases(layout) if c > 0]
)
def test_layout_trains_as_one_process(results, layout, model):
    like = MODELS[model].get("like", model)
    expected, found = results["one process", like, 1.0], results[layout, model, 1.0]
    own = _worst_error(results[layout, like, 0.0]["gradients"], results["one process", like, 0.0]["gradients"])
    error = _worst_error(found["gradients"], expected["gradients"])
    losses = [abs(value / expected["losses"][name] - 1.0) for name, value in found["losses"].items()]
    print(f"\n{layout} | {model} | {max(losses):.1e} | {error:.1e} ({own:.1e})")
    assert own < 1e-5, "Megatron's own gradients differ from one process"
    assert error < 1e-5
    assert found["losses"].keys() == {"specialization_loss", "coupling_loss"} and max(losses) < 1e-5
    if model == like:
        _compare_diagnostics(found["diagnostics"], expected["diagnostics"])


def _compare_diagnostics(found: dict, expected: dict) -> None:
    for part in ("layers", "pairs"):
        for one, other in zip(expected[part], found[part], strict=True):
            # Which tokens are shuffled depends on where they are.
            for name in set(one) - {"layer", "layers", "null_normalized_mutual_information"}:
                assert other[name] == pytest.approx(one[name], rel=1e-4), (part, name)


def test_the_losses_change_every_compared_model(results):
    for model in MODELS:
        like = MODELS[model].get("like", model)
        with_losses, without = results["one process", model, 1.0], results["one process", like, 0.0]
        assert _worst_error(with_losses["gradients"], without["gradients"]) > 0.01, model


def test_the_mean_over_the_starts_of_a_token_stride_is_the_whole_loss(results):
    for model, properties in MODELS.items():
        if "stride" in properties:
            found, expected = results["one process", model, 1.0], results["one process", properties["like"], 1.0]
            assert _worst_error(found["gradients"], expected["gradients"]) < 1e-5
            assert found["losses"]["specialization_loss"] == pytest.approx(expected["losses"]["specialization_loss"], rel=1e-5)
