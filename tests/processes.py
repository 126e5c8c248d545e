"""What is installed, and torchrun itself: for tests of starting a job. The others start theirs by ``forks.py``."""

import importlib.util
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent

# Found, not imported: the CPU backend has to come before Megatron.
HAS_MEGATRON = importlib.util.find_spec("megatron") is not None
needs_megatron = pytest.mark.skipif(not HAS_MEGATRON, reason="megatron-core is not installed")
HAS_TRAINING_LOOP = HAS_MEGATRON and importlib.util.find_spec("megatron.training") is not None
needs_training_loop = pytest.mark.skipif(
    not HAS_TRAINING_LOOP,
    reason="megatron.training is not installed (it comes with megatron-core >= 0.17)",
)

# Seconds that each job took: forked ones until they began, the others, which start an interpreter, until they ended.
starts: dict[str, list[float]] = {"forks": [], "torchrun": [], "interpreters": []}


@contextmanager
def _timed(kind: str):
    begun = time.monotonic()
    yield
    starts[kind].append(time.monotonic() - begun)


def environment(**variables) -> dict[str, str]:
    """This process's variables and those given; None removes one."""
    return {name: str(value) for name, value in {**os.environ, **variables}.items() if value is not None}


def python(*command, cwd=TESTS, timeout: float = 300, **variables) -> subprocess.CompletedProcess:
    """Runs a fresh interpreter on a command, with the variables that ``environment`` makes of those given."""
    path = os.pathsep.join(map(str, (ROOT, TESTS)))
    with _timed("interpreters"):
        return subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=cwd,
            env=environment(OMP_NUM_THREADS=1, PYTHONPATH=path, **variables),
            capture_output=True,
            text=True,
            timeout=timeout,
        )


def torchrun(processes: int, *command, timeout: int = 600, folders=()) -> str:
    """Runs ``torchrun --nproc-per-node processes command``, in the tests' folder; returns what it printed.

    Args:
        folders: to import from, beside those of the project and of the tests.

    Raises:
        AssertionError: the command failed; holds the end of its output.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    path = os.pathsep.join(map(str, (ROOT, TESTS, *folders)))
    with _timed("torchrun"):
        run = subprocess.run(
            [sys.executable, *launcher, *map(str, command)],
            cwd=TESTS,
            env=environment(OMP_NUM_THREADS=1, PYTHONPATH=path),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    output = run.stdout + run.stderr
    assert run.returncode == 0, f"torchrun exited with {run.returncode}:\n{output[-6000:]}"
    return output
