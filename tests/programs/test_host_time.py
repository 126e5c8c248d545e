"""benchmarks/host_time.py on Triton's own launcher, over the CUDA driver that does nothing."""

import importlib.util
import json
import shutil
import sysconfig
from pathlib import Path

import pytest
from processes import ROOT, needs_megatron, python

BENCHMARKS = ROOT / "benchmarks"
TRITON = importlib.util.find_spec("triton")
HAS_HEADERS = Path(sysconfig.get_path("include"), "Python.h").exists()
needs_launcher = pytest.mark.skipif(
    not (TRITON and shutil.which("cc") and HAS_HEADERS), reason="Triton's launcher cannot be compiled here"
)


def _host_time(*arguments):
    return python(BENCHMARKS / "host_time.py", *arguments, cwd=ROOT)


def _install(**variables):
    """Seen from the folder of the benchmarks, without the imports of torch."""
    return python("-c", "import null_driver; null_driver.install()", cwd=BENCHMARKS, **variables)


@needs_megatron
@needs_launcher
def test_a_case_has_all_variants_and_only_the_losses_launch_kernels(tmp_path):
    file = tmp_path / "rows.json"
    run = _host_time("--cases", "EP2:8/2", "--seconds", 1, "--json", file, "--markdown")
    assert run.returncode == 0, run.stderr
    header = (
        "| layout | experts / top-k | none | aux + z | both | specialization | coupling | both : aux + z | launches |"
    )
    row = "| EP2 | 8 / 2 | "
    lines = run.stdout.splitlines()
    assert lines.count(header) == 2 and sum(line.startswith(row) for line in lines) == 2  # by each clock
    record = json.loads(file.read_text())
    (row,) = record["rows"]
    launches = {name: variant["launches"] for name, variant in row["variants"].items()}
    assert launches["none"] == launches["aux + z"] == 0
    assert launches["both"] >= launches["specialization"] > 0 and launches["both"] > launches["coupling"] > 0
    for variant in row["variants"].values():
        for quartiles in variant["cpu"].values():
            assert quartiles == sorted(quartiles)
        assert 0 < variant["cpu"]["times"][0]
    assert record["layers"] > 1 and record["triton"] and row["turns"] >= 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--cases", "EP4:8/2"), "--cases: unknown: EP4:8/2; known are EP1:8/2, "),
        (("--variants", "both,erc"), "--variants: unknown: erc; known are none, aux + z, both, "),
        (("--root", "tests"), "--root: tests has no package megatron_moe_spec: name a checkout"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    run = _host_time(*arguments)
    assert run.returncode == 2 and words in run.stderr


@pytest.mark.skipif(not TRITON, reason="triton is not installed")
def test_without_a_compiler_the_error_says_what_to_install(tmp_path):
    for variables, names in (({"CC": None}, "cc, gcc, clang"), ({"CC": "no-such-compiler"}, "no-such-compiler")):
        run = _install(PATH=tmp_path, **variables)
        assert f"RuntimeError: no C compiler ({names})" in run.stderr and "install gcc or clang" in run.stderr


@needs_launcher
def test_functions_that_the_driver_lacks_are_named_and_those_in_comments_are_not(tmp_path):
    backend = tmp_path / "triton" / "backends" / "nvidia"
    backend.mkdir(parents=True)
    (tmp_path / "triton" / "__init__.py").touch()
    (backend / "include").symlink_to(Path(TRITON.origin).parent / "backends" / "nvidia" / "include")
    (backend / "driver.py").write_text('SOURCE = "cuLaunchKernelEx(&config, function, params, 0); cuMemAlloc(0, 1);"\n')
    (backend / "driver.c").write_text("cuInit(0); // as cuCtxCreate\n/* cuMemFree */ cuEventCreate(0, 0);\n")
    path = "import sys; sys.path.insert(0, sys.argv[1]); import null_driver; null_driver.install()"
    run = python("-c", path, tmp_path, cwd=BENCHMARKS)
    assert run.stderr.splitlines()[-1].endswith("libcuda.c lacks: cuEventCreate, cuMemAlloc")


@needs_launcher
def test_the_driver_comes_before_torch_and_triton():
    late = "import sys, null_driver; sys.modules['torch'] = None; null_driver.install()"
    run = python("-c", late, cwd=BENCHMARKS)
    assert "has to come before torch is imported" in run.stderr


@needs_megatron
@needs_launcher
@pytest.mark.parametrize(("expert_parallel", "most"), [(1, (270, 300)), (2, (330, 365))])
def test_what_the_losses_call_in_python(expert_parallel, most):
    """A measure of host time that is the same on every machine."""
    run = python("host_calls.py", expert_parallel, TRITON_INTERPRET="0")
    assert run.returncode == 0, run.stderr
    plain, recompute = json.loads(run.stdout.splitlines()[-1]).values()
    assert 0 < plain <= most[0] and 0 < recompute <= most[1], (plain, recompute)
