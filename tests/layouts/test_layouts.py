"""Any parallel layout trains as one process does: every parameter's gradient and the logged values, both losses on."""

import json
import math
from importlib.metadata import version

import pytest
import torch
from forks import ranks
from loss_names import BOTH, PEERS, PEERS_WITHOUT_OUTPUTS, coefficients
from other_losses import losses_of_ones_own
from processes import HAS_HYBRID_MODEL, HAS_MEGATRON, needs_megatron

from megatron_moe_spec import SpecConfig

pytestmark = [needs_megatron, pytest.mark.slow]

FULL_RECOMPUTE = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
BLOCK_RECOMPUTE = dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=1)
PER_TOKEN = dict(calculate_per_token_loss=True)
MOE_ACT = dict(moe_grouped_gemm=True, recompute_granularity="selective", recompute_modules=["moe_act"])
FUSED_SWIGLU = dict(moe_grouped_gemm=True, bias_activation_fusion=True)
MOE_RECOMPUTE = dict(recompute_granularity="selective", recompute_modules=["moe"])
SIGMOID = dict(
    moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True, moe_router_bias_update_rate=1e-3
)
DEEPEP = dict(moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend="deepep")
HYBRIDEP = dict(moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend="hybridep")
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
    "PP2+VPP2, EP2": (4, {PP: 2, VPP: 2, EP: 2}),
    "PP2+VPP2, TP2+SP, ETP1, EP2": (4, {PP: 2, VPP: 2, TP: 2, ETP: 1, EP: 2}),
}
OVERLAPPED = [
    ("EP2", {}),
    ("EP2", DEEPEP),
    ("EP2", {**HYBRIDEP, **MOE_ACT}),
    ("EP2", dict(num_moe_experts=2)),
    ("PP2+VPP2, EP2", dict(num_layers=8)),
]
if HAS_MEGATRON and version("megatron-core").startswith("0.16."):
    # With one local expert, this release frees what it still needs, with the losses or without.
    del OVERLAPPED[3]
    # With TP2+SP, ETP1 and EP1 this release does not sum expert gradients over the tensor-parallel ranks.
    # And a part of the others will do.
    for name in ("TP2+SP, ETP1", "CP2", "EP4", "TP2+SP, ETP1, CP2, EP4", "PP2+EP2", "PP2+VPP2, TP2+SP, ETP1, EP2"):
        del LAYOUTS[name]
# Where rows stay, come home, and are divided by columns too. Triton's interpreter is slow.
KERNEL_LAYOUTS = ("one process", "EP2", "TP2+SP, ETP2, EP2")
# Where the local experts are in one piece: all of a layer's, or those whose rows come home.
FUSED_LAYOUTS = ("one process", "DP2", "PP2+VPP2", "EP2")
# Weights are not joined to the experts' run under combined 1F1B.
PEERS_OF_TOKENS = tuple(name for name in PEERS if name != "erc_loss")
PIPELINES = ("one process", *(name for name in LAYOUTS if "PP" in name))
ONE_OF_EACH = ("one process", "DP2", "EP2", "TP2+SP, ETP2", "CP2", "PP2+VPP2", "TP2+SP, ETP2, EP2")
FLEX_LAYOUTS = ("EP2", "EP4", "TP2+SP, ETP1, EP2", "CP2+EP2", "PP2+EP2", "PP2+VPP2, TP2+SP, ETP1, EP2")
# name -> what the model and its data are like; compared with one process, of the model "like" where one is named.
# "without": another model that, trained without losses, shows Megatron's own error of this one as well.
# "layouts": where to run it, if not everywhere. "traced": its routing is compared, too. "pattern": of a HybridModel, in
# the most segments; a layout with fewer stages joins them.
MODELS = {
    "plain": dict(traced=True),
    "allgather dispatcher": dict(model=dict(moe_token_dispatcher_type="allgather")),
    "full recompute": dict(model=FULL_RECOMPUTE, traced=True),
    "full recompute, block": dict(model=BLOCK_RECOMPUTE, layouts=ONE_OF_EACH),
    "grouped experts, moe_act recompute": dict(model=MOE_ACT),
    "moe recompute": dict(model=MOE_RECOMPUTE, layouts=ONE_OF_EACH),
    "per-token loss": dict(model=PER_TOKEN),
    "per-token loss, full recompute": dict(
        model={**PER_TOKEN, **FULL_RECOMPUTE}, like="per-token loss", layouts=ONE_OF_EACH
    ),
    "per-token loss, padding": dict(model=PER_TOKEN, padding=True, traced=True),
    "pathway": dict(coupling_type="pathway"),
    "top-3 of 12, sigmoid with bias, shared expert": dict(model=ODD),
    "dense layers at the stage boundary": dict(model=dict(moe_layer_freq=[1, 0, 0, 1]), layouts=PIPELINES, traced=True),
    "no MoE layer in the first stage": dict(model=dict(moe_layer_freq=[0, 0, 1, 1]), layouts=PIPELINES),
    "token stride": dict(stride=3, like="plain"),
    "token stride, allgather dispatcher": dict(
        model=dict(moe_token_dispatcher_type="allgather"), stride=2, like="allgather dispatcher"
    ),
    "micro-batches of one sequence": dict(one_sequence=True, like="plain", layouts=ONE_OF_EACH),
    "per-token loss, padding, micro-batches of one sequence": dict(
        model=PER_TOKEN, padding=True, one_sequence=True, like="per-token loss, padding", layouts=ONE_OF_EACH
    ),
    "peers": dict(losses=PEERS, without="plain"),
    "peers, grouped experts, moe_act recompute": dict(
        losses=PEERS, model=MOE_ACT, without="grouped experts, moe_act recompute"
    ),
    "peers, allgather dispatcher, top-3 of 12, sigmoid with bias, shared expert": dict(
        losses=PEERS,
        model=dict(moe_token_dispatcher_type="allgather", **ODD),
        without="top-3 of 12, sigmoid with bias, shared expert",
    ),
    "peers, per-token loss, padding, full recompute": dict(
        losses=PEERS, model={**PER_TOKEN, **FULL_RECOMPUTE}, padding=True, without="per-token loss, padding"
    ),
    # What expert tensor parallelism leaves of them.
    "peers but of outputs, per-token loss, padding": dict(
        losses=PEERS_WITHOUT_OUTPUTS, model=PER_TOKEN, padding=True, without="per-token loss, padding"
    ),
    "losses of one's own, per-token loss, full recompute": dict(
        losses=(),
        own=True,
        model={**PER_TOKEN, **FULL_RECOMPUTE},
        without="per-token loss",
        layouts=("one process", "EP2", "TP2+SP, ETP2", "PP2", "CP2"),
    ),
    "losses of one's own, Triton kernels, fused SwiGLU": dict(
        losses=(),
        own=True,
        model=FUSED_SWIGLU,
        kernels="triton",
        without="grouped experts, moe_act recompute",
        layouts=("one process", "EP2"),
    ),
    # DeepEP takes more than one process. Padding does not change what is computed.
    "DeepEP": dict(model=DEEPEP, like="plain", layouts=FLEX_LAYOUTS),
    "DeepEP, full recompute, token stride": dict(
        model={**DEEPEP, **FULL_RECOMPUTE}, stride=3, like="plain", layouts=("EP2", "PP2+EP2")
    ),
    "HybridEP, grouped experts, moe_act recompute": dict(
        model={**HYBRIDEP, **MOE_ACT}, like="grouped experts, moe_act recompute", layouts=FLEX_LAYOUTS
    ),
    "peers, HybridEP, grouped experts, moe_act recompute": dict(
        losses=PEERS,
        model={**HYBRIDEP, **MOE_ACT},
        like="peers, grouped experts, moe_act recompute",
        without="grouped experts, moe_act recompute",
        layouts=("EP2", "EP4"),
    ),
    "padded rows": dict(
        pads_rows="experts", like="plain", layouts=("one process", "EP2", "TP2+SP, ETP2", "TP2+SP, ETP2, EP2")
    ),
    "padded rows, grouped experts, moe_act recompute": dict(
        model=MOE_ACT,
        pads_rows="experts",
        like="grouped experts, moe_act recompute",
        layouts=("one process", "EP2", "EP4", "TP2+SP, ETP1, EP2", "PP2+EP2"),
    ),
    "padded rows, allgather dispatcher, token stride": dict(
        model=dict(moe_token_dispatcher_type="allgather"),
        pads_rows="experts",
        stride=2,
        like="allgather dispatcher",
        layouts=("one process", "EP2"),
    ),
    "rows padded by HybridEP, grouped experts, full recompute, token stride": dict(
        model={**HYBRIDEP, **FULL_RECOMPUTE, "moe_grouped_gemm": True},
        pads_rows="experts",
        stride=3,
        like="grouped experts, moe_act recompute",
        layouts=("EP2", "PP2+EP2"),
    ),
    "rows padded by the router, grouped experts, moe_act recompute": dict(
        model=MOE_ACT,
        pads_rows="router",
        like="grouped experts, moe_act recompute",
        layouts=("one process", "EP2", "EP4", "TP2+SP, ETP1, EP2"),
    ),
    "rows padded by the router, fused, grouped experts, moe_act recompute": dict(
        model=MOE_ACT, pads_rows="router, fused", like="grouped experts, moe_act recompute", layouts=("EP2",)
    ),
    "rows padded by the router, DeepEP, grouped experts, moe_act recompute": dict(
        model={**DEEPEP, **MOE_ACT},
        pads_rows="router",
        like="grouped experts, moe_act recompute",
        layouts=("EP2", "EP4"),
    ),
    "Triton kernels, padded rows": dict(
        kernels="triton", pads_rows="experts", like="plain", layouts=KERNEL_LAYOUTS[:2]
    ),
    "Triton kernels": dict(kernels="triton", like="plain", layouts=KERNEL_LAYOUTS),
    "peers, Triton kernels": dict(
        losses=PEERS, kernels="triton", like="peers", without="plain", layouts=KERNEL_LAYOUTS[:2]
    ),
    "Triton kernels, token stride": dict(kernels="triton", stride=3, like="plain", layouts=KERNEL_LAYOUTS[:2]),
    "Triton kernels, fused SwiGLU": dict(
        model=FUSED_SWIGLU, kernels="triton", like="grouped experts, moe_act recompute", layouts=FUSED_LAYOUTS
    ),
    "Triton kernels, fused SwiGLU, allgather dispatcher": dict(
        model={**FUSED_SWIGLU, "moe_token_dispatcher_type": "allgather"},
        kernels="triton",
        like="grouped experts, moe_act recompute",
        layouts=("EP2",),
    ),
    "Triton kernels, fused SwiGLU, HybridEP, rows padded by it": dict(
        model={**FUSED_SWIGLU, **HYBRIDEP},
        kernels="triton",
        pads_rows="experts",
        like="grouped experts, moe_act recompute",
        layouts=("EP2",),
    ),
    "Triton kernels, fused SwiGLU, full recompute, token stride": dict(
        model={**FUSED_SWIGLU, **FULL_RECOMPUTE},
        kernels="triton",
        stride=2,
        like="grouped experts, moe_act recompute",
        layouts=FUSED_LAYOUTS,
    ),
}
HYBRID_LAYOUTS = ("one process", "EP2", "TP2+SP, ETP2", "PP2", "PP2+VPP2")
HYBRID_MODELS = {
    # With PP2+VPP2, a segment has no experts, and in the other pattern no layers.
    "hybrid": dict(pattern="*E|M-|*E*|E", traced=True),
    "hybrid, moe recompute": dict(pattern="*E|M-|*E*|E", model=MOE_RECOMPUTE, like="hybrid"),
    "hybrid, MTP, pathway": dict(pattern="ME*||E*|E/*E", coupling_type="pathway", traced=True),
    "hybrid, MTP, pathway, full recompute": dict(
        pattern="ME*||E*|E/*E", coupling_type="pathway", model=FULL_RECOMPUTE, like="hybrid, MTP, pathway"
    ),
}
if HAS_MEGATRON and version("megatron-core").startswith("0.18."):
    # There MTP layers give their checkpoint a padding mask, which it does not take.
    del HYBRID_MODELS["hybrid, MTP, pathway, full recompute"]
if HAS_HYBRID_MODEL:
    MODELS.update({name: dict(layouts=HYBRID_LAYOUTS, **properties) for name, properties in HYBRID_MODELS.items()})


def _case(properties: dict, coefficient: float) -> dict:
    config = dict(
        **coefficients(properties.get("losses", BOTH), coefficient),
        coupling_type=properties.get("coupling_type", "mass"),
        coupling_across_stages=properties.get("across_stages", "exact"),
        specialization_token_stride=properties.get("stride", 1),
        kernels=properties.get("kernels", "torch"),
        metrics_interval=1,
    )
    return dict(
        pattern=properties.get("pattern"),
        model=properties.get("model", {}),
        padding=properties.get("padding", False),
        one_sequence=properties.get("one_sequence", False),
        bf16=properties.get("bf16", False),
        pads_rows=properties.get("pads_rows"),
        own=coefficient if properties.get("own") else None,
        config=config,
    )


def _cases(layout: str) -> list[tuple[str, float]]:
    """(model, coefficient of the losses) to run; with 0, what remains is Megatron's own error."""
    models = [name for name in MODELS if _fits(layout, name) and layout in MODELS[name].get("layouts", LAYOUTS)]
    return [(name, c) for name in models for c in (0.0, 1.0) if c > 0 or not {"like", "without"} & MODELS[name].keys()]


def _fits(layout: str, model: str) -> bool:
    if {TP, PP} <= LAYOUTS[layout][1].keys() and MODELS[model].get("padding"):
        return False  # Megatron divides padding masks among sequence-parallel ranks in the first stage alone
    if LAYOUTS[layout][1].get(ETP, 1) == 1:
        return MODELS[model].get("losses") != PEERS_WITHOUT_OUTPUTS or layout == "one process"
    # The grouped linears of these tests know no expert tensor parallelism, nor does the orthogonality loss.
    return "grouped" not in model and MODELS[model].get("losses") != PEERS


class Jobs:
    """Runs of models in layouts, one job for several models."""

    def __init__(self, folder):
        self._folder = folder
        self._found = {}

    def run(self, layout: str, cases: list[dict]) -> list[dict]:
        processes, sizes = LAYOUTS[layout]
        job, output = self._folder / "job.json", self._folder / "results.pt"
        job.write_text(json.dumps([sizes, cases]))
        ranks(processes, "layouts.py", job, output, timeout=1800)
        return torch.load(output)

    def _traced(self, layout: str, model: str, coefficient: float) -> dict:
        case = _case(MODELS[model], coefficient)
        if MODELS[model].get("traced") and coefficient > 0:
            case["trace"] = str(self._folder / f"traces of {layout}, {model}")
        return case

    def result(self, layout: str, model: str, coefficient: float) -> dict:
        """One result; the first of a layout runs all of its models."""
        if layout not in self._found:
            self._found[layout] = None
            cases = _cases(layout)
            results = self.run(layout, [self._traced(layout, name, c) for name, c in cases])
            self._found[layout] = dict(zip(cases, results, strict=True))
        assert self._found[layout] is not None, "the job of this layout failed in another test"
        return self._found[layout][model, coefficient]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return Jobs(tmp_path_factory.mktemp("layouts"))


def _worst_error(found: dict, expected: dict) -> float:
    """Largest relative error over all parameters' gradients."""
    assert found["gradients"].keys() == expected["gradients"].keys()
    return max(float((found["gradients"][key] - g).norm() / g.norm()) for key, g in expected["gradients"].items())


def _worst_loss_error(found: dict, expected: dict) -> float:
    names = found["losses"].keys()
    assert names <= expected["losses"].keys()
    return max(abs(found["losses"][name] / expected["losses"][name] - 1.0) for name in names)


def _without_pairs_across_stages(result: dict, layout: str) -> dict:
    """No message travels between stages where coupling is measured and not trained on."""
    sizes = LAYOUTS[layout][1]
    length = 4 // (sizes.get(PP, 1) * sizes.get(VPP, 1))
    diagnostics = result["diagnostics"]
    pairs = [pair for pair in diagnostics["pairs"] if len({layer // length for layer in pair["layers"]}) == 1]
    losses = {name: value for name, value in result["losses"].items() if name != "coupling_loss"}
    return {**result, "losses": losses, "diagnostics": {**diagnostics, "pairs": pairs}}


@pytest.mark.parametrize(
    "layout, model",
    [
        (layout, model)
        for layout in LAYOUTS
        for model, coefficient in _cases(layout)
        if coefficient > 0 and (layout != "one process" or "like" in MODELS[model])
    ],
)
def test_layout_trains_as_one_process(jobs, record_property, layout, model):
    like = MODELS[model].get("like", model)
    expected, found = jobs.result("one process", like, 1.0), jobs.result(layout, model, 1.0)
    own_names = {loss.name for loss in losses_of_ones_own(1.0)} if MODELS[model].get("own") else set()
    losses = {*BOTH, *MODELS[model].get("losses", ()), *own_names}
    if PP in LAYOUTS[layout][1] and MODELS[model].get("losses", BOTH) != BOTH:
        expected = _without_pairs_across_stages(expected, layout)
        found["losses"].pop("coupling_loss", None)  # of the pairs within stages
        losses.remove("coupling_loss")
    without = MODELS[model].get("without", like)
    own = _worst_error(jobs.result(layout, without, 0.0), jobs.result("one process", without, 0.0))
    error, loss_error = _worst_error(found, expected), _worst_loss_error(found, expected)
    assert found["losses"].keys() == losses
    record_property("errors", f"{layout} | {model} | {loss_error:.1e} | {error:.1e} | {own:.1e}")
    assert own < 1e-5, "Megatron's own gradients differ from one process"
    assert error < 1e-5
    assert loss_error < 1e-5
    if MODELS[model].get("traced"):
        layers, num_padding, rows = expected["trace"]
        assert rows and (num_padding > 0) == bool(MODELS[model].get("padding"))
        assert found["trace"] == expected["trace"]
    if model == like:
        _compare_diagnostics(found["diagnostics"], expected["diagnostics"])


@pytest.mark.parametrize(
    "layout, model",
    [(layout, model) for layout in LAYOUTS for model, _ in _cases(layout) if "Triton kernels" in model],
)
def test_where_the_gradient_goes_through_the_swiglu(jobs, layout, model):
    """Where Megatron's fused SwiGLU has made all local rows; not for losses of their lengths."""
    expected = "swiglu_gradient_of_sum" if EP in LAYOUTS[layout][1] else "swiglu_gradient"
    goes = "fused SwiGLU" in model and "own" not in MODELS[model]
    assert jobs.result(layout, model, 1.0)["gradients of the SwiGLU"] == ({expected} if goes else set())


def _compare_diagnostics(found: dict, expected: dict) -> None:
    for part in ("layers", "pairs"):
        for one, other in zip(expected[part], found[part], strict=True):
            # Which tokens are shuffled depends on where they are.
            for name in set(one) - {"layer", "layers", "null_normalized_mutual_information"}:
                assert other[name] == pytest.approx(one[name], rel=1e-4), (part, name)


def test_the_losses_change_every_compared_model(jobs):
    for model in (name for name, _ in _cases("one process")):
        without = MODELS[model].get("without", MODELS[model].get("like", model))
        with_losses, plain = jobs.result("one process", model, 1.0), jobs.result("one process", without, 0.0)
        assert _worst_error(with_losses, plain) > 0.01, model


@pytest.mark.parametrize("kind", ["mass", "pathway"])
def test_bf16_pipeline(jobs, kind):
    """The message travels as pairs of bf16 numbers: the forward is the same, and the loss to 1e-4."""
    case = _case(dict(bf16=True, coupling_type=kind), 1.0)
    (expected,), (found,) = jobs.run("one process", [case]), jobs.run("PP2", [case])
    assert _worst_loss_error(found, expected) < 1e-4
    # Some gradients are rounded to another bf16 number.
    assert _worst_error(found, expected) < 1e-3
    _compare_diagnostics(found["diagnostics"], expected["diagnostics"])


def test_bf16_rows_come_home(jobs):
    case = _case(dict(bf16=True), 1.0)
    (expected,), (found,) = jobs.run("one process", [case]), jobs.run("EP2", [case])
    assert _worst_loss_error(found, expected) < 1e-4
    _compare_diagnostics(found["diagnostics"], expected["diagnostics"])
    # In bf16, sums in another order round differently.
    assert _worst_error(found, expected) < 1e-2


def test_dispatchers_drop_the_same_tokens(jobs):
    """Capacity counts a rank's tokens, so that one process would drop others."""
    models = [dict(moe_expert_capacity_factor=0.7, **dispatcher) for dispatcher in ({}, DEEPEP, HYBRIDEP)]
    cases = [_case(dict(losses=(*BOTH, *PEERS), model=model), 1.0) for model in models]
    expected, *others = jobs.run("EP2", cases)
    for found in others:
        assert _worst_error(found, expected) < 1e-5
        assert _worst_loss_error(found, expected) < 1e-5


def test_pairs_across_stages_are_dropped_on_request(jobs, megatron):
    """The rest is the mean over the pairs within a stage, by the pure losses on the whole model."""
    import megatron_models
    from layouts import GLOBAL_BATCH, draw_weights
    from reference import Capture, pure_losses

    (found,) = jobs.run("PP2", [_case(dict(across_stages="drop"), 1.0)])
    assert [pair["layers"] for pair in found["diagnostics"]["pairs"]] == [[0, 1], [2, 3]]
    model = megatron_models.build_model(num_layers=4)
    draw_weights(model)
    losses = []
    for batch in megatron_models.micro_batches(GLOBAL_BATCH):
        capture = Capture(model)
        megatron_models.run_model(model, batch)
        capture.remove()
        is_token = torch.ones(batch["tokens"].numel(), dtype=torch.bool)
        pairs = pure_losses(capture, is_token, SpecConfig(coupling_loss_coeff=1.0))["coupling_loss"]
        losses += [float(pairs[0]), float(pairs[2])]
    assert found["losses"]["coupling_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    exact = jobs.result("PP2", "plain", 1.0)
    assert _worst_error(found, exact) > 0.01


@pytest.mark.parametrize("layout, model", OVERLAPPED)
def test_overlapped_forward_and_backward(jobs, layout, model):
    """Combined 1F1B runs the layers of two micro-batches in turns; what is computed is the same, bit by bit.

    It cannot carry pairs across stages, which auto drops.
    """
    losses = (*BOTH, *PEERS_OF_TOKENS)
    cases = [
        _case(dict(bf16=True, across_stages=across, losses=losses, model={**model, **overlap}), 1.0)
        for across, overlap in (("drop", {}), ("auto", dict(overlap_moe_expert_parallel_comm=True)))
    ]
    plain, overlapped = jobs.run(layout, cases)
    assert overlapped["losses"] == plain["losses"]
    assert _worst_error(overlapped, plain) == 0.0


def test_fp8_a2a_trains_nearly_the_same(jobs):
    """Another gradient than without it, by little: rows of other ranks, and their gradients, are rounded to 4 bits."""

    def case(coefficient, a2a_dtype):
        config = dict(specialization_loss_coeff=coefficient, specialization_a2a_dtype=a2a_dtype, kernels="torch")
        return {**_case({}, 0.0), "config": {**config, "specialization_token_stride": 1}}

    none, same, fp8 = jobs.run("EP2", [case(0.0, "same"), case(1.0, "same"), case(1.0, "fp8")])
    own, difference = (
        math.hypot(*(float((x["gradients"][key] - y["gradients"][key]).norm()) for key in same["gradients"]))
        for x, y in ((same, none), (fp8, same))
    )
    assert 1e-3 * own < difference < 0.1 * own
    values = [x["losses"]["specialization_loss"] for x in (same, fp8)]
    assert values[0] != values[1] == pytest.approx(values[0], rel=1e-2)
