"""Rows that do not lie where the tokens' rows are looked for end the run: no gradient is silently wrong."""

from types import MethodType, SimpleNamespace

import deep_ep_on_gloo
import pytest
import torch
from loss_names import coefficients
from rule_texts import message_of

from megatron_moe_spec import SpecConfig

HYBRIDEP = dict(moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend="hybridep")
ROWS = SpecConfig(**coefficients(["specialization_loss", "orthogonality_loss"]))


@pytest.fixture
def another_order(monkeypatch):
    return lambda: monkeypatch.setattr(deep_ep_on_gloo.Order, "reversed", True)


@pytest.fixture
def flex(mm):
    """Builds models with a flex dispatcher in one process."""
    try:
        mm.build_model(num_layers=1, **HYBRIDEP)
    except AssertionError as error:
        assert "TPxEP > 1" in str(error)
        pytest.skip("this Megatron has flex dispatchers on several ranks alone: tests/layouts/test_layouts.py")
    return lambda **settings: mm.build_model(**HYBRIDEP, **settings)


def _attach(model, config=ROWS):
    from megatron_moe_spec import attach

    return attach(model, config)


def _gradients(mm, model):
    handle = _attach(model)
    return mm.train_step(model, mm.micro_batches(2)), handle.end_step()


def test_rows_of_the_library(mm, flex):
    expected, metrics = _gradients(mm, mm.build_model())
    found, found_metrics = _gradients(mm, flex())
    assert found_metrics == pytest.approx(metrics, rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("grouped", [False, True])
def test_another_order_of_the_library_is_noticed(mm, flex, another_order, grouped):
    another_order()
    model = flex(moe_grouped_gemm=grouped)
    plain = mm.train_step(model, mm.micro_batches(2), main_loss_weight=1.0)
    assert any(gradient.abs().max() > 0 for gradient in plain.values()), "Megatron itself takes any order"
    _attach(model)
    message = message_of("rows in an unknown order")
    with pytest.raises(RuntimeError, match=f"{message}.*--moe-token-dispatcher-type alltoall"):
        mm.train_step(model, mm.micro_batches(2))


def test_the_order_is_looked_at_again_after_weights_were_loaded(mm, flex, another_order):
    model = flex()
    _attach(model)
    mm.train_step(model, mm.micro_batches(2))
    another_order()
    mm.train_step(model, mm.micro_batches(2))
    model.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="flex dispatcher"):
        mm.train_step(model, mm.micro_batches(2))


def test_detach_leaves_the_dispatcher_as_it_was(flex):
    model = flex(num_layers=1)
    layer = model.decoder.layers[0].mlp
    hooks = len(layer._load_state_dict_post_hooks), len(layer.experts._forward_pre_hooks)
    handle = _attach(model)
    assert "token_dispatch" in vars(layer.token_dispatcher)
    handle.detach()
    assert "token_dispatch" not in vars(layer.token_dispatcher)
    assert (len(layer._load_state_dict_post_hooks), len(layer.experts._forward_pre_hooks)) == hooks


def test_map_of_deep_ep():
    """A token goes to the experts of its K largest probabilities, which need not be those of the map."""
    from megatron_moe_spec.integration.compat.dispatch import dispatched_map

    chosen = torch.tensor([[2, 0], [1, -1], [-1, -1]])
    dispatcher = SimpleNamespace(
        config=SimpleNamespace(moe_token_dispatcher_type="flex"), _comm_manager=SimpleNamespace(token_indices=chosen)
    )
    found = dispatched_map(dispatcher, torch.ones(3, 3, dtype=torch.bool))
    assert found.tolist() == [[True, False, True], [False, True, False], [False, False, False]]


def _pad_in_dispatcher(layer):
    """What no dispatcher of Megatron's does: rows of zeros that neither its map nor its experts tell of."""
    original = layer.token_dispatcher.dispatch_postprocess

    def padded(self, hidden_states, probs):
        rows, counts, probs = original(hidden_states, probs)
        parts = zip(rows.split(counts.tolist()), probs.split(counts.tolist()))
        pad = torch.nn.functional.pad
        parts = [(pad(x, (0, 0, 0, 2)), pad(p, (0, 2))) for x, p in parts]
        return torch.cat([x for x, _ in parts]), counts + 2, torch.cat([p for _, p in parts])

    layer.token_dispatcher.dispatch_postprocess = MethodType(padded, layer.token_dispatcher)


def test_numbers_of_rows_stay_on_the_device_where_no_loss_reads_rows(mm, monkeypatch):
    """Inference may be captured in a CUDA graph, which the host must not ask for a value."""
    from megatron_moe_spec.integration.taps import expert_rows as rows

    model = mm.build_model(moe_grouped_gemm=True)
    _attach(model)
    monkeypatch.setattr(rows, "on_host", lambda tokens_per_expert: pytest.fail("a value was asked for"))
    with torch.no_grad():
        mm.run_model(model.eval(), mm.micro_batches(1)[0])
        mm.run_model(model.train(), mm.micro_batches(1)[0])


def test_counts_that_do_not_add_up(mm):
    model = mm.build_model()
    _attach(model)
    _pad_in_dispatcher(model.decoder.layers[1].mlp)
    with pytest.raises(RuntimeError, match="MoE layer 1.*alltoall dispatcher"):
        mm.run_model(model, mm.micro_batches(1)[0])


def test_padding_that_a_tensor_tells(mm, monkeypatch):
    """As with Megatron's ``moe_use_grouped_tensor``, where the linear layers get their splits on the device."""
    from row_padding import PadRows, pad_rows

    expected, metrics = _gradients(mm, mm.build_model(moe_grouped_gemm=True))
    model = mm.build_model(moe_grouped_gemm=True)
    pad_rows([model], "experts")
    pad = PadRows.forward

    def padded(self, x, splits):
        rows, sizes = pad(self, x, splits)
        return rows, torch.tensor(sizes)

    monkeypatch.setattr(PadRows, "forward", padded)
    handle = _attach(model)
    found = mm.train_step(model, mm.micro_batches(2))
    assert handle.end_step() == pytest.approx(metrics, rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_experts_that_run_on_fewer_rows(mm, monkeypatch):
    from row_padding import PadRows, UnpadRows, pad_rows

    model = mm.build_model(moe_grouped_gemm=True)
    pad_rows([model], "experts")
    _attach(model)
    drop = lambda self, x, splits: (x[2:], [splits[0] - 2, *splits[1:]])  # noqa: E731
    monkeypatch.setattr(PadRows, "forward", drop)
    monkeypatch.setattr(UnpadRows, "forward", lambda self, x, splits: torch.nn.functional.pad(x, (0, 0, 2, 0)))
    with pytest.raises(RuntimeError, match="cannot be told apart"):
        mm.run_model(model, mm.micro_batches(1)[0])
