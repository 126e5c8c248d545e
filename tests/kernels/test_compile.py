"""Compilation of the shipped kernels for GPUs that are not here: registers, spills, 64-bit offsets, instructions.

In an interpreter of its own, where Triton compiles; in this one it interprets. ``make test-triton`` runs this file with
another release of Triton, the one of public GPU images.
"""

import json

import pytest
from processes import ROOT, python

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.slow

# Of 255 that a thread can have. A multiprocessor's 65536 go around 2048 threads with 32 each.
MOST_REGISTERS = {
    "cosines_kernel": 136,
    "mixing_kernel": 112,
    "swiglu_gradient_kernel": 112,
    "swiglu_gradient_of_sum_kernel": 72,
    "count_kernel": 64,
    "rows_kernel": 136,
    "by_source_kernel": 64,
    "mass_kernel": 64,
    "mass_gradient_kernel": 128,
}


def _python(code: str, *arguments) -> None:
    command = (code,) if code.endswith(".py") else ("-c", code)
    run = python(*command, *arguments, cwd=ROOT / "benchmarks", timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    file = tmp_path_factory.mktemp("offline") / "report.json"
    _python("offline.py", "--quick", "--json", file)
    return json.loads(file.read_text())


def test_every_kernel_compiles_for_every_architecture(entries):
    found = {(entry["kernel"], entry["architecture"]) for entry in entries}
    assert found == {(kernel, arch) for kernel in MOST_REGISTERS for arch in ("sm_80", "sm_90", "sm_100")}


def test_nothing_spills_and_registers_are_few(entries):
    for entry in entries:
        assert entry["spilled_bytes"] == 0, entry
        assert 0 < entry["registers"] <= MOST_REGISTERS[entry["kernel"]], entry


def test_offsets_are_computed_in_64_bits(entries):
    for entry in entries:
        assert entry["products_64_bit"] > 0 and entry["products_32_bit"] == 0, entry


def test_the_swiglus_gradient_computes_nothing_twice(entries):
    """A thread has 8 elements of a block: an exponential and a reciprocal each, which a second layout would double."""
    found = [entry for entry in entries if entry["kernel"] == "swiglu_gradient_kernel"]
    assert {entry["case"][1] for entry in found} == {2, 8}
    for entry in found:
        assert entry["special_functions"] == 16 and entry["loop_instructions"] <= 300, entry
        assert entry["barriers"] <= (2 if entry["case"][1] == 2 else 6) and entry["async_copies"] >= 2, entry


def test_spills_would_be_seen():
    """The same kernel, allowed 32 registers."""
    _python(
        """
import offline
from megatron_moe_spec.kernels import options
options.DEFAULTS["cosines"][2] = dict(BLOCK_D=128, num_warps=1, num_stages=3, maxnreg=32)
operation = offline._row_operations("bfloat16", 8, 768)[0]
((name, kernel),) = offline.compiled(90, operation)
assert offline.resources(kernel)["spilled_bytes"] > 0, offline.resources(kernel)
"""
    )
