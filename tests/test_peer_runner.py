"""Conclusions of ``peer/run.py`` from the records of Megatron's tests, without Megatron."""

import copy
import importlib
import json

import pytest
import torch
from processes import TESTS


@pytest.fixture
def peer(monkeypatch):
    """Imports a module of ``peer/``."""
    monkeypatch.syspath_prepend(TESTS / "peer")
    return importlib.import_module


@pytest.fixture
def runs():
    """The records of two runs that agree, on two ranks: one test with losses, one without, one that is skipped."""

    def record(outcome="passed", losses=(), forwards=(), gradients=()):
        return {
            "outcome": outcome, "text": "", "forwards": [["MoELayer", f] for f in forwards], "errors": [],
            "gradients": [["MoELayer", g] for g in gradients], "random": "r", "refusals": [],
            "losses": dict.fromkeys(losses, 0.5),
        }  # fmt: skip

    def run(losses):
        return {
            "moe": [record(losses=losses, forwards="ab", gradients="cde") for _ in range(2)],
            "dense": [record(forwards="f") for _ in range(2)],
            "fp8": [record("skipped") for _ in range(2)],
        }

    return run(()), run(("specialization_loss",))


def test_equal_runs_have_no_problem(peer, runs):
    result = peer("records").compare(*runs, min_attached=1)
    assert not result.problems
    assert list(result.counts.values()) == [3, 2, 2, 1, 4, 6]
    assert result.outcomes == {("passed", "passed"): 2, ("skipped", "skipped"): 1}
    assert result.losses == {"specialization_loss": 1}


def _lose_pass(test):
    test[1]["outcome"] = "failed"


def _crash(test):
    test[0]["outcome"] = "crashed"


def _skip(test):
    test[0]["outcome"] = "skipped"


def _change_forward(test):
    test[1]["forwards"][1][1] = "x"


def _drop_forward(test):
    test[0]["forwards"].pop()


def _change_random_state(test):
    test[1]["random"] = "x"


def _change_gradient(test):
    test[0]["gradients"][2][1] = "x"


def _drop_gradients(test):
    test[0]["gradients"].clear()


def _drop_rank(test):
    test.pop()


def _report_error(test):
    test[0]["errors"].append("specialization_loss is nan")


FAULTS = [
    (_lose_pass, "passes without the losses, failed"),
    (_crash, "passes without the losses, crashed"),
    (_skip, "passes without the losses, skipped"),
    (_change_forward, "rank 1: 1 of 2 forwards differ"),
    (_drop_forward, "rank 0: 1 forwards instead of 2"),
    (_change_random_state, "rank 1: the random state"),
    (_change_gradient, "rank 0: 1 of 3 gradients differ"),
    (_drop_gradients, "rank 0: 0 gradients instead of 3"),
    (_drop_rank, "other numbers of processes"),
    (_report_error, "specialization_loss is nan"),
]


@pytest.mark.parametrize("fault, text", FAULTS, ids=[fault.__name__.strip("_") for fault, _ in FAULTS])
def test_every_fault_is_a_problem(peer, runs, fault, text):
    without, attached = runs
    fault(attached["moe"])
    problems = peer("records").compare(without, attached, min_attached=0).problems
    assert any("moe: " in problem and text in problem for problem in problems)


def test_lost_test_is_a_problem(peer, runs):
    without, attached = runs
    del attached["dense"]
    (problem,) = peer("records").compare(without, attached, min_attached=1).problems
    assert "dense: passes without the losses, not run" in problem


def test_too_few_tests_with_losses_are_a_problem(peer, runs):
    (problem,) = peer("records").compare(*runs, min_attached=2).problems
    assert problem == "losses computed in 1 tests, 2 expected"


def test_tests_that_pass_in_neither_run_are_not_compared(peer, runs):
    without, attached = copy.deepcopy(runs)
    for run in (without, attached):
        run["moe"][0]["outcome"] = "failed"
    _change_forward(attached["moe"])
    result = peer("records").compare(without, attached, min_attached=0)
    assert not result.problems and result.counts["attached"] == 0


def test_gradients_count_only_where_asked(peer, runs):
    without, attached = runs
    _change_gradient(attached["moe"])
    result = peer("records").compare(without, attached, min_attached=1, gradients=False)
    assert not result.problems and result.counts["gradients"] == 0


def test_a_test_that_a_rank_has_not_ended_has_crashed(peer, tmp_path):
    ended = {"test": "moe", "outcome": "passed", "random": "r"}
    (tmp_path / "0.jsonl").write_text(f'{{"test": "moe"}}\n{json.dumps(ended)}\n')
    (tmp_path / "1.jsonl").write_text('{"test": "moe"}\n')
    records = peer("records")
    tests = records.read(tmp_path)
    assert [record["outcome"] for record in tests["moe"]] == ["passed", "crashed"]
    assert records.outcome(tests["moe"]) == "crashed"


@pytest.mark.parametrize("fault, status", [(None, 0), (_change_forward, 1)])
def test_exit_status(peer, runs, monkeypatch, tmp_path, capsys, fault, status):
    without, attached = runs
    if fault:
        fault(attached["moe"])
    info = tmp_path / "megatron" / "core" / "package_info.py"
    info.parent.mkdir(parents=True)
    info.write_text("MAJOR = 0\nMINOR = 1\n")
    runner = peer("run")
    monkeypatch.setattr(runner, "run", lambda *arguments: attached if len(arguments) == 4 else without)
    assert runner.main([str(tmp_path), "--processes", "2"]) == status
    output = capsys.readouterr().out
    assert output.splitlines()[-1].startswith("| 2 | 3 | 2 | 2 | 1 | 4 | 6 | ")
    assert ("FAILED moe: rank 1: 1 of 2 forwards differ" in output) == bool(fault)


def test_hashes_see_every_bit(peer):
    hashes = peer("hashes")
    x = torch.linspace(1, 2, 6).view(2, 3)
    y = x.clone()
    assert hashes.value_hash((y, None)) == hashes.value_hash((x, None))
    y[1, 2] = torch.nextafter(y[1, 2], torch.tensor(3.0))
    others = [(y, None), (x.view(3, 2), None), (x.bfloat16(), None), (x,), (x, x)]
    assert len({hashes.value_hash(value) for value in [(x, None), *others]}) == 6
    assert hashes.gradient_hash([x, None]) != hashes.gradient_hash([y, None])
    assert hashes.gradient_hash([torch.tensor(-0.0)]) == hashes.gradient_hash([torch.tensor(0.0)])
