"""Values of a step's losses: terms that wait on the device, and what the host knows, give the same as one by one."""

import pytest
import torch
from processes import needs_megatron

pytestmark = needs_megatron


def _recorder(**fields):
    from megatron_moe_spec import SpecConfig
    from megatron_moe_spec.integration.step.recorder import Recorder

    return Recorder(SpecConfig(specialization_loss_coeff=1.0, coupling_loss_coeff=1.0), [4, 4], **fields)


class _TwoRanks:
    size = staticmethod(lambda: 2)


def _tokens(number):
    from megatron_moe_spec.integration.hooks.routing import TokenCount

    return TokenCount(number, number)


@pytest.mark.parametrize("most", [2**18, 5, 0])
def test_waiting_terms_are_the_sums_of_each(megatron, monkeypatch, most):
    from megatron_moe_spec.integration.step import recorder as module

    monkeypatch.setattr(module, "_MOST_TERMS", most)
    recorder = _recorder(tp_cp_group=_TwoRanks)
    generator, expected = torch.Generator().manual_seed(0), []
    # Micro-batches of several sizes; one of them known on the device alone, two without tokens.
    for num_tokens in (3, 5, torch.tensor(4), 3, 0, torch.tensor(0)):
        terms = torch.rand(4, generator=generator)
        recorder.record_mean("coupling_loss", 0, terms, _tokens(num_tokens), factor=-1.0, offset=0.5)
        if num_tokens > 0:
            expected.append(0.5 - float(terms.double().sum()) / int(num_tokens))
        assert recorder._num_terms <= max(most, 0) + 4
    value, number = recorder.losses()["coupling_loss"]
    assert float(number) == len(expected) / 2
    assert float(value) == pytest.approx(2 * sum(expected) / len(expected), rel=1e-6)
    again, _ = recorder.losses()["coupling_loss"]
    assert again == value


def test_layers_have_losses_of_their_own(megatron):
    recorder = _recorder(logs_each_layer=True, layer_indices=[1, 4])
    for layer, terms in ((0, [1.0, 3.0]), (1, [6.0]), (0, [8.0])):
        recorder.record_mean("specialization_loss", layer, torch.tensor(terms), _tokens(2))
    recorder.record_loss("coupling_loss", 0, torch.tensor(0.25), True)
    value, number = recorder.losses()["specialization_loss"]
    assert (float(value), float(number)) == (3.0, 3.0)
    found = recorder.losses_of_layers()
    assert found == {"specialization_loss": {1: 3.0, 4: 3.0}, "coupling_loss": {1: 0.25}}
    assert recorder.losses_of_layers().keys() == recorder.losses().keys()


def test_a_loss_without_values_has_no_mean(megatron):
    value, number = _recorder().losses()["specialization_loss"]
    assert value.isnan() and number == 0
