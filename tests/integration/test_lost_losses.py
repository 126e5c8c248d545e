"""No layer loses its losses in silence: it trains with them, or is named with the cause and the remedy."""

import math
import types
import warnings

import pytest
import torch
from loss_names import LOSS_NAMES, coefficients

from megatron_moe_spec import SpecConfig

ALL = SpecConfig(**coefficients(LOSS_NAMES))
BOTH = SpecConfig(specialization_loss_coeff=1.0, coupling_loss_coeff=1.0)
LAYER = "decoder.layers.1.mlp"


def _attach(model, config=ALL):
    from megatron_moe_spec import attach

    return attach(model, config)


@pytest.fixture
def step(mm, trainers):
    """Gradients of the losses alone, and their values."""

    def run(model, handle):
        (batch,) = mm.micro_batches(1)
        model.zero_grad()
        (0.0 * mm.run_model(model, batch).mean()).backward()
        return trainers.gradients_of(model), handle.end_step()

    return run


def _replace_one_projection(layer, donor):
    layer.experts.local_experts[0].linear_fc2 = donor.experts.local_experts[0].linear_fc2


def _replace_experts(layer, donor):
    layer.experts = donor.experts


def _replace_router(layer, donor):
    layer.router = donor.router


def _replace_routing(layer, donor):
    layer.router.routing = types.MethodType(type(layer.router).routing, layer.router)


REPLACED = {
    "linear_fc2": _replace_one_projection,
    "experts": _replace_experts,
    "router": _replace_router,
    "router's method routing": _replace_routing,
}


@pytest.mark.parametrize("what", REPLACED)
def test_what_is_replaced_after_attach_is_named(mm, trainers, step, what):
    model, donor = mm.build_model(), mm.build_model(seed=1)
    handle = _attach(model)
    REPLACED[what](model.decoder.layers[1].mlp, donor.decoder.layers[1].mlp)
    with pytest.raises(RuntimeError, match=f"{LAYER}: its {what} was replaced after attach.*call attach"):
        step(model, handle)
    # The remedy.
    handle.detach()
    handle = _attach(model)
    expected_model, donor = mm.build_model(), mm.build_model(seed=1)
    REPLACED[what](expected_model.decoder.layers[1].mlp, donor.decoder.layers[1].mlp)
    found, expected = step(model, handle), step(expected_model, _attach(expected_model))
    assert found[1] == expected[1]
    trainers.assert_identical(found[0], expected[0])


def test_a_layer_that_is_replaced_is_named(mm, step):
    model = mm.build_model()
    handle = _attach(model)
    step(model, handle)
    model.decoder.layers[1].mlp = mm.build_model(seed=1).decoder.layers[1].mlp
    with pytest.raises(RuntimeError, match=f"{LAYER}: its module was replaced after attach"):
        step(model, handle)


def test_a_method_that_calls_ours_is_no_replacement(mm, step):
    model, expected_model = mm.build_model(), mm.build_model()
    handle = _attach(model)
    router = model.decoder.layers[1].mlp.router
    routing, calls = router.routing, []
    router.routing = lambda *args, **options: calls.append(args) or routing(*args, **options)
    found, expected = step(model, handle), step(expected_model, _attach(expected_model))
    assert calls and found[1] == expected[1]


@pytest.mark.parametrize("part", ["", "router"])
@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recompute"])
def test_a_layer_in_evaluation_mode_trains_the_others_as_in_training_mode(mm, trainers, step, part, recompute):
    settings = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    found = []
    for evaluates in (False, True):
        model = mm.build_model(**(settings if recompute else {}))
        layer = model.decoder.layers[1].mlp
        layer.requires_grad_(False)
        handle = _attach(model)
        if evaluates:
            layer.get_submodule(part).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            found.append(step(model, handle))
    (expected, expected_values), (gradients, values) = found
    assert values == expected_values
    trainers.assert_identical(gradients, expected)


def _skip(layer, monkeypatch):
    monkeypatch.setattr(layer, "forward", lambda hidden_states, *args, **kwargs: (hidden_states, None))


def _without_gradients(layer, monkeypatch):
    monkeypatch.setattr(layer, "forward", torch.no_grad()(layer.forward))


@pytest.mark.parametrize("spoil, reason", [(_skip, "it did not run"), (_without_gradients, "it ran without gradients")])
def test_a_layer_that_has_no_losses_in_a_step_is_named_once(mm, step, monkeypatch, spoil, reason):
    model = mm.build_model(num_layers=4)
    handle = _attach(model, BOTH)
    with monkeypatch.context() as patch:
        spoil(model.decoder.layers[1].mlp, patch)
        with pytest.warns(UserWarning) as seen:
            for _ in range(3):
                _, values = step(model, handle)
    messages = [str(one.message) for one in seen if LAYER in str(one.message)]
    assert len(messages) == 1 and f"{LAYER} ({reason})" in messages[0] and "pairs" in messages[0]
    assert 0.0 < values["specialization_loss"] < 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _, values = step(model, handle)
    assert values.keys() == {"specialization_loss", "coupling_loss"}


class _Twice(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.policy, self.config = model, model.config

    def forward(self, tokens, positions, mask, labels):
        first = self.policy(tokens, positions, mask, labels=labels)
        return first - self.policy(tokens.flip(0), positions, mask, labels=labels)


def test_a_module_that_runs_its_model_twice(mm, step):
    model = _Twice(mm.build_model())
    with pytest.raises(RuntimeError, match="ran twice.*give it the model inside"):
        step(model, _attach(model))
    model = _Twice(mm.build_model())  # the remedy
    gradients, values = step(model, _attach(model.policy))
    assert values.keys() == set(LOSS_NAMES) and gradients


def test_a_looped_layer_has_no_remedy_but_to_switch_the_losses_off(mm, step):
    model = mm.build_model()
    layer = model.decoder.layers[1]
    forward = layer.forward

    def twice(hidden_states, **kwargs):
        hidden_states, *_ = forward(hidden_states, **kwargs)
        return forward(hidden_states, **kwargs)

    layer.forward = twice
    with pytest.raises(RuntimeError, match="ran twice.*looped layers.*coefficients to 0"):
        step(model, _attach(model))


class _Vision(torch.nn.Module):
    """A projection before a language model, as vision-language models are built."""

    def __init__(self, model):
        super().__init__()
        self.language_model, self.config = model, model.config
        self.pre_process = self.post_process = True
        self.projection = torch.nn.Linear(16, 16)

    def set_input_tensor(self, x):
        self.language_model.set_input_tensor(x)

    def forward(self, tokens, positions, mask, labels):
        embedded = self.projection(self.language_model.embedding(tokens, positions))
        return self.language_model(tokens, positions, mask, decoder_input=embedded, labels=labels)


def test_what_is_trained_through_a_frozen_model_is_trained_with_the_losses(mm, step):
    found = []
    for frozen in (False, True):
        torch.manual_seed(0)
        model = _Vision(mm.build_model())
        model.language_model.requires_grad_(not frozen)
        found.append(step(model, _attach(model)))
    (expected, expected_values), (gradients, values) = found
    assert values == expected_values and gradients.keys() == {"projection.weight", "projection.bias"}
    assert all(torch.equal(gradients[name], expected[name]) for name in gradients)
    language_model = mm.build_model().requires_grad_(False)
    with pytest.raises(ValueError, match="frozen.*the module that holds what is trained through it"):
        _attach(language_model)
    _attach(language_model, SpecConfig(metrics_interval=1)).detach()


def _by_table(layer_number, original):
    def routing(self, logits, *args, **kwargs):
        if self.layer_number != layer_number:
            return original(self, logits, *args, **kwargs)
        scores = logits.view(-1, logits.shape[-1])
        tokens = torch.arange(len(scores))
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen[tokens, tokens % 4] = chosen[tokens, (tokens + 1) % 4] = True
        return torch.softmax(scores, -1).masked_fill(~chosen, 0.0), chosen

    return routing


def test_decisions_that_are_not_the_routers_are_said_once(mm, step, monkeypatch):
    from megatron.core.transformer.moe.router import TopKRouter

    monkeypatch.setattr(TopKRouter, "routing", _by_table(1, TopKRouter.routing))
    model = mm.build_model()
    handle = _attach(model)
    with pytest.warns(UserWarning) as seen:
        for _ in range(3):
            step(model, handle)
    messages = [str(one.message) for one in seen if "their router scores highest" in str(one.message)]
    assert len(messages) == 1 and "decoder.layers.0.mlp, most tokens" in messages[0]


@pytest.mark.parametrize("not_a_number", [False, True], ids=["", "NaN"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(moe_expert_capacity_factor=0.7),
        dict(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True),
        dict(moe_expert_capacity_factor=1.2, moe_pad_expert_input_to_capacity=True),
    ],
    ids=["softmax", "dropped tokens", "sigmoid with bias", "filled up to capacity"],
)
def test_decisions_of_routers_are_not_warned_of(mm, step, settings, not_a_number):
    model = mm.build_model(**settings)
    if not_a_number:
        with torch.no_grad():
            model.decoder.layers[1].mlp.router.weight.fill_(math.nan)
    handle = _attach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        step(model, handle)


def test_layers_that_a_table_routes_are_left_out(mm):
    """``is_hash_layer`` is TopKRouter's, where Megatron has --moe-n-hash-layers."""
    model = mm.build_model()
    model.decoder.layers[0].mlp.router.is_hash_layer = True
    handle = _attach(model)
    assert handle.layers == ["decoder.layers.1.mlp", "decoder.layers.2.mlp"]
    assert "--moe-n-hash-layers" in handle.skipped["decoder.layers.0.mlp"]
