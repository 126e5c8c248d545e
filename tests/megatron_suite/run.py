"""Runs Megatron's own unit tests of MoE layers on CPU, without the losses and with them, and compares bit by bit.

    python tests/megatron_suite/run.py CHECKOUT [--processes 2,4] [options] [-- pytest's arguments]

CHECKOUT is a working tree of Megatron-LM. That its tests pass with the losses attached would show little, as they bear
a forward pass that is scaled by 1.01. Therefore every output, the random state after every test, and every gradient
have to be those of the run without the losses: their coefficient is so small that their own gradients are 0. Tests that
need a GPU or Transformer Engine pass in neither run; they are counted, and nothing is concluded from them. The same
holds for tests that exceed the time limit in both runs. Nearly all models of these tests compute in 16 bits: what the
rounding swallows there is not seen.

The exit status is 1 if something differs, if a test passes or keeps the time limit only without the losses, or if not
all tests ran. The table is printed in any case, after an interruption for the tests that have run.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import records

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COLUMNS = (
    "processes", "tests", "passed without", "passed with", "attached", "forward passes compared", "gradients compared",
    "seconds",
)  # fmt: skip
FOLDER = "tests/unit_tests/transformer/moe"
# Without any of Megatron's layers: products of large bf16 matrices, which take minutes on a CPU and, in the last file,
# used up 24 GB with two processes; and kernels, which need a GPU.
LEFT_OUT = [
    f"{FOLDER}/test_routers.py::test_router_gating_linear",
    f"{FOLDER}/test_multihot_indices_converter.py",
    f"{FOLDER}/test_moe_recompute_memory.py",
]
# Tests in which losses are computed, by release and number of processes; elsewhere at least one is expected.
# 0.20 is main at commit d98e8a64d.
ATTACHED = {"0.19": {2: 18, 4: 24}, "0.20": {2: 20, 4: 26}}
# Of a gradient in fp32, such a part is 0.
COEFFICIENT = 1e-60
MOST_STARTS = 30
SECONDS_PER_TEST = 300
# To import and collect, and between two tests.
SECONDS_OUTSIDE_TESTS = 600
# torchrun kills its processes 30 seconds after it has terminated them.
SECONDS_TO_END = 60
SHOWN = 20


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument(
        "--processes", type=lambda text: [int(n) for n in text.split(",")], default=[4], help="default 4"
    )
    parser.add_argument("--tests", nargs="+", default=[FOLDER], help="files of the checkout")
    parser.add_argument("--min-attached", type=int, help="tests with losses that are expected at least")
    parser.add_argument(
        "--coefficient", type=float, default=COEFFICIENT, help=f"gradients are compared up to {COEFFICIENT:g}"
    )
    parser.add_argument(
        "--seconds-per-test",
        type=float,
        default=SECONDS_PER_TEST,
        help="time limit; the run continues after a test that exceeds it (default %(default)s)",
    )
    parser.add_argument("--keep", type=Path, help="folder for records and output; by default a temporary one")
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:end])
    options.pytest = arguments[end + 1 :]
    return options


def release(checkout: Path) -> str:
    """Such as 0.19, of a working tree."""
    info = checkout / "megatron" / "core" / "package_info.py"
    if not info.is_file():
        sys.exit(f"{checkout} is no working tree of Megatron-LM: it has no megatron/core/package_info.py")
    return ".".join(re.findall(r"^(?:MAJOR|MINOR) = (\d+)", info.read_text(), re.M))


def run(options: argparse.Namespace, processes: int, folder: Path, coefficient=None) -> None:
    """Runs the tests. Starts again after a test that crashed, or that exceeded the time limit and was killed.

    The records of ``folder`` are complete if it contains a file ``ended``.
    """
    folder.mkdir(parents=True)
    done, ended = folder / "done.txt", folder / "ended"
    for start in range(MOST_STARTS):
        tests = records.read(folder)
        done.write_text("".join(f"{name}\n" for name in tests))
        output = folder / f"output-{start}.txt"
        with open(output, "w") as stream:
            status, over_time = _start(_command(options, processes, folder, coefficient), options, folder, stream)
        records.end(folder, over_time)
        if ended.exists():
            return
        if len(records.read(folder)) == len(tests):
            print(output.read_text()[-3000:], f"torchrun ended with {status} before a test began", sep="\n")
            return
    print(f"{MOST_STARTS} starts were not enough")


def _command(options, processes, folder, coefficient) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
        "-m", "pytest", "-p", "suite_plugin", "-p", "no:cacheprovider", "-q", "-o", "addopts=", "--tb=short",
        "--continue-on-collection-errors", f"--suite-folder={folder}", f"--suite-done={folder / 'done.txt'}",
        *(f"--deselect={name}" for name in LEFT_OUT),
        *([] if coefficient is None else [f"--suite-coefficient={coefficient}"]), *options.tests, *options.pytest,
    ]  # fmt: skip


def _start(command, options, folder, output) -> tuple[int | str, dict[int, str]]:
    """Returns the exit status, and the test that each rank was in for too long."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    begin = time.time()
    seconds = max(SECONDS_OUTSIDE_TESTS, options.seconds_per_test)
    process = subprocess.Popen(command, cwd=options.checkout, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        while process.poll() is None:
            time.sleep(0.2)
            over_time = records.running(folder, options.seconds_per_test)
            if over_time:
                return "the time limit of a test", over_time
            if time.time() - max([begin, *(file.stat().st_mtime for file in folder.glob("*.jsonl"))]) > seconds:
                return "the time limit outside of tests", {}
        return process.returncode, {}
    finally:
        _end(process)


def _end(process: subprocess.Popen) -> None:
    """Ends torchrun, which ends its ranks; if it is killed, the system kills them (see suite_plugin)."""
    process.terminate()
    try:
        process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def table(rows: list[tuple]) -> str:
    lines = [COLUMNS, ("---:",) * len(COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def report(result: records.Comparison) -> None:
    for (before, after), number in sorted(result.outcomes.items()):
        print(f"{number} tests: {before} without the losses, {after} with them")
    for text, number in result.reasons.most_common():
        print(f"{number} {text}")
    for text in result.killed:
        print(text)
    print("computed in tests:", ", ".join(f"{loss} {n}" for loss, n in sorted(result.losses.items())) or "none")
    for text, number in result.refusals.most_common():
        print(f"refused in {number} tests: {text}")
    for problem in result.problems[:SHOWN]:
        print(f"FAILED {problem}")
    if len(result.problems) > SHOWN:
        print(f"FAILED and {len(result.problems) - SHOWN} more")


def compare(options: argparse.Namespace, processes: int, version: str, folder: Path) -> tuple[records.Comparison, bool]:
    """Runs the tests without the losses and with them; also returns whether this was interrupted."""
    interrupted = False
    try:
        run(options, processes, folder / "without")
        run(options, processes, folder / "with", options.coefficient)
    except (KeyboardInterrupt, SystemExit):
        interrupted = True
    without, attached = records.read(folder / "without"), records.read(folder / "with")
    expected = options.min_attached
    if expected is None:
        expected = ATTACHED.get(version, {}).get(processes, 1)
    if interrupted:
        names = without.keys() & attached.keys() - set(records.running(folder / "with").values())
        without, attached = ({name: run[name] for name in names} for run in (without, attached))
        expected = 0
    result = records.compare(without, attached, expected, options.coefficient <= COEFFICIENT)
    for name in ("without", "with"):
        if not (folder / name / "ended").exists():
            reason = "was interrupted" if interrupted else "ended early"
            result.problems.append(f"not all tests ran {name} the losses: the run {reason}")
    return result, interrupted


def main(arguments: list[str]) -> int:
    # Ends torchrun too: see _start.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    options = parse(arguments)
    options.checkout = options.checkout.resolve()
    version = release(options.checkout)
    rows, failed = [], False
    with tempfile.TemporaryDirectory() as scratch:
        for processes in options.processes:
            begin = time.monotonic()
            folder = (options.keep or Path(scratch)).resolve() / str(processes)
            result, interrupted = compare(options, processes, version, folder)
            print(f"\nMegatron-Core {version}, {processes} processes")
            report(result)
            rows.append((processes, *result.counts.values(), round(time.monotonic() - begin)))
            failed = failed or bool(result.problems)
            if interrupted:
                break
    print(f"\n{table(rows)}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
