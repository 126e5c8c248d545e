"""Which forwards count in a step's values, loads and traces, and what goes on where steps are never ended."""

import json
import re
import textwrap
import warnings

import pytest
import torch
from loss_names import LOSS_NAMES, coefficients
from processes import ROOT

from megatron_moe_spec import SpecConfig

ALL = SpecConfig(**coefficients(LOSS_NAMES), metrics_interval=1)
STRIDE = SpecConfig(specialization_loss_coeff=1.0, specialization_token_stride=5, metrics_interval=1)


def _attach(model, config=ALL):
    from megatron_moe_spec import attach

    return attach(model, config)


@pytest.fixture
def expected(mm):
    """Gradients and values of a step of two micro-batches."""

    def run(config):
        model = mm.build_model()
        handle = _attach(model, config)
        return mm.train_step(model, mm.micro_batches(2)), handle.end_step()

    return run


@pytest.mark.parametrize("config", [ALL, STRIDE], ids=["all losses", "stride"])
def test_a_step_that_runs_again_counts_once(mm, expected, config):
    """As Megatron's rerun state machine runs it; with the tokens of the first run, where they are chosen in turns."""
    gradients, values = expected(config)
    model = mm.build_model()
    handle = _attach(model, config)
    for _ in range(3):
        found = mm.train_step(model, mm.micro_batches(2))
    assert handle.end_step() == values
    assert all(torch.equal(found[name], gradient) for name, gradient in gradients.items())


def test_traces_of_a_step_that_runs_again(mm, tmp_path):
    rows = []
    for times in (1, 3):
        folder = tmp_path / str(times)
        model = mm.build_model()
        handle = _attach(model, SpecConfig(trace_path=str(folder), trace_interval=1))
        for _ in range(times):
            mm.train_step(model, mm.micro_batches(2))
        handle.end_step()
        handle.detach()
        (file,) = folder.glob("*.jsonl")
        rows.append([json.loads(line) for line in file.read_text().splitlines()])
    assert rows[0] == rows[1] and len(rows[0]) == 2 * 3


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recompute"])
def test_a_forward_that_fails_or_is_left_out_counts_for_nothing(mm, recompute):
    settings = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    found = []
    for disturbed in (False, True):
        model = mm.build_model(**(settings if recompute else {}))
        handle = _attach(model)
        first, second, other = mm.micro_batches(3)
        mm.run_model(model, first).mean().backward()
        if disturbed:
            skipped = mm.run_model(model, other)
            assert skipped.requires_grad
            hook = model.decoder.layers[2].register_forward_pre_hook(_fail)
            with pytest.raises(MemoryError):
                mm.run_model(model, other)
            hook.remove()
        mm.run_model(model, second).mean().backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters()}
        found.append((gradients, handle.end_step()))
    (expected, expected_values), (gradients, values) = found
    assert {name: values[name] for name in LOSS_NAMES} == pytest.approx(
        {name: expected_values[name] for name in LOSS_NAMES}, rel=1e-6
    )
    assert [layer["load"] for layer in values["diagnostics"]["layers"]] == [
        layer["load"] for layer in expected_values["diagnostics"]["layers"]
    ]
    # The noise of ERC is the step's.
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def _fail(*args):
    raise MemoryError("out of memory")


def test_metrics_alone_count_what_has_a_backward_pass(mm):
    model = mm.build_model()
    handle = _attach(model, SpecConfig(metrics_interval=1))
    mm.run_model(model, mm.micro_batches(1)[0])
    assert handle.end_step()["diagnostics"]["layers"][0]["load"] == [0, 0, 0, 0]
    mm.run_model(model, mm.micro_batches(1)[0]).mean().backward()
    assert sum(handle.end_step()["diagnostics"]["layers"][0]["load"]) == 2 * 12 * 2


@pytest.mark.parametrize("by_schedule", [True, False], ids=["Megatron's schedule", "forwards"])
def test_a_loop_that_ends_no_step(mm, monkeypatch, by_schedule):
    """Noise and tokens differ from step to step; nothing grows; one warning names the call."""
    from megatron_moe_spec.integration.step import clock

    monkeypatch.setattr(clock, "_MOST_FORWARDS", 4)
    monkeypatch.setattr(clock, "_MOST_ATTEMPTS", 3)
    model = mm.build_model()
    handle = _attach(model)
    seen, kept = [], []
    with pytest.warns(UserWarning, match="call end_step") as warned:
        for _ in range(24):
            if by_schedule:
                mm.train_step(model, mm.micro_batches(1))
            else:
                mm.run_model(model, mm.micro_batches(1)[0]).mean().backward()
            seen.append(handle._clock.step)
            kept.append(handle._losses._num_terms + sum(map(len, handle._diagnostics._layers.loads)))
    assert len([one for one in warned if "end_step" in str(one.message)]) == 1
    assert seen[:3] == [0, 0, 0] and len(set(seen)) >= 6
    assert max(kept[12:]) <= max(kept[:12])
    handle.end_step()
    assert handle._clock.step == 1


def test_steps_that_are_ended_are_not_warned_of(mm, monkeypatch):
    from megatron_moe_spec.integration.step import clock

    monkeypatch.setattr(clock, "_MOST_ATTEMPTS", 3)
    model = mm.build_model()
    handle = _attach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for iteration in range(1, 8):
            mm.train_step(model, mm.micro_batches(1))
            handle.end_step()
            assert handle._clock.step == iteration


@pytest.mark.parametrize("interval", [1, 3])
def test_a_resumed_run_goes_on_as_the_one_that_it_resumes(mm, tmp_path, interval):
    """Noise and tokens, which differ from step to step, and which steps are measured and traced."""
    config = SpecConfig(
        **coefficients(LOSS_NAMES),
        specialization_token_stride=5,
        metrics_interval=interval,
        trace_path=str(tmp_path),
        trace_interval=interval,
    )
    found = []
    for resumes in (False, True):
        model = mm.build_model()
        handle = _attach(model, config)
        if resumes:
            mm.train_step(model, mm.micro_batches(1))  # of which nothing may be left
            handle.start_after(2)
        for _ in range(0 if resumes else 2):
            mm.train_step(model, mm.micro_batches(1))
            handle.end_step()
        gradients = mm.train_step(model, mm.micro_batches(2))
        values = handle.end_step()
        handle.detach()
        (file,) = tmp_path.glob("*.jsonl")
        found.append((gradients, values, file.read_text()))
        file.unlink()
    (expected, expected_values, expected_trace), (gradients, values, trace) = found
    assert values == expected_values and "diagnostics" in values
    assert expected_trace.endswith(trace) and trace.count('"step": 3') == trace.count("\n") == 3 * 2
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())


def test_a_stride_above_the_number_of_tokens_takes_one(mm):
    """Of 24 tokens: each of them in turn, by its own value, which lies in [0, 1]; their mean is that of all."""
    values = {}
    for stride in (1, 24, 1000):
        model = mm.build_model()
        handle = _attach(model, SpecConfig(specialization_loss_coeff=1.0, specialization_token_stride=stride))
        found = []
        for _ in range(min(stride, 24)):
            mm.run_model(model, mm.micro_batches(1)[0]).mean().backward()
            found.append(handle.end_step()["specialization_loss"])
        values[stride] = found
    assert all(0.0 <= value <= 1.0 for value in values[1000]) and len(set(values[1000])) > 12
    assert values[1000] == pytest.approx(values[24])
    assert sum(values[1000]) / 24 == pytest.approx(values[1][0], rel=1e-5)


def test_the_scale_that_the_guide_sets_is_taken_by_the_next_schedule(mm, monkeypatch):
    """Megatron keeps the first tensor, and copies into it."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)
    guide = (ROOT / "docs" / "guide.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", guide, re.S) if "set_loss_scale" in block]
    exec(textwrap.dedent(code), {"torch": torch, "num_micro_batches": 2})
    assert MoEAuxLossAutoScaler.main_loss_backward_scale == 0.5
    model = mm.build_model()
    handle = _attach(model)
    assert mm.train_step(model, mm.micro_batches(2)) and handle.end_step()


def test_a_model_that_is_on_the_meta_device_when_the_losses_are_attached(mm, expected):
    gradients, values = expected(ALL)
    weights = mm.build_model().state_dict()
    model = mm.build_model().to("meta")
    handle = _attach(model)
    model.to_empty(device="cpu")
    model.load_state_dict(weights)
    found = mm.train_step(model, mm.micro_batches(2))
    assert handle.end_step() == values
    assert all(torch.equal(found[name], gradient) for name, gradient in gradients.items())
