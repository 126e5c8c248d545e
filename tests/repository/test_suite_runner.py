"""Conclusions of ``megatron_suite/run.py`` from the records of Megatron's tests, without Megatron."""

import copy
import importlib
import json
import os
import signal
import sys
import time

import pytest
import torch
from processes import TESTS


@pytest.fixture
def suite(monkeypatch):
    """Imports a module of ``megatron_suite/``."""
    monkeypatch.syspath_prepend(TESTS / "megatron_suite")
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


def test_equal_runs_have_no_problem(suite, runs):
    result = suite("records").compare(*runs, min_attached=1)
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


def _exceed_time(test):
    test[0]["outcome"] = "over the time limit"


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
    (_exceed_time, "passes without the losses, over the time limit with them"),
    (_change_forward, "rank 1: 1 of 2 forwards differ"),
    (_drop_forward, "rank 0: 1 forwards instead of 2"),
    (_change_random_state, "rank 1: the random state"),
    (_change_gradient, "rank 0: 1 of 3 gradients differ"),
    (_drop_gradients, "rank 0: 0 gradients instead of 3"),
    (_drop_rank, "other numbers of processes"),
    (_report_error, "specialization_loss is nan"),
]


@pytest.mark.parametrize("fault, text", FAULTS, ids=[fault.__name__.strip("_") for fault, _ in FAULTS])
def test_every_fault_is_a_problem(suite, runs, fault, text):
    without, attached = runs
    fault(attached["moe"])
    problems = suite("records").compare(without, attached, min_attached=0).problems
    assert any("moe: " in problem and text in problem for problem in problems)


def test_lost_test_is_a_problem(suite, runs):
    without, attached = runs
    del attached["dense"]
    (problem,) = suite("records").compare(without, attached, min_attached=1).problems
    assert "dense: passes without the losses, not run" in problem


def test_too_few_tests_with_losses_are_a_problem(suite, runs):
    (problem,) = suite("records").compare(*runs, min_attached=2).problems
    assert problem == "losses computed in 1 tests, 2 expected"


def test_tests_that_pass_in_neither_run_are_not_compared(suite, runs):
    without, attached = copy.deepcopy(runs)
    for run in (without, attached):
        run["moe"][0]["outcome"] = "failed"
    _change_forward(attached["moe"])
    result = suite("records").compare(without, attached, min_attached=0)
    assert not result.problems and result.counts["attached"] == 0


@pytest.mark.parametrize("in_both", [True, False])
def test_nothing_is_concluded_from_a_test_over_the_time_limit_without_the_losses(suite, runs, in_both):
    without, attached = runs
    for run in (without, attached) if in_both else (without,):
        _exceed_time(run["moe"])
    _change_forward(attached["moe"])
    result = suite("records").compare(without, attached, min_attached=0)
    assert not result.problems and result.counts["attached"] == 0
    outcomes = ("over the time limit", "over the time limit" if in_both else "passed")
    assert result.outcomes == {("passed", "passed"): 1, ("skipped", "skipped"): 1, outcomes: 1}
    assert result.killed == [f"over the time limit {'without and with' if in_both else 'without'} the losses: moe"]


def test_a_skipped_test_over_the_time_limit_with_the_losses_is_a_problem(suite, runs):
    without, attached = runs
    _exceed_time(attached["fp8"])
    result = suite("records").compare(without, attached, min_attached=1)
    assert result.killed == ["over the time limit with the losses: fp8"]
    assert [p.strip() for p in result.problems] == ["fp8: skipped without the losses, over the time limit with them"]


def test_gradients_count_only_where_asked(suite, runs):
    without, attached = runs
    _change_gradient(attached["moe"])
    result = suite("records").compare(without, attached, min_attached=1, gradients=False)
    assert not result.problems and result.counts["gradients"] == 0


def test_a_test_that_a_rank_has_not_ended_has_crashed(suite, tmp_path):
    ended = {"test": "moe", "outcome": "passed", "random": "r"}
    (tmp_path / "0.jsonl").write_text(f'{{"test": "moe"}}\n{json.dumps(ended)}\n')
    (tmp_path / "1.jsonl").write_text('{"test": "moe"}\n')
    records = suite("records")
    tests = records.read(tmp_path)
    assert [record["outcome"] for record in tests["moe"]] == ["passed", "crashed"]
    assert records.outcome(tests["moe"]) == "crashed"


def test_a_line_that_was_cut_off_is_not_read(suite, tmp_path):
    records = suite("records")
    file = tmp_path / "0.jsonl"
    file.write_text('{"test": "first"}\n{"test": "first", "outcome": "pas')
    records.end(tmp_path, {})
    with open(file, "a") as start:
        start.write('{"test": "second"}\n')
    tests = records.read(tmp_path)
    assert {name: records.outcome(test) for name, test in tests.items()} == {"first": "crashed", "second": "crashed"}


def test_the_running_tests_are_those_that_were_begun_long_ago_and_have_not_ended(suite, tmp_path):
    records = suite("records")
    files = [tmp_path / f"{rank}.jsonl" for rank in range(4)]
    for file, text in zip(files, ('{"test": "t", "outcome": "passed"}', '{"test": "t"}', '{"test": "t"}', "")):
        file.write_text(f'{{"test": "s"}}\n{text}\n')
    for file in (files[0], files[1], files[3]):
        os.utime(file, (time.time() - 10,) * 2)
    assert records.running(tmp_path, seconds=5) == {1: "t"}
    assert records.running(tmp_path) == {1: "t", 2: "t"}
    records.end(tmp_path, {1: "t"})
    assert records.running(tmp_path) == {}
    assert [record["outcome"] for record in records.read(tmp_path)["t"]] == [
        "passed",
        "over the time limit",
        "crashed",
        "crashed",
    ]


# Stands in for torchrun and pytest, on one rank: a test does what it is called, without the losses and with them.
TORCHRUN = """
import json, os, pathlib, signal, sys, time
folder, tests = pathlib.Path(sys.argv[1]), sys.argv[2:]
done = (folder / "done.txt").read_text().splitlines()
record = dict(outcome="passed", text="", forwards=[], gradients=[], random="r", losses={}, refusals=[], errors=[])
actions = {
    "hang": lambda: time.sleep(60),
    "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGTERM": lambda: os.kill(os.getppid(), signal.SIGTERM) or time.sleep(60),
    "SIGINT": lambda: os.kill(os.getppid(), signal.SIGINT) or time.sleep(60),
}
with open(folder / "0.jsonl", "a", buffering=1) as file:
    for test in tests:
        if test not in done:
            action = (test.split("-") * 2)[folder.name == "with"]
            if action == "hang outside":
                time.sleep(60)
            print(json.dumps(dict(test=test)), file=file)
            actions.get(action, lambda: None)()
            print(json.dumps(dict(record, test=test, losses={"specialization_loss": 1.0})), file=file)
(folder / "ended").touch()
"""


@pytest.fixture
def main(suite, tmp_path, monkeypatch, capsys):
    """Runs ``main`` on a checkout with these tests; returns the status, the output and the row of the table."""
    info = tmp_path / "megatron" / "core" / "package_info.py"
    info.parent.mkdir(parents=True)
    info.write_text("MAJOR = 0\nMINOR = 1\n")
    runner = suite("run")
    handler = signal.getsignal(signal.SIGTERM)

    def command(options, processes, folder, coefficient):
        return [sys.executable, "-S", "-c", TORCHRUN, str(folder), *options.tests]

    def main(*tests):
        arguments = [str(tmp_path), "--processes", "1", "--seconds-per-test", "1", "--tests", *tests]
        begin = time.monotonic()
        status = runner.main(arguments)
        assert time.monotonic() - begin < 30  # whatever hangs was killed
        output = capsys.readouterr().out
        return status, output, output.splitlines()[-1].split(" | ")

    monkeypatch.setattr(runner, "_command", command)
    yield main
    signal.signal(signal.SIGTERM, handler)


def test_a_test_over_the_time_limit_is_named_and_the_run_continues(main):
    status, output, row = main("first", "hang-hang", "last")
    assert status == 0
    assert "over the time limit without and with the losses: hang-hang\n" in output
    assert row[1:5] == ["3", "2", "2", "2"]


def test_a_test_over_the_time_limit_with_the_losses_fails(main):
    status, output, row = main("pass-hang", "last")
    assert status == 1
    assert "over the time limit with the losses: pass-hang\n" in output
    assert "FAILED pass-hang: passes without the losses, over the time limit with them\n" in output
    assert row[1:5] == ["2", "2", "1", "1"]


def test_a_test_over_the_time_limit_without_the_losses_does_not_fail(main):
    status, output, row = main("hang-pass", "last")
    assert status == 0
    assert "over the time limit without the losses: hang-pass\n" in output
    assert row[1:5] == ["2", "1", "2", "1"]


def test_a_killed_process_is_survived(main):
    """As by the system when the memory is used up."""
    status, output, row = main("first", "die-die", "last")
    assert status == 0
    assert "crashed without and with the losses: die-die\n" in output
    assert row[1:5] == ["3", "2", "2", "2"]


def test_the_table_is_printed_when_the_starts_are_used_up(main, suite, monkeypatch):
    monkeypatch.setattr(suite("run"), "MOST_STARTS", 2)
    status, output, row = main("first", "die-die-1", "die-die-2", "last")
    assert status == 1
    assert "2 starts were not enough\n" in output
    assert "FAILED not all tests ran without the losses" in output and "FAILED not all tests ran with the" in output
    assert row[1:5] == ["3", "1", "1", "1"]


def test_the_table_is_printed_when_the_processes_hang_outside_of_tests(main, suite, monkeypatch):
    monkeypatch.setattr(suite("run"), "SECONDS_OUTSIDE_TESTS", 2)
    status, output, row = main("first", "pass-hang outside", "last")
    assert status == 1
    assert "the time limit outside of tests" in output
    assert "FAILED last: passes without the losses, not run with them\n" in output
    assert row[1:5] == ["3", "3", "1", "1"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_the_table_is_printed_after_an_interruption(main, name):
    """For the tests that have run in both runs."""
    status, output, row = main("first", "second", f"pass-{name}", "last")
    assert status == 1
    assert [line for line in output.splitlines() if line.startswith("FAILED")] == [
        "FAILED not all tests ran with the losses: the run was interrupted"
    ]
    assert row[1:5] == ["2", "2", "2", "2"]


# The first test hangs in C, where no signal handler of Python runs.
UPSTREAM_TESTS = """
import ctypes, torch
def test_hangs(): ctypes.PyDLL(None).sleep(600)
def test_passes():
    layer, x = torch.nn.Linear(1, 1), torch.ones(1, requires_grad=True)
    inner, outer = layer(x), layer(x)
    outer.register_hook(lambda gradient: torch.autograd.backward(inner))
    outer.backward()
"""


# What the plugin imports of Megatron.
MEGATRON = {
    "__init__": "",
    "core/__init__": "",
    "core/parallel_state": "def destroy_model_parallel(): pass",
    "core/tensor_parallel/__init__": "",
    "core/tensor_parallel/random": """
class CheckpointWithoutOutput: pass
class get_cuda_rng_tracker:
    def get_states(self): return {}
""",
}


@pytest.mark.slow
def test_torchrun_is_ended_and_started_again(suite, tmp_path):
    for module, text in MEGATRON.items():
        file = tmp_path / "megatron" / f"{module}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "test_upstream.py").write_text(UPSTREAM_TESTS)
    runner, records = suite("run"), suite("records")
    options = runner.parse([str(tmp_path), "--tests", "test_upstream.py", "--seconds-per-test", "10"])
    folder = tmp_path / "records"
    runner.run(options, 2, folder)
    tests = {name.partition("::")[2]: test for name, test in records.read(folder).items()}
    outcomes = {name: records.outcome(test) for name, test in tests.items()}
    assert outcomes == {"test_hangs": "over the time limit", "test_passes": "passed"}
    for record in tests["test_passes"]:
        assert [name for name, _ in record["forwards"]] == ["Linear"] * 2
        # Once for each backward pass, the inner and the outer.
        assert [name for name, _ in record["gradients"]] == ["Linear", "inputs"] * 2
    assert (folder / "ended").exists()


@pytest.mark.parametrize("fault, status", [(None, 0), (_change_forward, 1)])
def test_exit_status(suite, runs, monkeypatch, main, fault, status):
    if fault:
        fault(runs[1]["moe"])

    def run(options, processes, folder, coefficient=None):
        folder.mkdir(parents=True)
        for rank in range(2):
            tests = {name: test[rank] for name, test in runs[coefficient is not None].items()}
            lines = [json.dumps({"test": name, **record}) for name, record in tests.items()]
            (folder / f"{rank}.jsonl").write_text("\n".join(lines))
        (folder / "ended").touch()

    monkeypatch.setattr(suite("run"), "run", run)
    seen, output, row = main("tests")
    assert seen == status
    assert row[1:7] == ["3", "2", "2", "1", "4", "6"]
    assert ("FAILED moe: rank 1: 1 of 2 forwards differ" in output) == bool(fault)


def test_hashes_see_every_bit(suite):
    hashes = suite("hashes")
    x = torch.linspace(1, 2, 6).view(2, 3)
    y = x.clone()
    assert hashes.value_hash((y, None)) == hashes.value_hash((x, None))
    y[1, 2] = torch.nextafter(y[1, 2], torch.tensor(3.0))
    others = [(y, None), (x.view(3, 2), None), (x.bfloat16(), None), (x,), (x, x)]
    assert len({hashes.value_hash(value) for value in [(x, None), *others]}) == 6
    assert hashes.gradient_hash([x, None]) != hashes.gradient_hash([y, None])
    assert hashes.gradient_hash([torch.tensor(-0.0)]) == hashes.gradient_hash([torch.tensor(0.0)])
