"""Everything there is to check and measure on a GPU, each part within a time limit; says what it skipped.

    python benchmarks/run.py [--parts tests,kernels] [--output FOLDER]

Without a GPU: compiles the kernels offline and runs every part on tiny shapes, in Triton's interpreter. In two calls of
at most ten minutes: --parts tests,kernels,plot and then --parts sanitizer,layer,train.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

HERE = Path(__file__).parent
ROOT = HERE.parent


@dataclass
class Part:
    """A command of at most ``seconds``, the modules and program it needs, and whether --smoke stands in for a GPU."""

    command: list[str]
    seconds: int
    modules: tuple[str, ...] = ("triton",)
    program: Optional[str] = None
    needs_gpu: bool = False
    smoke: tuple[str, ...] = ("--smoke",)
    output: bool = True


PYTHON = sys.executable
TESTS = [PYTHON, "-m", "pytest", "-q", "tests/test_kernels.py"]
ONE_CASE = ["-k", "test_cosine_gradient and bf16 and 5-8-257"]
PARTS = {
    "offline": Part([PYTHON, "benchmarks/offline.py", "--quick"], 150, smoke=(), output=False),
    "tests": Part(TESTS, 230, ("triton", "pytest"), smoke=(), output=False),
    "kernels": Part([PYTHON, "benchmarks/kernels.py", "--seconds", "200"], 330),
    "plot": Part([PYTHON, "benchmarks/plot.py"], 30, ("matplotlib",), smoke=()),
    "sanitizer": Part(
        ["compute-sanitizer", "--error-exitcode", "9", *TESTS, *ONE_CASE],
        120,
        ("triton", "pytest"),
        program="compute-sanitizer",
        needs_gpu=True,
        output=False,
    ),
    "layer": Part([PYTHON, "benchmarks/layer.py", "--seconds", "150"], 250, ("triton", "megatron.core")),
    "train": Part(
        [PYTHON, "benchmarks/train.py"], 200, ("triton", "megatron.core"), smoke=("--smoke", "--iterations", "3")
    ),
}


def missing(part: Part, has_gpu: bool) -> str:
    """The requirement that a part lacks; an empty string where it can run."""
    if part.needs_gpu and not has_gpu:
        return "no GPU"
    for module in part.modules:
        if importlib.util.find_spec(module.split(".")[0]) is None:
            return f"{module} is not installed"
    if part.program and shutil.which(part.program) is None:
        return f"{part.program} is not there"
    return ""


def run(name: str, part: Part, has_gpu: bool, output: Path) -> str:
    """PASSED, FAILED or SKIPPED, with the reason."""
    if reason := missing(part, has_gpu):
        return f"SKIPPED: {reason}"
    command = [*part.command, *(() if has_gpu else part.smoke)]
    if name == "plot":
        command.append(str(output))
    elif part.output:
        command += ["--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0" if has_gpu else "1"}
    print(f"== {name}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    limit = part.seconds if has_gpu else 4 * part.seconds
    try:
        status = subprocess.run(command, cwd=ROOT, env=environment, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        return f"FAILED: took more than {limit} s"
    return f"{'FAILED: exit status ' + str(status) if status else 'PASSED'} ({time.monotonic() - start:.0f} s)"


def main() -> int:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="which, in order (%(default)s)")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results; without a GPU, build/benchmarks")
    arguments = parser.parse_args()
    names = arguments.parts.split(",")
    if unknown := set(names) - set(PARTS):
        parser.error(f"--parts knows {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    has_gpu = torch.cuda.is_available()
    output = arguments.output or (HERE / "results" if has_gpu else ROOT / "build" / "benchmarks")
    output.mkdir(parents=True, exist_ok=True)
    results = {name: run(name, PARTS[name], has_gpu, output.resolve()) for name in names}
    where = torch.cuda.get_device_name() if has_gpu else "no GPU: nothing was measured, tiny shapes in the interpreter"
    print(f"\n{where}")
    for name, result in results.items():
        print(f"{name:10} {result}")
    return 1 if any(result.startswith("FAILED") for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
