"""What is installed, and torchrun itself: for tests of starting a job. The others start theirs by ``forks.py``."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

HELPERS = Path(__file__).parent
TESTS = HELPERS.parent
ROOT = TESTS.parent

# Found, not imported: the CPU backend has to come before Megatron.
HAS_MEGATRON = importlib.util.find_spec("megatron") is not None
# Whether Transformer Engine runs here on CPU, as in the environment that .ci/transformer-engine makes: models then have
# its layers. Where it is installed for a GPU, they do not.
HAS_TRANSFORMER_ENGINE = "engine_on_cpu" in sys.modules
needs_megatron = pytest.mark.skipif(not HAS_MEGATRON, reason="megatron-core is not installed")
HAS_TRAINING_LOOP = HAS_MEGATRON and importlib.util.find_spec("megatron.training") is not None
needs_training_loop = pytest.mark.skipif(
    not HAS_TRAINING_LOOP,
    reason="megatron.training is not installed (it comes with megatron-core >= 0.17)",
)
# By its folder: looking for the module itself would import megatron.core.
_FOLDERS = importlib.util.find_spec("megatron").submodule_search_locations if HAS_MEGATRON else []
_CORE = next((core for folder in _FOLDERS if (core := Path(folder) / "core").exists()), Path())
HAS_HYBRID_MODEL = (_CORE / "models" / "hybrid").exists()
needs_hybrid_model = pytest.mark.skipif(
    not HAS_HYBRID_MODEL, reason="this Megatron has no HybridModel (megatron-core >= 0.18 has)"
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


def _complete(command: list, timeout: float, **options) -> subprocess.CompletedProcess:
    """``subprocess.run`` that, when the time is over, ends what the command has started as well."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **options
    )
    try:
        output, error = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks then, which are in sessions of their own
        output, error = process.communicate(timeout=60)
        raise AssertionError(f"not ended after {timeout} s:\n{(output + error)[-6000:]}") from None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, output, error)


def _interpreter(command, cwd, timeout: float, **variables) -> subprocess.CompletedProcess:
    variables = environment(OMP_NUM_THREADS=1, PYTHONPATH=f"{ROOT}{os.pathsep}{HELPERS}", **variables)
    return _complete([sys.executable, *map(str, command)], timeout, cwd=cwd, env=variables)


def python(*command, cwd=HELPERS, timeout: float = 300, **variables) -> subprocess.CompletedProcess:
    """Runs a fresh interpreter on a command, with the variables that ``environment`` makes of those given."""
    with _timed("interpreters"):
        return _interpreter(command, cwd, timeout, **variables)


def torchrun(processes: int, *command, timeout: float = 600) -> str:
    """Runs ``torchrun --nproc-per-node processes command``, in the helpers' folder; returns what it printed.

    Raises:
        AssertionError: the command failed, or did not end; holds the end of its output.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    with _timed("torchrun"):
        run = _interpreter([*launcher, *command], HELPERS, timeout)
    output = run.stdout + run.stderr
    assert run.returncode == 0, f"torchrun exited with {run.returncode}:\n{output[-6000:]}"
    return output
