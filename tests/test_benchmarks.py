"""The benchmarks on tiny shapes, in Triton's interpreter: they run, check before they measure, say what they skip."""

import csv
import json
import os
import subprocess
import sys

import pytest
from processes import HAS_MEGATRON, ROOT

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("torch")

pytestmark = pytest.mark.slow


def _python(*command) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT / "benchmarks",
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_without_a_gpu_everything_is_tried_and_nothing_is_called_measured(tmp_path):
    run = _python("run.py", "--parts", "kernels,layer,train,sanitizer", "--output", tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    summary = run.stdout.split("no GPU: nothing was measured")[1]
    assert "SKIPPED: no GPU" in summary
    assert summary.count("PASSED") == (3 if HAS_MEGATRON else 1)
    for name in ("kernels", "layer", "train") if HAS_MEGATRON else ("kernels",):
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert record["device"].startswith("CPU") and record["torch"] and record["triton"]
        with (tmp_path / f"{name}.csv").open() as file:
            assert len(list(csv.DictReader(file))) == len(record["rows"]) > 0


def test_a_wrong_kernel_is_not_timed(tmp_path):
    run = _python(
        "-c",
        f"""
import sys
sys.argv = ["kernels.py", "--smoke", "--output", {str(tmp_path)!r}]
import kernels
right = kernels.mass_kernels.routed_mass
kernels.mass_kernels.routed_mass = lambda *inputs: right(*inputs) * 1.001
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
