"""Everything there is to check and measure on a GPU, in two calls that each keep within a budget of minutes.

    python benchmarks/run.py [--call 1 | --call 2 | --parts kernels,layer] [--minutes 8] [--output FOLDER]

Call 1: the kernels, right and fast. Call 2: MoE layers, compute-sanitizer, a training run, torch.compile. Neither
needs a network or pip: a package that is not there is named, and its part skipped. Parts run in order, in whatever is
left of the budget; one that is cut off leaves its rows. The folder gets a JSON file a part, a log and a summary of each
call. Without a GPU every part is tried on tiny shapes, in Triton's interpreter.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

HERE = Path(__file__).parent
ROOT = HERE.parent
MIN_SECONDS = 5  # with less left, a part is not begun
MARGIN = 10  # seconds of a call that no part gets
LONGEST_TABLE = 150


@dataclass
class Part:
    """A command, the most seconds it gets on a GPU, what it needs, and the arguments that try it without a GPU."""

    command: list[str]
    seconds: int
    modules: tuple[str, ...] = ("triton",)
    program: Optional[str] = None
    smoke: Optional[tuple[str, ...]] = ("--smoke",)  # None: not at all
    output: bool = True
    environment: dict[str, str] = field(default_factory=dict)


def script(name: str, *arguments: str) -> list[str]:
    return [sys.executable, f"benchmarks/{name}.py", *arguments]


def has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def sanitizer(tool: str, seconds: int) -> Part:
    # Without the cache, every tensor is an allocation of its own, whose ends memcheck knows.
    return Part(
        ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *TESTS, "-k", "bf16 and 5-8-257 or worked"],
        seconds,
        ("triton", "pytest"),
        program="compute-sanitizer",
        smoke=None,
        output=False,
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )


TEST_FILES = sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("tests/kernels/test_*.py"))
TESTS = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *TEST_FILES]
# Most of the tests' time goes to compilation, on one core each.
PARALLEL = ["-n", "8"] if has_module("xdist") and (os.cpu_count() or 1) >= 8 else []
PARTS = {
    "environment": Part(script("environment"), 30, ("torch",)),
    "errors": Part(script("kernels", "--check"), 100),
    "fused": Part(script("fused"), 140, ("triton", "megatron.core", "megatron_moe_spec.kernels.swiglu")),
    "kernels": Part(script("kernels", "--implementations", "triton,eager"), 150),
    "tests": Part([*TESTS, *PARALLEL], 240, ("triton", "pytest"), smoke=(), output=False),
    "layer": Part(script("layer"), 200, ("triton", "megatron.core")),
    "memcheck": sanitizer("memcheck", 90),
    "racecheck": sanitizer("racecheck", 60),
    "train": Part(script("train"), 120, ("triton", "megatron.core"), smoke=("--smoke", "--iterations", "3")),
    "compile": Part(script("kernels", "--implementations", "compile", "--tokens", "8192", "--name", "compile"), 300),
    "offline": Part(script("offline", "--quick"), 300, smoke=(), output=False),
    "plot": Part(script("plot"), 30, ("matplotlib",), smoke=()),
}
CALLS = {
    "1": ("environment", "errors", "fused", "kernels", "tests"),
    "2": ("environment", "layer", "memcheck", "racecheck", "train", "compile"),
}


def missing(part: Part, has_gpu: bool) -> str:
    """The requirement that a part lacks; an empty string where it can run."""
    if part.smoke is None and not has_gpu:
        return "no GPU"
    for module in part.modules:
        if not has_module(module):
            return f"{module} is not installed"
    if part.program and shutil.which(part.program) is None:
        return f"{part.program} is not there"
    return ""


def run(name: str, part: Part, has_gpu: bool, output: Path, seconds: float, log) -> str:
    """PASSED, FAILED, CUT OFF or SKIPPED, with the reason. What the part prints goes to the log, too."""
    if reason := missing(part, has_gpu):
        return f"SKIPPED: {reason}"
    if has_gpu:
        seconds = min(seconds, part.seconds)
    if seconds < MIN_SECONDS:
        return "SKIPPED: no time left"
    command = [*part.command, *(() if has_gpu else part.smoke)]
    if part.output:
        command += [str(output)] if name == "plot" else ["--output", str(output)]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        **part.environment,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "TRITON_INTERPRET": "0" if has_gpu else "1",
    }
    (output / f"{name}.json").unlink(missing_ok=True)  # of an earlier run
    start = time.monotonic()

    def say(text: str) -> None:
        for file in (sys.stdout, log):
            print(text, end="", file=file, flush=True)

    say(f"== {name}, {seconds:.0f} s at most: {' '.join(command)}\n")
    # A process group of its own: compute-sanitizer's child has to end with it.
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        preexec_fn=os.setpgrp,
    )

    def end(by: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, by)

    # pytest reports what failed so far when it is interrupted.
    timers = [threading.Timer(seconds + after, end, (by,)) for after, by in ((-3, signal.SIGINT), (0, signal.SIGKILL))]
    for timer in timers:
        timer.start()
    wrong = False
    try:
        for line in process.stdout:
            say(line)
            wrong = wrong or line.startswith("WRONG")
        status = process.wait()
        was_cut_off = not timers[0].is_alive()
    finally:
        for timer in timers:
            timer.cancel()
        end(signal.SIGKILL)
    if wrong:
        result = "FAILED: WRONG, see the log"
    elif was_cut_off:
        result = "CUT OFF"
    else:
        result = f"FAILED: exit status {status}" if status else "PASSED"
    return f"{result} ({time.monotonic() - start:.0f} s)"


def table(rows: list[dict]) -> list[str]:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        values = (row.get(column, "") for column in columns)
        lines.append([f"{value:.3g}" if isinstance(value, float) and abs(value) < 0.01 else value for value in values])
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def summarize(file: Path, title: str, results: dict[str, str]) -> None:
    """Writes a Markdown file: the parts' results, what the environment is, and each part's rows."""
    environment = file.parent / "environment.json"
    lines = [f"# {title}", "", *table([{"part": name, "result": result} for name, result in results.items()])]
    for name in results:
        json_file = file.parent / f"{name}.json"
        if results[name].startswith("SKIPPED") or not json_file.exists():
            continue
        record = json.loads(json_file.read_text())
        rows = record.pop("rows")
        same = json.loads(environment.read_text()) if name != "environment" and environment.exists() else {}
        lines += ["", f"## {name}", ""]
        lines += [f"- {key}: {value}" for key, value in record.items() if key not in same]
        lines += ["", *(table(rows) if len(rows) <= LONGEST_TABLE else [f"{len(rows)} rows in {json_file.name}"])]
    file.write_text("\n".join(lines) + "\n")


def run_call(call: Optional[str], names, seconds: float, has_gpu: bool, output: Path) -> dict[str, str]:
    start, suffix = time.monotonic(), f"-{call}" if call else ""
    title = f"Call {call}" if call else f"Parts {', '.join(names)}"
    if not has_gpu:
        title += ": no GPU, nothing was measured; tiny shapes in the interpreter"
    results = {}
    with (output / f"log{suffix}.txt").open("w") as log:
        for name in names:
            results[name] = run(name, PARTS[name], has_gpu, output, seconds - (time.monotonic() - start), log)
            print(f"== {name}: {results[name]}", flush=True)
            summarize(output / f"summary{suffix}.md", title, results)
    print(f"\n{title} ({time.monotonic() - start:.0f} s)")
    for name, result in results.items():
        print(f"{name:12} {result}", flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--call", choices=CALLS, help="default: both, one after the other")
    which.add_argument("--parts", help=f"of {','.join(PARTS)}, in order")
    parser.add_argument("--minutes", type=float, default=8, help="of a call (%(default)s)")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results; without a GPU, build/benchmarks")
    arguments = parser.parse_args()
    if arguments.parts:
        calls = {None: arguments.parts.split(",")}
        if unknown := set(calls[None]) - set(PARTS):
            parser.error(f"--parts knows {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    else:
        calls = {arguments.call: CALLS[arguments.call]} if arguments.call else CALLS
    # Stopped from outside, it ends the part that runs.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    start = time.monotonic()
    import torch

    sys.path.insert(0, str(ROOT))
    has_gpu = torch.cuda.is_available()
    output = (arguments.output or (HERE / "results" if has_gpu else ROOT / "build" / "benchmarks")).resolve()
    output.mkdir(parents=True, exist_ok=True)
    failed = False
    for call, names in calls.items():
        results = run_call(call, names, 60 * arguments.minutes - MARGIN - (time.monotonic() - start), has_gpu, output)
        failed |= any(result.startswith("FAILED") for result in results.values())
        start = time.monotonic()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
