"""Launches past Triton's own binder: of the right kernels, and only where nobody watches."""

import importlib.util
import shutil
import sysconfig
from pathlib import Path

import pytest
from processes import python

pytest.importorskip("triton", reason="triton is not installed")

from megatron_moe_spec.kernels import mass
from megatron_moe_spec.kernels.launch import Launch

HAS_HEADERS = Path(sysconfig.get_path("include"), "Python.h").exists()
HAS_NVIDIA = importlib.util.find_spec("triton.backends.nvidia") is not None


@pytest.mark.skipif(
    not (HAS_NVIDIA and HAS_HEADERS and shutil.which("cc")), reason="Triton's launcher cannot be compiled here"
)
def test_launches_over_a_driver_that_does_nothing():
    run = python("launches.py", TRITON_INTERPRET="0")
    assert run.returncode == 0, run.stdout + run.stderr
    assert sum(line.startswith("test_") for line in run.stdout.splitlines()) == 5, run.stdout


def test_what_a_kernel_is_compiled_for_is_made_once():
    of_these = 64, 4, "softmax"
    assert mass._mass_launch(*of_these) is mass._mass_launch(*of_these)
    assert isinstance(mass._mass_launch(*of_these), Launch)
