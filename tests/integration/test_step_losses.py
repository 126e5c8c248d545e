"""Values of a step's losses: terms that wait on the device, and what the host knows, give the same as one by one."""

import pytest
import torch
from processes import needs_megatron

pytestmark = needs_megatron


def _losses(layer_indices=(0, 1), **fields):
    from megatron_moe_spec import SpecConfig
    from megatron_moe_spec.integration.step.clock import StepClock
    from megatron_moe_spec.integration.step.losses import StepLosses

    config = SpecConfig(specialization_loss_coeff=1.0, coupling_loss_coeff=1.0)
    return StepLosses(config, StepClock(config), layer_indices, **fields)


class _TwoRanks:
    size = staticmethod(lambda: 2)


def _tokens(number):
    from megatron_moe_spec.integration.hooks.routing import TokenCount

    return TokenCount(number, number)


@pytest.mark.parametrize("most", [2**18, 5, 0])
def test_waiting_terms_are_the_sums_of_each(megatron, monkeypatch, most):
    from megatron_moe_spec.integration.step import losses as module

    monkeypatch.setattr(module, "_MOST_TERMS", most)
    losses = _losses(tp_cp_group=_TwoRanks)
    generator, expected = torch.Generator().manual_seed(0), []
    # Micro-batches of several sizes; one of them known on the device alone, two without tokens.
    for num_tokens in (3, 5, torch.tensor(4), 3, 0, torch.tensor(0)):
        terms = torch.rand(4, generator=generator)
        losses.record_mean("coupling_loss", 0, terms, _tokens(num_tokens), factor=-1.0, offset=0.5)
        if num_tokens > 0:
            expected.append(0.5 - float(terms.double().sum()) / int(num_tokens))
        assert losses._num_terms <= max(most, 0) + 4
    found = losses.reduce()
    value, number = found.means["coupling_loss"], found.numbers["coupling_loss"]
    assert float(number) == len(expected) / 2
    assert float(value) == pytest.approx(2 * sum(expected) / len(expected), rel=1e-6)
    assert losses.reduce().means["coupling_loss"] == value


def test_layers_have_losses_of_their_own(megatron):
    losses = _losses([1, 4], logs_each_layer=True)
    for layer, terms in ((0, [1.0, 3.0]), (1, [6.0]), (0, [8.0])):
        losses.record_mean("specialization_loss", layer, torch.tensor(terms), _tokens(2))
    losses.record_loss("coupling_loss", 0, torch.tensor(0.25), True)
    found = losses.reduce()
    assert float(found.means["specialization_loss"]) == float(found.numbers["specialization_loss"]) == 3.0
    assert found.of_layers == {"specialization_loss": {1: 3.0, 4: 3.0}, "coupling_loss": {1: 0.25}}
    assert found.of_layers.keys() == found.means.keys() == found.numbers.keys()


def test_a_loss_without_values_has_no_mean(megatron):
    found = _losses().reduce()
    assert found.means["specialization_loss"].isnan() and found.numbers["specialization_loss"] == 0
    assert found.of_layers == {}
