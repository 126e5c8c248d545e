"""Running scripts under torchrun in processes of their own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent

# Found, not imported: the CPU backend has to come before Megatron.
HAS_MEGATRON = importlib.util.find_spec("megatron") is not None
needs_megatron = pytest.mark.skipif(not HAS_MEGATRON, reason="megatron-core is not installed")
needs_training_loop = pytest.mark.skipif(
    not HAS_MEGATRON or importlib.util.find_spec("megatron.training") is None,
    reason="megatron.training is not installed (it comes with megatron-core >= 0.17)",
)


def torchrun(processes: int, *command, timeout: int = 600, folders=()) -> str:
    """Runs ``torchrun --nproc-per-node processes command``, in the tests' folder; returns what it printed.

    Args:
        folders: to import from, beside those of the project and of the tests.

    Raises:
        AssertionError: the command failed; holds the end of its output.
    """
    run = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
            *map(str, command),
        ],
        cwd=TESTS,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, TESTS, *folders)))},
        capture_output=True,
        text=True,
        timeout=timeout,
    )  # fmt: skip
    output = run.stdout + run.stderr
    assert run.returncode == 0, f"torchrun exited with {run.returncode}:\n{output[-6000:]}"
    return output
