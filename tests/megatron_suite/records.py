"""Records of two runs of Megatron's tests, without and with the losses, and their differences."""

import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

# The outcome of a test is the worst of its ranks'.
CRASHED, OVER_TIME = "crashed", "over the time limit"
OUTCOMES = ("passed", "skipped", "failed", CRASHED, OVER_TIME)


@dataclass
class Comparison:
    """Of two runs.

    Attributes:
        counts: a row of the table.
        outcomes: number of tests by their two outcomes.
        losses: number of tests by loss that was computed.
        refusals: number of models by what attach() said of a loss.
        reasons: number of tests by why they do not pass without the losses.
        killed: the tests that crashed or exceeded the time limit, and in which run, one line each.
        problems: what makes the comparison fail, one line each.
    """

    counts: dict
    outcomes: Counter = field(default_factory=Counter)
    losses: Counter = field(default_factory=Counter)
    refusals: Counter = field(default_factory=Counter)
    reasons: Counter = field(default_factory=Counter)
    killed: list = field(default_factory=list)
    problems: list = field(default_factory=list)


def read(folder: Path) -> dict[str, list[dict]]:
    """The records of each test, of all ranks in their order; a test that some rank has not ended has crashed."""
    tests: dict[str, dict[int, dict]] = {}
    ranks = sorted(int(file.stem) for file in folder.glob("*.jsonl"))
    for rank in ranks:
        for record in filter(None, map(_parse, (folder / f"{rank}.jsonl").read_text().splitlines())):
            tests.setdefault(record["test"], {})[rank] = record
    crashed = {"outcome": CRASHED, "text": "", "forwards": [], "gradients": [], "random": None}
    crashed |= {"losses": {}, "refusals": [], "errors": []}
    return {
        name: [{**crashed, **records.get(rank, {"test": name})} for rank in ranks] for name, records in tests.items()
    }


def _parse(line: str) -> dict | None:
    """The record of a line; None for a line that is empty or was cut off when the rank was killed."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def running(folder: Path, seconds: float = 0) -> dict[int, str]:
    """The test that each rank is in, for ranks that have been in it for at least so many seconds."""
    tests = {}
    for file in folder.glob("*.jsonl"):
        if time.time() - file.stat().st_mtime >= seconds:
            record = _parse("".join(file.read_text().splitlines()[-1:]))
            if record and "outcome" not in record:
                tests[int(file.stem)] = record["test"]
    return tests


def end(folder: Path, over_time: dict[int, str]) -> None:
    """Completes the records of ranks that have ended, of which some were killed in the test given."""
    for file in folder.glob("*.jsonl"):
        test = over_time.get(int(file.stem))
        record = "" if test is None else json.dumps({"test": test, "outcome": OVER_TIME})
        with open(file, "a") as records:
            # The line break completes a line that was cut off. The empty line means that no test is running.
            records.write(f"\n{record}\n\n")


def compare(without: dict, attached: dict, min_attached: int, gradients: bool = True) -> Comparison:
    """Compares what ``read`` returned for the two runs.

    Args:
        min_attached: with losses computed in fewer tests, the comparison fails.
        gradients: whether they have to be the same.
    """
    counts = dict.fromkeys(("tests", "passed without", "passed with", "attached", "forwards", "gradients"), 0)
    result = Comparison(counts)
    counts["tests"] = len(without.keys() | attached.keys())
    for name in sorted(without.keys() | attached.keys()):
        before, after = outcome(without.get(name)), outcome(attached.get(name))
        result.outcomes[before, after] += 1
        counts["passed without"] += before == "passed"
        counts["passed with"] += after == "passed"
        for kind in (CRASHED, OVER_TIME):
            runs = [run for run, ended in (("without", before), ("with", after)) if ended == kind]
            if runs:
                result.killed.append(f"{kind} {' and '.join(runs)} the losses: {name}")
        if before not in ("passed", CRASHED, OVER_TIME):
            result.reasons[f"{before}: {_reason(without.get(name, []))}"] += 1
        if after != "passed" and before == "passed" or after == OVER_TIME != before:
            text = next((r["text"] for r in attached.get(name, []) if r["text"]), "")
            expected = "passes" if before == "passed" else before
            result.problems.append(f"{name}: {expected} without the losses, {after} with them\n{text}")
        if before != "passed" or after != "passed":
            continue
        losses = {loss for record in attached[name] for loss in record["losses"]}
        result.losses.update(losses)
        result.refusals.update({text for record in attached[name] for text in record["refusals"]})
        counts["attached"] += bool(losses)
        if len(without[name]) != len(attached[name]):
            result.problems.append(f"{name}: other numbers of processes")
        for rank, (expected, found) in enumerate(zip(without[name], attached[name])):
            result.problems += [f"{name}: {text}" for text in _differences(expected, found, gradients, rank)]
            if losses:
                counts["forwards"] += len(found["forwards"])
                counts["gradients"] += len(found["gradients"]) if gradients else 0
    if counts["attached"] < min_attached:
        result.problems.append(f"losses computed in {counts['attached']} tests, {min_attached} expected")
    return result


def outcome(records) -> str:
    return max((record["outcome"] for record in records), key=OUTCOMES.index) if records else "not run"


def _reason(records) -> str:
    """The line of pytest's text that names the error."""
    lines = [line for record in records for line in record["text"].splitlines() if line]
    errors = [line.removeprefix("E").strip() for line in lines if line.startswith("E ")]
    return (errors or lines[-1:] or ["?"])[0][:120]


def _differences(expected: dict, found: dict, gradients: bool, rank: int):
    for kind in ("forwards", "gradients") if gradients else ("forwards",):
        before, after = expected[kind], found[kind]
        if len(before) != len(after):
            yield f"rank {rank}: {len(after)} {kind} instead of {len(before)}"
            continue
        different = [f"{number} ({x[0]})" for number, (x, y) in enumerate(zip(before, after)) if x != y]
        if different:
            yield f"rank {rank}: {len(different)} of {len(before)} {kind} differ, first number {different[0]}"
    if expected["random"] != found["random"]:
        yield f"rank {rank}: the random state after the test differs"
    yield from (f"rank {rank}: {text}" for text in found["errors"])
