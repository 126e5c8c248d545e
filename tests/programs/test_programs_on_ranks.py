"""Training programs other than Megatron's pretraining loop, on two ranks: as on one, as without, or refused by name."""

import json

import pytest
import torch
from forks import ranks
from processes import needs_megatron
from test_layouts import EP, ETP, FULL_RECOMPUTE, PP, TP, VPP

pytestmark = [needs_megatron, pytest.mark.slow]


@pytest.fixture
def programs(megatron, tmp_path):
    def run(processes: int, sizes: dict, name: str, *cases: dict) -> list:
        if processes == 1:
            import programs

            return [getattr(programs, name)(sizes, **case) for case in cases or [{}]]
        output = tmp_path / "output.pt"
        ranks(processes, "programs.py", name, output, json.dumps([sizes, cases or [{}]]))
        return torch.load(output)

    return run


def _worst_error(found: dict, expected: dict) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - g).norm() / g.norm()) for name, g in expected.items())


def test_policy_and_reference_in_one_tensor_between_stages(programs):
    cases = [
        dict(variable=False),
        dict(variable=True),
        dict(recompute=True),
        dict(kind="pathway"),
    ]
    for case, expected, found in zip(
        cases, programs(1, {}, "preference_pairs", *cases), programs(2, {PP: 2}, "preference_pairs", *cases)
    ):
        assert _worst_error(found["gradients"], expected["gradients"]) < 1e-5, case
        assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-5), case


@pytest.mark.parametrize("sizes", [{PP: 2}, {PP: 2, VPP: 2}], ids=["PP2", "PP2+VPP2"])
def test_it_does_not_matter_when_the_schedule_was_fetched(programs, sizes):
    # One job each: the second in a process would find the schedule as the first has left it.
    (found,), (expected,) = (programs(2, sizes, "schedule_fetched", dict(before=before)) for before in (True, False))
    assert found["metrics"] == expected["metrics"] and found["metrics"]["coupling_loss"] > 0
    assert all(torch.equal(found["gradients"][name], g) for name, g in expected["gradients"].items())


@pytest.mark.parametrize("sizes", [{PP: 2}, {PP: 2, VPP: 2}], ids=["PP2", "PP2+VPP2"])
def test_other_passes_between_steps_see_plain_megatron(programs, sizes):
    disturbed, alone = programs(2, sizes, "passes_between_steps", dict(disturbed=True), dict(disturbed=False))
    for found, expected in zip(disturbed["steps"], alone["steps"], strict=True):
        assert found["metrics"] == expected["metrics"]
        assert all(torch.equal(found["gradients"][name], g) for name, g in expected["gradients"].items())
    assert disturbed["steps"][0]["metrics"]["coupling_loss"] > 0
    # The other model, which shares the config object, before and after the losses are detached.
    assert all(torch.equal(disturbed["other"][name], g) for name, g in disturbed["plain"].items())


def test_metrics_alone_send_nothing_between_stages(programs):
    (found,), (expected,) = programs(2, {PP: 2}, "metrics_alone"), programs(1, {}, "metrics_alone")
    assert set(found["lengths"]) == {12}
    diagnostics = found["metrics"]["diagnostics"]
    assert [pair["layers"] for pair in diagnostics["pairs"]] == [[0, 1], [2, 3]]
    for one, other in zip(expected["metrics"]["diagnostics"]["layers"], diagnostics["layers"], strict=True):
        assert other.keys() == one.keys()
        for name, value in one.items():
            assert other[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize(
    "names",
    [("specialization", "coupling"), ("orthogonality", "score_variance"), ("erc",), ("router_orthogonality",)],
    ids=lambda names: names[-1],
)
def test_ranks_with_different_numbers_of_tokens(programs, names):
    config = {f"{name}_loss_coeff": 1.0 for name in names}
    cases = [dict(config=config, padding=padding) for padding in (False, True)]
    for case, expected, found in zip(
        cases, *(programs(processes, sizes, "dynamic_lengths", *cases) for processes, sizes in ((1, {}), (2, {EP: 2})))
    ):
        assert _worst_error(found["gradients"], expected["gradients"]) < 1e-5, case
        assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-5), case


def test_erc_reads_weights_that_have_been_gathered(programs):
    plain, overlapped = programs(2, {}, "overlapped_parameter_gather", dict(overlap=False), dict(overlap=True))
    assert overlapped == pytest.approx(plain, rel=1e-4)
    assert plain[0] != pytest.approx(plain[1], rel=0.1)


@pytest.mark.parametrize("settings", [{}, FULL_RECOMPUTE], ids=["plain", "full recompute"])
def test_megatron_fsdp(programs, settings):
    """ZeRO-2 and ZeRO-3 train as DDP does."""
    names = ("specialization", "coupling", "orthogonality", "score_variance")
    config = {f"{name}_loss_coeff": 1.0 for name in names}
    strategies = (None, "optim_grads", "optim_grads_params")
    expected, *sharded = programs(
        2, {}, "sharded_weights", *(dict(strategy=one, config=config, **settings) for one in strategies)
    )
    for found in sharded:
        assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)
        assert _worst_error(found["gradients"], expected["gradients"]) < 1e-5


def test_stages_that_differ_and_passes_outside_of_the_schedule_are_refused(programs):
    (found,) = programs(2, {PP: 2}, "errors")
    assert "another config" in found["other config"]
    assert "--moe-coupling-across-stages" in found["outside of the schedule"]


def test_expert_tensor_parallelism_is_read_off_the_process_groups(programs):
    """The model's settings say 1."""
    (found,) = programs(2, {TP: 2, ETP: 2}, "errors")
    assert "--expert-tensor-parallel-size is 2" in found["orthogonality"]
    assert found["specialization"] is None


def test_values_are_reduced_over_the_ranks_that_hold_the_model(programs):
    (values,) = programs(2, {}, "one_rank_holds_the_model")
    assert 0 < values["coupling_loss"] < 1
