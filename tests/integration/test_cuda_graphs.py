"""CUDA graphs over routers: every gradient and logged value is that of a run without graphs."""

import pytest
import torch
from loss_names import BOTH, LOSS_NAMES, PEERS, coefficients
from processes import needs_megatron
from rule_texts import message_of
from test_layouts import DEEPEP, HYBRIDEP, PEERS_OF_TOKENS, Jobs, _case, _worst_error, _worst_loss_error

from megatron_moe_spec import SpecConfig, attach

pytestmark = needs_megatron

ROUTER = ["moe_router"]
ATTENTION_AND_ROUTER = ["attn", "moe_router"]
WITH_PREPROCESS = ["attn", "moe_router", "moe_preprocess"]
SCOPES = [ROUTER, ATTENTION_AND_ROUTER, WITH_PREPROCESS]
MODELS = {
    "plain": {},
    "grouped experts, shared expert": dict(moe_grouped_gemm=True, moe_shared_expert_intermediate_size=16),
    "allgather dispatcher": dict(moe_token_dispatcher_type="allgather"),
    "moe_act recompute": dict(moe_grouped_gemm=True, recompute_granularity="selective", recompute_modules=["moe_act"]),
    "per-token loss, sigmoid": dict(calculate_per_token_loss=True, moe_router_score_function="sigmoid"),
    "dense layer between": dict(moe_layer_freq=[1, 0, 1]),
}


def _trained(scope: list, settings: dict, names=LOSS_NAMES, stride=1, change=None, padding=False) -> dict:
    import megatron_models
    from partial_graphs import capture, graph_settings

    model = megatron_models.build_model(**settings, **graph_settings(scope))
    config = SpecConfig(**coefficients(names, 1.0), specialization_token_stride=stride, kernels="torch")
    handle = attach(model, config)
    if scope:
        capture(model, change)
    batches = megatron_models.micro_batches(3, padding=padding)
    gradients = megatron_models.train_step(model, batches, main_loss_weight=0.1)
    return {"gradients": gradients, "losses": handle.end_step()}


def _compare(found: dict, expected: dict) -> None:
    assert found["losses"].keys() == expected["losses"].keys()
    assert _worst_error(found, expected) < 1e-5
    assert _worst_loss_error(found, expected) < 1e-5


@pytest.mark.parametrize("scope", SCOPES, ids="+".join)
@pytest.mark.parametrize("model", MODELS)
def test_graphs_change_nothing(megatron, scope, model):
    settings = MODELS[model]
    _compare(_trained(scope, settings), _trained([], settings))


@pytest.mark.parametrize("scope", SCOPES, ids="+".join)
@pytest.mark.parametrize("name", LOSS_NAMES)
def test_each_loss_alone(megatron, scope, name):
    _compare(_trained(scope, {}, [name]), _trained([], {}, [name]))


@pytest.mark.parametrize("scope", SCOPES, ids="+".join)
def test_token_stride(megatron, scope):
    _compare(_trained(scope, {}, BOTH, stride=3), _trained([], {}, BOTH, stride=3))


def test_graphs_that_hand_out_something_else_are_noticed(megatron):
    """The stand-in, broken: the router's input without its gradient, or another decision."""
    expected = _trained([], {}, BOTH)

    def no_gradient(outputs):
        return [outputs[0].detach(), *outputs[1:]]

    def other_experts(outputs):
        return [outputs[0], *(x.roll(1, dims=1) for x in outputs[1:3]), *outputs[3:]]

    for change in (no_gradient, other_experts):
        assert _worst_error(_trained(ROUTER, {}, BOTH, change=change), expected) > 0.01


@pytest.mark.parametrize("scope", SCOPES, ids="+".join)
def test_forward_is_that_of_graphs_without_losses(megatron, scope):
    """Bit by bit. Without losses the stand-in trains as plain Megatron does."""
    import megatron_models
    from partial_graphs import capture, graph_settings

    (batch,) = megatron_models.micro_batches(1)
    outputs = []
    for names in ([], LOSS_NAMES):
        model = megatron_models.build_model(**graph_settings(scope))
        handle = attach(model, SpecConfig(**coefficients(names, 1.0), kernels="torch"))
        capture(model)
        outputs.append(megatron_models.run_model(model, batch))
        handle.detach()
        assert torch.equal(megatron_models.run_model(model, batch), outputs[0])
    assert torch.equal(*outputs)
    assert _worst_error(_trained(scope, {}, []), _trained([], {}, [])) < 1e-5


@pytest.mark.parametrize("scope", SCOPES, ids="+".join)
def test_padding_is_refused_where_the_router_is_not_told(megatron, scope):
    message = message_of("CUDA graphs over moe_router with a padding mask")
    with pytest.raises(RuntimeError, match=f"{message}.*--cuda-graph-scope attn"):
        _trained(scope, {}, padding=True)


def test_before_the_graphs_are_captured_everything_is_as_without(megatron):
    """As in the warm-up steps."""
    import megatron_models
    from partial_graphs import graph_settings

    results = []
    for scope in ([], WITH_PREPROCESS):
        model = megatron_models.build_model(**graph_settings(scope))
        handle = attach(model, SpecConfig(**coefficients(LOSS_NAMES, 1.0), kernels="torch"))
        gradients = megatron_models.train_step(model, megatron_models.micro_batches(3, padding=True))
        results.append((gradients, handle.end_step()))
    (plain, values), (found, found_values) = results
    assert found_values == values
    assert all(torch.equal(found[name], gradient) for name, gradient in plain.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout, models",
    [
        ("EP2", [dict(), dict(stride=3), dict(losses=PEERS), dict(pads_rows="experts")]),
        ("EP2", [dict(losses=LOSS_NAMES, model=DEEPEP), dict(losses=LOSS_NAMES, model=HYBRIDEP, pads_rows="experts")]),
        ("TP2+SP, ETP2", [dict()]),
        ("PP2+VPP2", [dict()]),
    ],
)
def test_ranks_with_graphs_train_as_one_process(tmp_path, layout, models):
    jobs = Jobs(tmp_path)
    expected = jobs.run("one process", [_case({**model, "model": {}, "pads_rows": None}, 1.0) for model in models])
    found = iter(jobs.run(layout, [{**_case(model, 1.0), "graphs": scope} for scope in SCOPES for model in models]))
    for _ in SCOPES:
        for one in expected:
            _compare(next(found), one)


@pytest.mark.slow
def test_overlapped_forward_and_backward(tmp_path):
    """Combined 1F1B replays the same graphs; what is computed is the same, bit by bit."""
    losses = (*BOTH, *PEERS_OF_TOKENS)
    cases = [
        {**_case(dict(bf16=True, losses=losses, model=model), 1.0), "graphs": scope}
        for scope in SCOPES
        for model in ({}, dict(overlap_moe_expert_parallel_comm=True))
    ]
    results = Jobs(tmp_path).run("EP2", cases)
    for plain, overlapped in zip(results[::2], results[1::2]):
        assert overlapped["losses"] == plain["losses"]
        assert _worst_error(overlapped, plain) == 0.0
