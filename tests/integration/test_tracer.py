"""Traces against plain forward hooks on the routers: every token's experts, dropped ones and padding as they are."""

import json

import pytest
import torch
from processes import needs_megatron

from megatron_moe_spec import SpecConfig
from megatron_moe_spec.traces.files import read_trace
from megatron_moe_spec.traces.schema import DROPPED, PADDING

pytestmark = needs_megatron

FULL_RECOMPUTE = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
MODELS = {
    "plain": {},
    "dense layers between": dict(moe_layer_freq=[0, 1, 1]),
    "full recompute": FULL_RECOMPUTE,
    "moe recompute": dict(recompute_granularity="selective", recompute_modules=["moe"]),
    "tokens are dropped": dict(moe_expert_capacity_factor=0.6),
    "tokens are dropped, experts filled up": dict(
        moe_expert_capacity_factor=0.6, moe_pad_expert_input_to_capacity=True
    ),
    "one expert a token": dict(moe_router_topk=1, moe_router_pre_softmax=True),
    "allgather dispatcher, sigmoid": dict(
        moe_token_dispatcher_type="allgather", moe_router_score_function="sigmoid", moe_router_topk=3
    ),
}


def _trained(mm, folder, batches, steps=1, seed=0, **settings):
    """Trains a few steps with a trace; returns what plain hooks saw: {step: [(layer, probabilities, map)]}."""
    from megatron_moe_spec import attach

    model = mm.build_model(seed=seed, **settings)
    handle = attach(model, SpecConfig(trace_path=str(folder), trace_interval=2))
    seen = {}
    for step in range(1, steps + 1):
        calls = seen.setdefault(step, [])
        hooks = [
            layer.mlp.router.register_forward_hook(
                lambda module, inputs, output, number=number: calls.append((number, *output))
            )
            for number, layer in enumerate(model.decoder.layers)
            if hasattr(layer.mlp, "router")
        ]
        mm.train_step(model, batches, main_loss_weight=1.0)
        for hook in hooks:
            hook.remove()
        handle.end_step()
    handle.detach()
    return seen


def _experts_of(probs, routing_map):
    return [[e for e, here in enumerate(row) if here] for row in (routing_map & (probs > 0)).tolist()]


def _records(folder):
    return [json.loads(line) for line in (folder / "router_trace_rank0.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", MODELS)
def test_a_trace_is_what_plain_hooks_see(mm, tmp_path, name):
    settings = MODELS[name]
    batches = mm.micro_batches(2)
    seen = _trained(mm, tmp_path, batches, steps=3, **settings)
    records = _records(tmp_path)
    assert {record["step"] for record in records} == {2}
    top_k = settings.get("moe_router_topk", 2)
    layers = {layer for layer, *_ in seen[2]}
    assert len(records) == len(layers) * len(batches)  # a recomputed layer is there once
    num_dropped = 0
    for record in records:
        # With recomputation, hooks see a layer's two passes one after the other; both decide alike.
        calls = [call for call in seen[2] if call[0] == record["layer"]]
        expected = _experts_of(*calls[record["micro_batch"] * len(calls) // len(batches)][1:])
        if "recompute" in name:
            expected = next(
                found
                for found in (_experts_of(*call[1:]) for call in calls)
                if found == [[e for e in row if e >= 0] for row in record["top_indices"]]
            )
        padded = [row + [DROPPED] * (top_k - len(row)) for row in expected]
        assert record["top_indices"] == padded
        num_dropped += sum(row.count(DROPPED) for row in padded)
        assert record["num_tokens"] == len(padded) == mm.SEQUENCE * mm.MICRO_BATCH
        assert (record["topk"], record["num_sequences"], record["rank"]) == (top_k, mm.MICRO_BATCH, 0)
    assert (num_dropped > 0) == ("dropped" in name)

    trace = read_trace(tmp_path)
    assert trace.layers == tuple(sorted(layers)) and trace.num_layers == 3 and trace.hidden_size == 16
    assert trace.num_experts == 4 and len(trace.experts_TMK) == len(batches) * mm.SEQUENCE * mm.MICRO_BATCH


def test_padding_is_told_from_what_was_dropped(mm, tmp_path):
    batches = mm.micro_batches(2, padding=True)
    _trained(mm, tmp_path, batches, steps=2, moe_expert_capacity_factor=0.6)
    for record in _records(tmp_path):
        is_padding = batches[record["micro_batch"]]["padding_mask"].T.reshape(-1).tolist()
        assert [PADDING in row for row in record["top_indices"]] == is_padding
        assert all(set(row) == {PADDING} for row, padding in zip(record["top_indices"], is_padding) if padding)
    assert any(DROPPED in row for record in _records(tmp_path) for row in record["top_indices"])
    padding = sum(int(batch["padding_mask"].sum()) for batch in batches)
    assert read_trace(tmp_path).num_padding == padding > 0


def test_nothing_is_traced_in_other_steps_nor_in_evaluation(mm, tmp_path):
    from megatron_moe_spec import attach

    model = mm.build_model()
    handle = attach(model, SpecConfig(trace_path=str(tmp_path), trace_interval=2))
    (batch,) = mm.micro_batches(1)
    for _ in range(2):
        model.eval()
        mm.run_model(model, batch)
        model.train()
        with torch.no_grad():
            mm.run_model(model, batch)
        mm.run_model(model, batch).sum().backward()
        assert handle.end_step() == {}
    handle.detach()
    assert [record["step"] for record in _records(tmp_path)] == [2] * 3


def test_layers_without_a_number_are_counted(mm, tmp_path):
    from megatron_moe_spec import attach

    model = mm.build_model()
    for layer in model.decoder.layers:
        layer.mlp.layer_number = None
    handle = attach(model, SpecConfig(trace_path=str(tmp_path), trace_interval=1))
    mm.run_model(model, mm.micro_batches(1)[0]).sum().backward()
    handle.end_step()
    handle.detach()
    assert read_trace(tmp_path).layers == (0, 1, 2)


def test_a_resumed_run_appends(mm, tmp_path):
    batches = mm.micro_batches(1)
    for _ in range(2):
        _trained(mm, tmp_path, batches, steps=2)
    assert [record["step"] for record in _records(tmp_path)] == [2] * 6
    trace = read_trace(tmp_path)
    assert len(trace.experts_TMK) == mm.SEQUENCE * mm.MICRO_BATCH
    assert any("restart" in notice for notice in trace.notices)


def test_a_folder_that_cannot_be_used_is_an_error(mm, tmp_path):
    from megatron_moe_spec import attach

    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="cannot be written .*set --moe-spec-trace-path to another folder"):
        attach(mm.build_model(), SpecConfig(trace_path=str(file)))
    attach(mm.build_model(), SpecConfig(trace_path=str(tmp_path))).detach()
    with pytest.raises(ValueError, match="router_trace_model.json is of another model .*--moe-spec-trace-path"):
        attach(mm.build_model(num_moe_experts=8), SpecConfig(trace_path=str(tmp_path)))


@pytest.mark.parametrize("text", ["", '{"num_layers": 3, "num_exp'])
def test_a_model_file_that_was_cut_off_is_written_anew(mm, tmp_path, text):
    from megatron_moe_spec import attach

    config = SpecConfig(trace_path=str(tmp_path))
    attach(mm.build_model(), config).detach()
    file = tmp_path / "router_trace_model.json"
    whole = file.read_text()
    file.write_text(text)
    attach(mm.build_model(), config).detach()
    assert file.read_text() == whole and not list(tmp_path.glob("*.written"))


def test_a_file_that_cannot_be_written_later_does_not_end_training(mm, tmp_path):
    from megatron_moe_spec import attach

    model = mm.build_model()
    handle = attach(model, SpecConfig(trace_path=str(tmp_path), trace_interval=1))
    (tmp_path / "router_trace_rank0.jsonl").unlink()
    (tmp_path / "router_trace_rank0.jsonl").mkdir()
    mm.run_model(model, mm.micro_batches(1)[0]).sum().backward()
    with pytest.warns(UserWarning, match="router_trace_rank0.jsonl cannot be written .*training goes on"):
        handle.end_step()
        handle.detach()


def test_settings_are_checked():
    with pytest.raises(
        ValueError, match="trace_interval .--moe-spec-trace-interval. must be finite and at least 1; got 0"
    ):
        SpecConfig(trace_path="traces", trace_interval=0)
    with pytest.raises(ValueError, match="trace_path .--moe-spec-trace-path. must be a string; got None"):
        SpecConfig(trace_path=None)
    assert SpecConfig(trace_path="traces").enabled and not SpecConfig(trace_interval=5).enabled
