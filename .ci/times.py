"""Prints where the time of ``.ci/run`` went: its steps, what started processes, and the slowest tests.

    python .ci/times.py STEPS [JUNIT ...]

STEPS holds a line ``SECONDS NAME`` for each step. JUNIT are reports of pytest; a test's properties "forks", "torchrun"
and "interpreters" (tests/helpers/processes.py) are ``JOBS SECONDS``.
"""

import sys
from pathlib import Path
from xml.etree import ElementTree

SLOWEST = 20
STARTS = {
    "forks": "forked jobs, until their command began",
    "torchrun": "jobs of torchrun, until they ended",
    "interpreters": "interpreters, until they ended",
}


def tests(reports: list[Path]) -> list[tuple[float, str, dict[str, str]]]:
    """(seconds, with those of set-up and teardown; report and name; properties) of every test."""
    return [
        (
            float(case.get("time")),
            f"{report.stem}: {case.get('classname', '').replace('.', '/')}::{case.get('name')}",
            {one.get("name"): one.get("value") for one in case.iter("property")},
        )
        for report in reports
        if report.exists()
        for case in ElementTree.parse(report).iter("testcase")
    ]


def summary(steps: str, found: list[tuple[float, str, dict[str, str]]]) -> str:
    lines = ["", "Where the time went"]
    lines += [f"{seconds:>7} s  {name}" for seconds, name in (line.split(" ", 1) for line in steps.splitlines())]
    lines += ["", "Start-up, in all"]
    for kind, meaning in STARTS.items():
        values = [properties[kind].split() for _, _, properties in found if kind in properties]
        lines.append(f"{sum(float(s) for _, s in values):7.0f} s  {sum(int(n) for n, _ in values)} {meaning}")
    lines += ["", f"The {SLOWEST} slowest of {len(found)} tests, {sum(one[0] for one in found):.0f} s in all"]
    slowest = sorted(found, key=lambda one: -one[0])[:SLOWEST]
    return "\n".join([*lines, *(f"{seconds:7.1f} s  {name}" for seconds, name, _ in slowest)])


if __name__ == "__main__":
    print(summary(Path(sys.argv[1]).read_text(), tests(list(map(Path, sys.argv[2:])))))
