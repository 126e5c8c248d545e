"""The benchmarks on tiny shapes, in Triton's interpreter: they check before they measure, and name what they skip."""

import importlib.util
import io
import json
import sys
import threading
import time

import pytest
from processes import HAS_MEGATRON, ROOT, needs_megatron, python

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("torch")


def _module(name: str):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def _python(*command):
    return python(*command, cwd=ROOT / "benchmarks", timeout=660, CUDA_VISIBLE_DEVICES="")


@pytest.mark.slow
def test_without_a_gpu_everything_is_tried_and_nothing_is_called_measured(tmp_path):
    parts = "check,kernels,layer,sweep,train,memcheck"
    run = _python("run.py", "--parts", parts, "--minutes", 10, "--output", tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    summary = run.stdout.split("No GPU, nothing was measured")[1]
    assert "SKIPPED: no GPU" in summary
    assert summary.count("PASSED") == (5 if HAS_MEGATRON else 3)
    report = (tmp_path / "summary.md").read_text()
    assert "| memcheck | SKIPPED: no GPU |" in report and "| smoke | 20 | cosines | triton |" in report
    assert "- triton: " in report and "outputs are right" in (tmp_path / "log.txt").read_text()
    records = {}
    for name in ("check", "kernels", "sweep", "layer", "train") if HAS_MEGATRON else ("check", "kernels", "sweep"):
        record = records[name] = json.loads((tmp_path / f"{name}.json").read_text())
        assert record["device"].startswith("CPU") and record["torch"] and record["triton"]
        assert record["checks" if name == "check" else "rows"]
    assert not records["check"]["rows"]
    # What was found without a GPU is not where kernels read it.
    assert list(json.loads((tmp_path / "tuned.json").read_text())) == ["interpreted"]
    if HAS_MEGATRON:
        assert all(row["host_ms"] > 0 and "host_difference_ms" in row for row in records["layer"]["rows"])
        assert "not of a training step" in report and "not of a training step" in run.stdout


@pytest.mark.slow
def test_a_wrong_kernel_is_not_timed(tmp_path):
    run = _python(
        "-c",
        f"""
import sys
sys.argv = ["kernels.py", "--smoke", "--output", {str(tmp_path)!r}]
import kernels, operations
right = operations.mass_kernels.routed_mass
operations.mass_kernels.routed_mass = lambda *inputs: (1.001 * right(*inputs)[0], right(*inputs)[1])
sys.exit(kernels.main())
""",
    )
    assert run.returncode == 1, run.stdout + run.stderr
    assert run.stdout.count("WRONG") == 2 and "mass" in run.stdout
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    others = {"cosines", "mixing gradient", "cosines gradient", "row indices", "mass gradient"}
    others |= {"SwiGLU gradient", "SwiGLU gradient of a sum"}
    assert {row["operation"] for row in rows} == others


@pytest.mark.slow
@needs_megatron
@pytest.mark.parametrize(
    "fault, wrong",
    [("pass", 0), ("Case.of_loss = lambda case: case.incoming", 2), ("Case.fused = lambda case: case.backward()", 2)],
)
def test_the_fused_backward_is_compared_with_the_loss_weighed_as_the_incoming_gradient(tmp_path, fault, wrong):
    """Both it and what it is compared with, which would otherwise hide its faults by its own."""
    run = _python(
        "-c",
        f"""
import sys
sys.argv = ["fused.py", "--smoke", "--output", {str(tmp_path)!r}]
import fused
from fused import Case
{fault}
fused.TIMED = {{}}
sys.exit(fused.main())
""",
    )
    assert run.returncode == bool(wrong), run.stdout + run.stderr
    assert run.stdout.count("WRONG") == wrong
    checks = json.loads((tmp_path / "fused.json").read_text())["errors, relative to the largest value"]
    assert [row["right"] for row in checks] == 2 * [not wrong]


def test_unknown_part_is_named():
    run = _python("run.py", "--parts", "kernel")
    assert run.returncode == 2 and "--parts knows" in run.stderr


# Parts


class _Call:
    """Calls of benchmarks/run.py whose parts are programs of these tests."""

    def __init__(self, tmp_path):
        self.run, self.output, self.log = _module("run"), tmp_path, io.StringIO()

    def part(self, code: str, seconds: float = 60, left: float = 60, **fields) -> str:
        part = self.run.Part([sys.executable, "-c", code], seconds, smoke=(), has_rows=False, **fields)
        return self.run.run("part", part, False, self.output, left, self.log)


@pytest.fixture
def call(tmp_path):
    return _Call(tmp_path)


def test_all_parts_fit_into_the_minutes_of_a_call_and_each_half_into_half_of_them(call):
    """So that none is cut off for want of time, whatever the others take."""
    most = [part.seconds + call.run.GRACE for part in call.run.PARTS.values()]
    assert list(call.run.PARTS)[:3] == ["check", "kernels", "layer"]
    starting = 15  # seconds, to import torch
    for half in (most[:5], most[5:]):
        assert sum(half) + starting <= 60 * call.run.MINUTES / 2


@pytest.mark.once
def test_a_part_is_cut_off_when_the_time_of_the_call_is_over(call):
    """Even one that does not let itself be interrupted; what it printed is in the log."""
    code = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("started")
time.sleep(600)
"""
    assert call.part(code, left=8).startswith("CUT OFF (")
    assert "started" in call.log.getvalue()
    assert call.part("", left=1) == "SKIPPED: no time left"


def test_a_part_is_called_cut_off_by_its_exit_status(call, monkeypatch):
    """Interrupted, it may still end as it should. What it started ends with it."""

    class WhenStarted(threading.Timer):
        """Begins when the part is ready for the signal."""

        def run(self):
            while "started" not in call.log.getvalue().splitlines() and not self.finished.is_set():
                time.sleep(0.05)
            super().run()

    monkeypatch.setattr(call.run.threading, "Timer", WhenStarted)
    monkeypatch.setattr(call.run, "MIN_SECONDS", 0)
    monkeypatch.setattr(call.run, "GRACE", 60)
    code = """
import signal, subprocess, sys, time
def end(*_):
    print("ended in time")
    sys.exit({status})
signal.signal(signal.SIGINT, end)
subprocess.Popen(["sleep", "600"])
print("started")
time.sleep(600)
"""
    for status, result in {0: "PASSED (", 1: "CUT OFF ("}.items():
        call.log = io.StringIO()
        assert call.part(code.format(status=status), left=60.1).startswith(result)
        assert call.log.getvalue().splitlines()[-2:] == ["started", "ended in time"]


def test_rows_are_written_one_by_one(tmp_path):
    results = _module("common").Results(tmp_path, "part", fact=1)
    for number in (1, 2):
        results.add({"row": number})
        record = json.loads((tmp_path / "part.json").read_text())
        assert record["fact"] == 1 and record["rows"][-1] == {"row": number} and record["torch"]


def test_what_the_caller_put_on_the_path_stays(call, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/brought/along")
    assert call.part("import sys; sys.exit('/brought/along' not in sys.path)").startswith("PASSED")


def test_failures_of_parts(call):
    assert call.part("import sys; sys.exit(7)").startswith("FAILED: exit status 7")
    assert call.part("print('WRONG cosines')").startswith("FAILED: WRONG")
    assert call.part("", needs=("no_such.module",)) == "SKIPPED: no_such.module is not installed"
    assert call.part("", needs=("no-such-program",)) == "SKIPPED: no-such-program is not installed"


def test_cost_on_paper_is_documented():
    found = _python("count.py")
    assert found.returncode == 0, found.stderr
    assert found.stdout in (ROOT / "docs" / "kernels.md").read_text()
