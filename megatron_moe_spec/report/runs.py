"""Reads what a training run left: TensorBoard events, JSON lines, the file of metrics and routing traces.

Suffixes: M MoE layers, E experts.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor

from megatron_moe_spec.losses import LOSSES
from megatron_moe_spec.metrics.trace_files import read_trace
from megatron_moe_spec.metrics.traces import Trace

TRAIN_LOSS = "lm_loss"
VALIDATION_LOSS = "validation_loss"
STEP_TIME = "step_time_s"
MEMORY = "memory_bytes"
AUXILIARY = ("load_balancing_loss", *(loss.name for loss in LOSSES))
METRICS_FILE = "moe_spec_metrics.jsonl"
LOG_FILE = "log.jsonl"

# Megatron's TensorBoard tags, under the names that examples/pretrain_core.py uses.
TENSORBOARD_TAGS = {
    "lm loss": TRAIN_LOSS,
    "lm loss validation": VALIDATION_LOSS,
    "iteration-time": STEP_TIME,
    "mem-max-allocated-bytes": MEMORY,
    **{name: name for name in AUXILIARY},
}
_LARGEST = ("max_abs_cos", "router_max_abs_cos")  # of all layers, the largest counts; else their mean
_NOT_MEASURES = ("layer", "layers", "layer_number")

Series = list[tuple[int, float]]  # (iteration, value), by iteration


class RunError(ValueError):
    """A run that cannot be read. The message names the file and the remedy."""


@dataclass
class Run:
    """All values of a training run.

    Attributes:
        path: as it was named.
        series: by measure, means over the layers (pairs), or the largest; and what the logs hold.
        layers: by measure and layer, or pair of layers: "3", "3-4".
        lists: by measure and layer, the lists of the last measured step.
        loads: by iteration, tokens of each expert, [M, E].
        sources: the files that were read.
        notices: what a reader should know, one sentence each.
        trace: None where there is none.
    """

    path: Path
    series: dict[str, Series] = field(default_factory=dict)
    layers: dict[str, dict[str, Series]] = field(default_factory=dict)
    lists: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    loads: dict[int, Tensor] = field(default_factory=dict)
    sources: list[Path] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    trace: Optional[Trace] = None

    @property
    def shape(self) -> Optional[tuple[int, int]]:
        """Numbers of MoE layers and of experts; None where nothing tells."""
        if self.trace is not None:
            return len(self.trace.layers), self.trace.num_experts
        last = next(reversed(self.loads.values()), None)
        return None if last is None else (last.shape[0], last.shape[1])


def read_run(path: Path, traces: Optional[Path] = None) -> Run:
    """Reads a run.

    Args:
        path: its folder, with whatever is below it, or its file of metrics.
        traces: a routing trace to read with it; None: none is read.

    Raises:
        RunError: there is nothing, or there are several runs, or a file is broken.
        TraceError: the trace cannot be read.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path
    run = Run(path)
    metrics = [path] if path.is_file() else sorted(folder.rglob(METRICS_FILE))
    logs = sorted(folder.rglob(LOG_FILE))
    events = sorted({file.parent for file in folder.rglob("events.out.tfevents.*")})
    for found in (metrics, logs, events):
        if len(found) > 1:
            names = ", ".join(str(one.relative_to(folder)) for one in found)
            raise RunError(f"{folder} holds several runs ({names}): name the folder of one")
    if not (metrics or logs or events):
        raise RunError(
            f"{path} has no {METRICS_FILE}, {LOG_FILE} or TensorBoard events: train with "
            "--moe-spec-metrics-interval and --tensorboard-dir, and name that folder"
        )
    for one in events:
        run.sources.append(one)
        _read_tensorboard(one, run.series)
    for one in logs:
        run.sources.append(one)
        for _, record in _json_lines(one, run.notices):
            for name in (TRAIN_LOSS, VALIDATION_LOSS, STEP_TIME, *AUXILIARY):
                _add(run.series, name, record["iteration"], record.get(name))
    run.series = {name: _one_value_an_iteration(values) for name, values in run.series.items()}
    for one in metrics:
        run.sources.append(one)
        _read_metrics(one, run)
    if traces is not None:
        run.sources.append(traces)
        run.trace = read_trace(traces)
        run.notices += run.trace.notices
    return run


def find_traces(path: Path) -> Optional[Path]:
    """The folder of a run's routing trace.

    Raises:
        RunError: there are several.
    """
    found = sorted({file.parent for file in path.rglob("router_trace_rank*.jsonl")}) if path.is_dir() else []
    if len(found) > 1:
        raise RunError(f"{path} holds several traces ({', '.join(map(str, found))}): name one with --traces")
    return found[0] if found else None


def final(values: Series, last_iteration: int, window: int) -> Optional[float]:
    """Mean of the values of the last ``window`` iterations of a run, or None without any."""
    tail = [value for iteration, value in values if iteration > last_iteration - window]
    return sum(tail) / len(tail) if tail else None


def median(values: Series) -> Optional[float]:
    """Median of the values, or None without any."""
    ordered = sorted(value for _, value in values)
    return ordered[len(ordered) // 2] if ordered else None


def _one_value_an_iteration(values: Series) -> Series:
    """Several of one iteration are averaged, as Megatron validates twice at the last one."""
    by_iteration: dict[int, list[float]] = {}
    for iteration, value in values:
        by_iteration.setdefault(iteration, []).append(value)
    return [(iteration, sum(same) / len(same)) for iteration, same in sorted(by_iteration.items())]


def _add(series: dict[str, Series], name: str, iteration: int, value) -> None:
    if isinstance(value, (int, float)) and math.isfinite(value):
        series.setdefault(name, []).append((iteration, float(value)))


def _json_lines(path: Path, notices: list[str]) -> Iterator[tuple[int, dict]]:
    """(number of the line, record) of a file of JSON lines; the last one may be cut off."""
    broken = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if broken:
                raise RunError(f"{path}:{broken} is no record of an iteration: delete this line")
            try:
                record = json.loads(line)
                usable = isinstance(record, dict) and type(record.get("iteration")) is int
            except ValueError:
                usable = False
            if usable:
                yield number, record
            else:
                broken = number
    if broken:
        notices.append(f"The last line of {path.name} is cut off and was left out; is the run still going on?")


def _read_tensorboard(folder: Path, series: dict[str, Series]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    for tag in events.Tags()["scalars"]:
        if tag in TENSORBOARD_TAGS:
            for event in events.Scalars(tag):
                _add(series, TENSORBOARD_TAGS[tag], event.step, event.value)


def _read_metrics(path: Path, run: Run) -> None:
    """What was measured takes the place of the logs' values: those hold a loss only where it is trained on."""
    means: dict[str, dict[int, float]] = {}
    layers: dict[str, dict[str, dict[int, float]]] = {}
    for number, record in _json_lines(path, run.notices):
        iteration = record["iteration"]
        for name in AUXILIARY:
            if isinstance(record.get(name), (int, float)):
                means.setdefault(name, {})[iteration] = record[name]
        loads = []
        values: dict[str, list[float]] = {}
        for row in (*(record.get("layers") or ()), *(record.get("pairs") or ())):
            which = "-".join(map(str, row["layers"])) if "layers" in row else str(row.get("layer_number", row["layer"]))
            for name, value in row.items():
                if name in _NOT_MEASURES or value is None:
                    continue
                if name == "load":
                    loads.append(torch.tensor(value, dtype=torch.int64))
                elif isinstance(value, list):
                    run.lists.setdefault(name, {})[which] = value
                else:
                    values.setdefault(name, []).append(value)
                    layers.setdefault(name, {}).setdefault(which, {})[iteration] = value
        for name, found in values.items():
            if name not in AUXILIARY or name not in record:
                means.setdefault(name, {})[iteration] = max(found) if name in _LARGEST else sum(found) / len(found)
        if loads:
            if len({len(load) for load in loads}) > 1 or (run.loads and len(loads) != run.shape[0]):
                raise RunError(f"{path}:{number} is of another model than the lines before: keep one run's lines")
            run.loads[iteration] = torch.stack(loads)
    run.series.update({name: sorted(values.items()) for name, values in means.items()})
    run.layers = {name: {k: sorted(v.items()) for k, v in of.items()} for name, of in layers.items()}
