"""Checks and measures the kernels on a GPU; without one, tries the programs on tiny shapes and measures nothing.

    python benchmarks/run.py [--parts kernels,layer] [--minutes 16] [--output FOLDER]

Parts run in order, in the minutes that are left. Each row is written when it is measured, so a part that is cut off
leaves its rows. A part whose packages or programs are missing is skipped, and so is one for which no time is left. The
folder gets a JSON file for each part that has rows, log.txt and summary.md.
"""

import argparse
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, TextIO

HERE = Path(__file__).parent
ROOT = HERE.parent
MIN_SECONDS = 5  # with less left, a part is not started
GRACE = 3  # seconds that an interrupted part gets to report what it has
MINUTES = 16
LONGEST_TABLE = 200


@dataclass(frozen=True)
class Part:
    """A program that is checked or measured.

    Attributes:
        command: what to run from the repository's root.
        seconds: the most that it gets on a GPU.
        needs: modules, and programs.
        smoke: further arguments without a GPU; None: it needs one.
        has_rows: whether it writes rows into the folder ``--output``.
    """

    command: list[str]
    seconds: int
    needs: tuple[str, ...] = ("triton",)
    smoke: Optional[tuple[str, ...]] = ("--smoke",)
    has_rows: bool = True

    def lacks(self, has_gpu: bool) -> str:
        """What it needs and is not there; an empty string where it can run."""
        if self.smoke is None and not has_gpu:
            return "no GPU"
        missing = (name for name in self.needs if not (_has_module(name) or shutil.which(name)))
        return next((f"{name} is not installed" for name in missing), "")


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _script(name: str, *arguments: str) -> list[str]:
    return [sys.executable, f"benchmarks/{name}.py", *arguments]


def _sanitizer(tool: str, seconds: int) -> Part:
    # Without PyTorch's cache, every tensor is an allocation of its own, whose ends memcheck knows.
    command = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    tests = [*TESTS, "-k", "bf16 and 5-8-257 or worked"]
    return Part([*command, *tests], seconds, ("triton", "pytest", "compute-sanitizer"), smoke=None, has_rows=False)


TESTS = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "tests/kernels"]
# Most of the tests' time goes to compilation, on one core each.
PARALLEL = ["-n", "8"] if _has_module("xdist") and (os.cpu_count() or 1) >= 8 else []
# A graph of Inductor takes seconds to compile: some models and the operations that training runs.
COMPILED = [
    *("--implementations", "compile", "--tokens", "8192", "--name", "compile"),
    *("--models", "Qwen3-30B-A3B,DeepSeek-V3,Mixtral-8x7B"),
    *("--operations", "cosines,cosines gradient,SwiGLU gradient,mass,mass gradient"),
]
# All of them fit into MINUTES, and the first five as well as the last five into half of that.
PARTS = {
    "check": Part(_script("kernels", "--check", "--name", "check"), 50),
    "kernels": Part(_script("kernels", "--implementations", "triton,eager"), 90),
    "layer": Part(_script("layer"), 115, ("triton", "megatron.core")),
    "fused": Part(_script("fused"), 75, ("triton", "megatron.core")),
    "sweep": Part(_script("sweep", "--seconds", "95"), 115),
    "tests": Part([*TESTS, *PARALLEL], 145, ("triton", "pytest"), smoke=(), has_rows=False),
    "memcheck": _sanitizer("memcheck", 55),
    "racecheck": _sanitizer("racecheck", 50),
    "train": Part(_script("train"), 75, ("triton", "megatron.core"), smoke=("--smoke", "--iterations", "3")),
    "compile": Part(_script("kernels", *COMPILED), 120),
}


def run(name: str, part: Part, has_gpu: bool, output: Path, seconds: float, log: TextIO) -> str:
    """PASSED, FAILED, CUT OFF or SKIPPED, with the reason. What the part prints goes to the log too."""
    if reason := part.lacks(has_gpu):
        return f"SKIPPED: {reason}"
    seconds = min(seconds - GRACE, part.seconds if has_gpu else math.inf)
    if seconds < MIN_SECONDS:
        return "SKIPPED: no time left"
    command = [*part.command, *(() if has_gpu else part.smoke)]
    if part.has_rows:
        command += ["--output", str(output)]
        (output / f"{name}.json").unlink(missing_ok=True)  # of an earlier run
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {"PYTHONPATH": ":".join(paths), "PYTHONUNBUFFERED": "1", "TRITON_INTERPRET": "0" if has_gpu else "1"}
    start = time.monotonic()
    _say(f"== {name}, {seconds:.0f} s at most: {' '.join(command)}\n", log)
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        start_new_session=True,  # a group, which is ended as a whole
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    interrupted, wrong = threading.Event(), False

    def interrupt():
        interrupted.set()
        _end(process, signal.SIGINT)  # pytest reports what failed so far

    # Interrupted, then killed.
    timers = [threading.Timer(seconds, interrupt), threading.Timer(seconds + GRACE, _end, (process, signal.SIGKILL))]
    try:
        for timer in timers:
            timer.start()
        for line in process.stdout:
            _say(line, log)
            wrong = wrong or line.startswith("WRONG")
        status = process.wait()
    finally:
        for timer in timers:
            timer.cancel()
        _end(process, signal.SIGKILL)
    if wrong:
        result = "FAILED: WRONG, see the log"
    elif status == 0:
        result = "PASSED"  # even if it was being interrupted
    else:
        result = "CUT OFF" if interrupted.is_set() else f"FAILED: exit status {status}"
    return f"{result} ({time.monotonic() - start:.0f} s)"


def _end(process: subprocess.Popen, number: signal.Signals) -> None:
    """Sends a signal to a part and to what it has started, where any of it still runs."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _say(text: str, log: TextIO) -> None:
    for file in (sys.stdout, log):
        print(text, end="", file=file, flush=True)


def table(rows: list[dict]) -> list[str]:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        values = (row.get(column, "") for column in columns)
        lines.append([f"{value:.3g}" if isinstance(value, float) and abs(value) < 0.01 else value for value in values])
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def summarize(folder: Path, title: str, results: dict[str, str]) -> None:
    """Writes summary.md: the result of each part, what it ran on, and its tables."""
    lines = [f"# {title}", "", *table([{"part": name, "result": result} for name, result in results.items()])]
    for name in results:
        file = folder / f"{name}.json"
        if results[name].startswith("SKIPPED") or not file.exists():
            continue
        record = json.loads(file.read_text())
        tables = {key: record.pop(key) for key, value in list(record.items()) if isinstance(value, list)}
        lines += ["", f"## {name}", "", *(f"- {key}: {value}" for key, value in record.items())]
        for key, rows in tables.items():
            of_rows = table(rows) if 0 < len(rows) <= LONGEST_TABLE else [f"{len(rows)} in {file.name}"]
            lines += ["", f"{key}:", "", *of_rows]
    (folder / "summary.md").write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="of %(default)s, in order")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all of them (%(default)s)")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results; without a GPU, build/benchmarks")
    arguments = parser.parse_args()
    names = arguments.parts.split(",")
    if unknown := set(names) - set(PARTS):
        parser.error(f"--parts knows {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    # Stopped from outside, it ends the part that runs.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    start = time.monotonic()
    import torch

    has_gpu = torch.cuda.is_available()
    output = (arguments.output or (HERE / "results" if has_gpu else ROOT / "build" / "benchmarks")).resolve()
    output.mkdir(parents=True, exist_ok=True)
    title = "Kernels on a GPU" if has_gpu else "No GPU, nothing was measured; tiny shapes in the interpreter"
    results: dict[str, str] = {}
    with (output / "log.txt").open("w") as log:
        for name in names:
            left = 60 * arguments.minutes - (time.monotonic() - start)
            results[name] = run(name, PARTS[name], has_gpu, output, left, log)
            print(f"== {name}: {results[name]}", flush=True)
            summarize(output, title, results)
    print(f"\n{title} ({time.monotonic() - start:.0f} s)")
    for name, result in results.items():
        print(f"{name:12} {result}", flush=True)
    return int(any(result.startswith("FAILED") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
