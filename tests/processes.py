"""Running scripts under torchrun in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent


def torchrun(processes: int, *command, timeout: int = 300) -> str:
    """Runs ``torchrun --nproc-per-node processes command``, in the tests' folder; returns what it printed.

    Raises:
        AssertionError: the command failed; holds the end of its output.
    """
    run = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
            *map(str, command),
        ],
        cwd=TESTS,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )  # fmt: skip
    output = run.stdout + run.stderr
    assert run.returncode == 0, f"torchrun exited with {run.returncode}:\n{output[-6000:]}"
    return output
