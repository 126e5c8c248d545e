"""Runs the tests that need Megatron on several releases of megatron-core, and prints a table (``make test-versions``).

    python .ci/versions.py BASE OLDEST VERSION... [-- PYTEST'S ARGUMENTS]

BASE and OLDEST are environments of .ci/venv. Release 0.16 runs in OLDEST. Each other one gets a small environment next
to BASE, with that release of megatron-core and all else from BASE (.ci/borrow).
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
TESTS = [
    *[f"tests/integration/test_{name}.py" for name in ("hooks", "gradients", "row_check", "cuda_graphs", "refusals")],
    *["tests/integration/test_remedies.py", "tests/cli/test_doctor.py"],
    *["tests/programs/test_patches.py", "tests/programs/test_pretrain.py"],
]
FACTS = "import platform, torch; print(platform.python_version(), torch.__version__.partition('+')[0])"
COLUMNS = ("megatron-core", "Python", "torch", "passed", "failed", "skipped", "seconds")


def environment(base: Path, version: str) -> Path:
    """The environment of one release, made if it is not there yet."""
    folder = base.with_name(f"{base.name}-{version}")
    subprocess.run([ROOT / ".ci" / "borrow", folder, base, f"megatron-core=={version}"], check=True)
    return folder


def run(folder: Path, version: str, arguments: list[str]) -> dict[str, str]:
    """Runs the tests in an environment; returns a row of the table."""
    python = str(folder / "bin" / "python")
    found = subprocess.run(
        [python, "-c", "from importlib.metadata import version; print(version('megatron-core'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    if found != version:
        sys.exit(f"{folder} has megatron-core {found}, not {version}")
    facts = subprocess.run([python, "-c", FACTS], capture_output=True, text=True, check=True).stdout.split()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [python, "-m", "pytest", "-q", "-p", "no:warnings", f"--junitxml={report}", *TESTS, *arguments]
        status = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
        counts = count(report.read_text()) if report.exists() else {}
    counts = counts or {"passed": 0, "failed": 1, "skipped": 0}
    if status and not counts["failed"]:
        counts["failed"] = 1
    values = (version, *facts, *counts.values(), round(time.monotonic() - start))
    return dict(zip(COLUMNS, map(str, values)))


def count(report: str) -> dict[str, int]:
    """Tests that passed, failed (or broke) and were skipped, by pytest's JUnit report."""
    suites = list(ElementTree.fromstring(report).iter("testsuite"))
    total, failures, errors, skipped = (
        sum(int(suite.get(name)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    return {"passed": total - failures - errors - skipped, "failed": failures + errors, "skipped": skipped}


def table(rows: list[dict[str, str]]) -> str:
    lines = [COLUMNS, ("---",) * 3 + ("---:",) * 4, *(tuple(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: list[str]) -> int:
    end = arguments.index("--") if "--" in arguments else len(arguments)
    base, oldest, *versions = arguments[:end]
    rows = []
    for version in versions:
        folder = Path(oldest) if version.startswith("0.16.") else environment(Path(base), version)
        print(f"\nmegatron-core {version} in {folder}", flush=True)
        rows.append(run(folder, version, arguments[end + 1 :]))
    print(f"\n{table(rows)}")
    return int(any(row["failed"] != "0" for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
