"""The benchmarks on tiny shapes, in Triton's interpreter: they run, check before they measure, say what they skip.

And what brings them to a GPU: calls that keep within their time, and bundles of wheels.
"""

import importlib.util
import io
import json
import os
import subprocess
import sys
import zipfile

import pytest
from processes import HAS_MEGATRON, ROOT, python

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
    parts = "environment,kernels,layer,train,memcheck"
    run = _python("run.py", "--parts", parts, "--minutes", 10, "--output", tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    summary = run.stdout.split("no GPU, nothing was measured")[1]
    assert "SKIPPED: no GPU" in summary
    assert summary.count("PASSED") == (4 if HAS_MEGATRON else 2)
    report = (tmp_path / "summary.md").read_text()
    assert "| memcheck | SKIPPED: no GPU |" in report and "| smoke | 20 | cosines | triton |" in report
    assert "- triton: " in report and "copy: " in (tmp_path / "log.txt").read_text()
    for name in ("kernels", "layer", "train") if HAS_MEGATRON else ("kernels",):
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert record["device"].startswith("CPU") and record["torch"] and record["triton"]
        assert record["rows"]
    if HAS_MEGATRON:
        assert "not of a training step" in report and "not of a training step" in run.stdout


@pytest.mark.slow
def test_a_wrong_kernel_is_not_timed(tmp_path):
    run = _python(
        "-c",
        f"""
import sys
sys.argv = ["kernels.py", "--smoke", "--output", {str(tmp_path)!r}]
import kernels
right = kernels.mass_kernels.routed_mass
kernels.mass_kernels.routed_mass = lambda *inputs: (1.001 * right(*inputs)[0], None)
sys.exit(kernels.main())
""",
    )
    assert run.returncode == 1, run.stdout + run.stderr
    assert run.stdout.count("WRONG") == 2 and "mass" in run.stdout
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert {row["operation"] for row in rows} == {"cosines", "cosines gradient", "mass gradient"}


def test_unknown_part_is_named():
    run = _python("run.py", "--parts", "kernel")
    assert run.returncode == 2 and "--parts knows" in run.stderr


# Calls


class _Call:
    """Calls of benchmarks/run.py whose parts are programs of these tests."""

    def __init__(self, tmp_path):
        self.run, self.output, self.log = _module("run"), tmp_path, io.StringIO()

    def part(self, code: str, seconds: float = 60, left: float = 60, **fields) -> str:
        part = self.run.Part([sys.executable, "-c", code], seconds, smoke=(), output=False, **fields)
        return self.run.run("part", part, False, self.output, left, self.log)


@pytest.fixture
def call(tmp_path):
    return _Call(tmp_path)


def test_no_part_of_a_call_needs_more_than_the_call(call):
    assert all(part.seconds <= 480 for part in call.run.PARTS.values())
    for names in call.run.CALLS.values():
        assert "offline" not in names and set(names) <= set(call.run.PARTS)


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
    assert call.part("", modules=("no_such.module",)) == "SKIPPED: no_such.module is not installed"
    assert call.part("", program="no-such-program") == "SKIPPED: no-such-program is not there"


# Bundles of wheels


@pytest.fixture
def bundle(tmp_path):
    """Two fake wheels, in a bundle of pieces of 1000 bytes."""
    wheels = _module("wheels")
    files = []
    for name, size in (("first", 2500), ("second", 10)):
        files.append(tmp_path / f"{name}-1.0-py3-none-any.whl")
        with zipfile.ZipFile(files[-1], "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", f"data = {os.urandom(size)!r}\n")
    pieces = wheels.split(files, tmp_path / "bundle", piece_bytes=1000)
    assert len(pieces) > 10 and all(piece.stat().st_size <= 1000 for piece in pieces)
    return wheels, tmp_path / "bundle", pieces, tmp_path / "target"


def test_a_bundle_is_joined_by_an_interpreter_without_packages(bundle):
    wheels, folder, pieces, target = bundle
    script = ROOT / "benchmarks" / "wheels.py"
    command = [sys.executable, "-I", "-S", script, "join", folder, target]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert run.returncode == 0 and f"PYTHONPATH={target}" in run.stdout, run.stdout + run.stderr
    code = "import first, second; print(len(first.data), len(second.data))"
    run = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(target)}, capture_output=True, text=True)
    assert run.stdout.split() == ["2500", "10"], run.stderr


def test_missing_damaged_and_exchanged_pieces_are_named(bundle):
    wheels, folder, pieces, target = bundle
    whole = pieces[3].read_bytes()
    pieces[3].write_bytes(whole[:-1])
    with pytest.raises(wheels.BundleError, match="damaged.*: wheels.003$"):
        wheels.join(folder, target)
    pieces[3].write_bytes(pieces[4].read_bytes())
    pieces[4].write_bytes(whole)
    with pytest.raises(wheels.BundleError, match="damaged.*: wheels.003, wheels.004$"):
        wheels.join(folder, target)
    pieces[3].unlink()
    with pytest.raises(wheels.BundleError, match="missing in .*: wheels.003$"):
        wheels.join(folder, target)
    (folder / wheels.CHECKSUMS).unlink()
    with pytest.raises(wheels.BundleError, match="names the pieces"):
        wheels.join(folder, target)
    assert not target.exists()


def test_half_of_transformer_engine_is_refused(bundle, tmp_path):
    wheels = bundle[0]
    core, meta, torch = (
        tmp_path / f"{name}-2.0-py3-none-any.whl"
        for name in ("transformer_engine_cu13", "transformer_engine", "transformer_engine_torch")
    )
    with pytest.raises(wheels.BundleError, match="only transformer_engine_cu13"):
        wheels.check_transformer_engine([core])
    wheels.check_transformer_engine([core, meta, torch])
    wheels.check_transformer_engine([tmp_path / "megatron_core-1-py3-none-any.whl"])


def test_cost_on_paper_is_documented():
    found = _python("count.py")
    assert found.returncode == 0, found.stderr
    assert found.stdout in (ROOT / "docs" / "kernels.md").read_text()
