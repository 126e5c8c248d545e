"""Parallel layouts with Transformer Engine's layers train as one process does: every gradient and logged value."""

import pytest
from loss_names import BOTH, LOSS_NAMES, PEERS_WITHOUT_OUTPUTS
from test_layouts import (
    DEEPEP,
    FULL_RECOMPUTE,
    HYBRIDEP,
    MOE_ACT,
    ODD,
    PEERS_OF_TOKENS,
    Jobs,
    _case,
    _worst_error,
    _worst_loss_error,
)

pytestmark = pytest.mark.slow

GROUPED = dict(moe_grouped_gemm=True)
FUSION = dict(gradient_accumulation_fusion=True)
RUN = EP2, ETP1, ETP2, PP2, VPP2, CP2 = "EP2", "TP2+SP, ETP1", "TP2+SP, ETP2", "PP2", "PP2+VPP2", "CP2"
ETP2_EP2 = "TP2+SP, ETP2, EP2"  # only of those that name it
MODELS = {
    "grouped, moe_act recompute, accumulation fusion": dict(model={**MOE_ACT, **FUSION}),
    "sequential": dict(),
    "all losses": dict(losses=LOSS_NAMES, model={**GROUPED, **FUSION}, layouts=(EP2, ETP1, PP2, CP2)),
    "all but of outputs": dict(losses=(*BOTH, *PEERS_WITHOUT_OUTPUTS), model=GROUPED, layouts=(ETP2,)),
    "fused router, its activation, full recompute": dict(
        model=dict(moe_router_fusion=True, use_te_activation_func=True, **GROUPED, **FULL_RECOMPUTE)
    ),
    "overlapped shared expert": dict(
        model=dict(moe_shared_expert_intermediate_size=16, moe_shared_expert_overlap=True, **GROUPED),
        layouts=(EP2, ETP1, ETP2),
    ),
    "top-3 of 12, sigmoid with bias, shared expert": dict(model={**ODD, **GROUPED}, layouts=(EP2, VPP2)),
    "HybridModel": dict(pattern="*E|M-|*E*|E", model=FUSION, layouts=(EP2, ETP1, PP2, VPP2)),
    "DeepEP": dict(model={**GROUPED, **DEEPEP}, like="grouped", layouts=(EP2,)),
    "HybridEP": dict(model={**GROUPED, **HYBRIDEP}, like="grouped", layouts=(EP2,)),
    "Triton kernels, fused SwiGLU": dict(
        model={**GROUPED, "bias_activation_fusion": True},
        kernels="triton",
        like="grouped",
        layouts=(EP2, ETP2, ETP2_EP2),
    ),
    "grouped": dict(model=GROUPED, layouts=()),
}


def _models(layout: str) -> list[str]:
    if layout == "one process":
        return [name for name, properties in MODELS.items() if "like" not in properties]
    return [name for name in MODELS if layout in MODELS[name].get("layouts", RUN)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(layout, model, coefficient of the losses) -> what was trained; a layout's models in one job."""
    jobs, found = Jobs(tmp_path_factory.mktemp("layouts")), {}

    def result(layout: str, model: str, coefficient: float) -> dict:
        if layout not in found:
            cases = [(name, c) for name in _models(layout) for c in (0.0, 1.0)]
            done = jobs.run(layout, [_case(MODELS[name], c) for name, c in cases])
            found[layout] = dict(zip(cases, done, strict=True))
        return found[layout][model, coefficient]

    return result


@pytest.mark.parametrize("layout, model", [(layout, model) for layout in (*RUN, ETP2_EP2) for model in _models(layout)])
def test_layout_trains_as_one_process(results, record_property, layout, model):
    like = MODELS[model].get("like", model)
    own = _worst_error(results(layout, model, 0.0), results("one process", like, 0.0))
    found, expected = results(layout, model, 1.0), results("one process", like, 1.0)
    error, loss_error = _worst_error(found, expected), _worst_loss_error(found, expected)
    record_property("errors", f"{layout}, Transformer Engine | {model} | {loss_error:.1e} | {error:.1e} | {own:.1e}")
    assert own < 1e-5, "Megatron's own gradients differ from one process"
    assert error < 1e-5
    assert loss_error < 1e-5
    assert found["losses"].keys() == expected["losses"].keys()
    goes = "fused SwiGLU" in model and layout in (EP2, ETP2_EP2)
    assert found["gradients of the SwiGLU"] == ({"swiglu_gradient_of_sum"} if goes else set())


def test_overlapped_forward_and_backward(tmp_path):
    """Combined 1F1B computes the same, bit by bit, with weight gradients delayed or not.

    Delayed ones want accumulation fusion: without it Megatron's own are wrong in this release, with losses or without.
    """
    losses = (*BOTH, *PEERS_OF_TOKENS)
    overlap = dict(overlap_moe_expert_parallel_comm=True)
    plain, fused = GROUPED, {**GROUPED, **FUSION}
    models = [
        plain,
        {**plain, **overlap},
        fused,
        {**fused, **overlap},
        dict(delay_wgrad_compute=True, **fused, **overlap),
    ]
    across = ["drop", "auto", "drop", "auto", "auto"]
    cases = [dict(bf16=True, losses=losses, model=m, across_stages=a) for m, a in zip(models, across)]
    plain, overlapped, fused, *fused_overlapped = Jobs(tmp_path).run("EP2", [_case(case, 1.0) for case in cases])
    for expected, found in [(plain, overlapped), *((fused, one) for one in fused_overlapped)]:
        assert found["losses"] == expected["losses"]
        assert _worst_error(found, expected) == 0.0
