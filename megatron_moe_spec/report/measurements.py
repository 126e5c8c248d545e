"""Reads the file of metrics: the losses of every step, and of a sample of steps what was measured of the layers.

A measured step of a large model is a line of a hundred kilobytes; of thousands of them, a figure shows a few hundred.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from megatron_moe_spec.losses import LOSSES
from megatron_moe_spec.report.lines import RunError, json_lines, line_at
from megatron_moe_spec.report.sampling import evenly

if TYPE_CHECKING:
    from megatron_moe_spec.report.runs import Run, Series

AUXILIARY = ("load_balancing_loss", *(loss.name for loss in LOSSES))
MOST_STEPS = 500  # in the sample
_LARGEST = ("max_abs_cos", "router_max_abs_cos")  # of all layers, the largest counts; else their mean
_NOT_MEASURES = ("layer", "layers", "layer_index")
# How MetricsWriter begins a line: the iteration and the losses, then the layers.
_START = '{"iteration": '
_HEAD = re.compile(_START + r'\d+(?:, "\w+": [-+.\w]+)*, "layers": \[(?=\{)')
_LISTS = re.compile(r'("(?:load|mass_of_best|router_singular_values)": )\[[^][{}]*\]')


class _Place(NamedTuple):
    number: int  # of the line
    start: int  # byte of the file


def read_measurements(path: Path, run: "Run") -> None:
    """Adds what was measured to a run. It takes the place of the logs' values: those hold a loss only where it is
    trained on. Of several lines of an iteration, as after a restart, the last one counts.

    Losses are of every step. What the layers have is of the sample; their means, besides, of the steps at the end that
    final values are made of. Any other line is looked at as far as the losses, and has to end as it should and to hold
    one record.

    Raises:
        RunError: a line is not what MetricsWriter writes, or of another model than those before.
    """
    losses: dict[str, dict[int, float]] = defaultdict(dict)
    places: dict[int, _Place] = {}
    for number, start, record in json_lines(path, run.notices, _head):
        iteration = record["iteration"]
        try:
            for name in AUXILIARY:
                if record.get(name) is not None:
                    losses[name][iteration] = float(record[name])
        except (TypeError, ValueError):
            raise _not_ours(path, number) from None
        if record.get("layers") or record.get("pairs"):
            places[iteration] = _Place(number, start)
    run.series.update({name: sorted(values.items()) for name, values in losses.items()})
    measured = run.measured_iterations = sorted(places)
    sample = set(evenly(measured, MOST_STEPS))
    means: dict[str, Series] = defaultdict(list)
    for iteration in measured:
        if iteration not in sample and iteration <= measured[-1] - run.window:
            continue
        number, start = places[iteration]
        before = run.names, run.num_experts
        try:
            if iteration in sample:
                record = line_at(path, start)
                _read_layers(record, run)
            else:
                record = line_at(path, start, _without_lists)
            for name, value in _means(record).items():
                means[name].append((iteration, value))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            raise _not_ours(path, number) from None
        if before[0] and before != (run.names, run.num_experts):
            raise RunError(f"{path}:{number} is of another model than the lines before: keep one run's lines")
    run.series.update({name: values for name, values in means.items() if name not in losses})


def _not_ours(path: Path, number: int) -> RunError:
    return RunError(f"{path}:{number} is not what --moe-spec-metrics-interval writes: delete this line")


def _head(line: str) -> str:
    """The same line with an empty layer for all that it has; any other line than MetricsWriter's is left as it is."""
    head = _HEAD.match(line)
    return f"{head[0]}{{}}]}}" if head and line.endswith("}\n") and line.count(_START) == 1 else line


def _without_lists(line: str) -> str:
    """The same line with null for its lists of numbers, which take long to parse."""
    return _LISTS.sub(r"\1null", line)


def _rows(record: dict) -> Iterator[tuple[str, dict]]:
    """(name of the layer or of the pair of layers, what it has)."""
    layers, pairs = record.get("layers") or [], record.get("pairs") or []
    names = {row["layer"]: str(row.get("layer_index", row["layer"])) for row in layers}
    yield from zip(names.values(), layers)
    for row in pairs:
        yield "-".join(names[i] for i in row["layers"]), row


def _means(record: dict) -> dict[str, float]:
    """Of each measure over the layers, or pairs, that have it; or the largest."""
    values: dict[str, list[float]] = defaultdict(list)
    for _, row in _rows(record):
        for name, value in row.items():
            if name not in _NOT_MEASURES and isinstance(value, (int, float)) and math.isfinite(value):
                values[name].append(value)
    return {name: max(found) if name in _LARGEST else sum(found) / len(found) for name, found in values.items()}


def _read_layers(record: dict, run: "Run") -> None:
    """Adds a step that is later than those before."""
    iteration, loads = record["iteration"], []
    run.names = [name for name, row in _rows(record) if "layer" in row] or run.names
    for which, row in _rows(record):
        for name, value in row.items():
            if name in _NOT_MEASURES or value is None:
                continue
            if name == "load":
                loads.append(value)
            elif isinstance(value, list):
                sum(value)  # raises unless all are numbers
                run.lists.setdefault(name, {})[which] = value
            elif math.isfinite(value):
                run.layers.setdefault(name, {}).setdefault(which, []).append((iteration, value))
    if loads:
        run.loads[iteration] = torch.tensor(loads, dtype=torch.int64)
        run.num_experts = len(loads[0])
    if "mass_of_best" in run.lists:
        run.top_k = len(next(iter(run.lists["mass_of_best"].values())))
