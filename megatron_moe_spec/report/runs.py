"""Reads what a training run left: TensorBoard events, JSON lines, the file of metrics and routing traces."""

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor

from megatron_moe_spec.losses import LOSSES
from megatron_moe_spec.metrics.writer import METRICS_FILE
from megatron_moe_spec.traces.files import read_trace
from megatron_moe_spec.traces.schema import Trace

TRAIN_LOSS = "lm_loss"
VALIDATION_LOSS = "validation_loss"
STEP_TIME = "step_time_s"
AUXILIARY = ("load_balancing_loss", *(loss.name for loss in LOSSES))
LOG_FILE = "log.jsonl"

# Megatron's TensorBoard tags, under the names that examples/pretrain_core.py uses.
TENSORBOARD_TAGS = {
    "lm loss": TRAIN_LOSS,
    "lm loss validation": VALIDATION_LOSS,
    "iteration-time": STEP_TIME,
    **{name: name for name in AUXILIARY},
}
_LARGEST = ("max_abs_cos", "router_max_abs_cos")  # of all layers, the largest counts; else their mean
_NOT_MEASURES = ("layer", "layers", "layer_index")

Series = list[tuple[int, float]]  # (iteration, value), by iteration


class RunError(ValueError):
    """A run that cannot be read. The message names the file and the remedy."""


@dataclass
class Run:
    """All values of a training run; empty or None where nothing tells."""

    path: Path  # as it was named
    # By measure: means over the layers (pairs), or the largest; and what the logs hold.
    series: dict[str, Series] = field(default_factory=dict)
    layers: dict[str, dict[str, Series]] = field(default_factory=dict)  # by measure and layer, or pair: "3", "3-4"
    lists: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # the same, of the last measured step
    loads: dict[int, Tensor] = field(default_factory=dict)  # by iteration, tokens of each expert, [MoE layers, experts]
    names: list[str] = field(default_factory=list)  # of the MoE layers, their indices in the whole model
    num_experts: Optional[int] = None  # of each layer
    top_k: Optional[int] = None
    sources: list[Path] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)  # what a reader should know, one sentence each
    trace: Optional[Trace] = None

    @property
    def model(self) -> str:
        """What is known of the model, in words."""
        experts = f" of {self.num_experts} experts" if self.num_experts else ""
        return f"{len(self.names)} MoE layers{experts}" + (f", {self.top_k} for each token" if self.top_k else "")

    @property
    def last_iteration(self) -> int:
        return max((values[-1][0] for values in self.series.values() if values), default=0)

    @property
    def measured_iterations(self) -> list[int]:
        """Those in which layers were measured, ascending."""
        return sorted({i for layers in self.layers.values() for values in layers.values() for i, _ in values})


def same_model(run: Run, other: Run) -> bool:
    """Whether the two may be of the same model, by what is known of both."""
    pairs = ((len(run.names), len(other.names)), (run.num_experts, other.num_experts))
    return all(here == there for here, there in pairs if here and there)


def read_run(path: Path, traces: Optional[Path] = None, num_experts: Optional[int] = None) -> Run:
    """Reads a run, its folder or its file of metrics, and a trace; ``num_experts``: for a trace that does not say.

    Raises:
        RunError: there is nothing, there are several runs, a file is broken, or the trace is of another model.
        TraceError: the trace cannot be read.
    """
    folder = path.parent if path.is_file() else path
    run = Run(path)
    metrics = [path] if path.is_file() else sorted(folder.rglob(METRICS_FILE))
    logs = sorted(folder.rglob(LOG_FILE))
    events = sorted({file.parent for file in folder.rglob("events.out.tfevents.*")})
    for found in (metrics, logs, events):
        if len(found) > 1:
            names = ", ".join(str(one.relative_to(folder)) for one in found)
            raise RunError(f"{folder} holds several runs ({names}): name the folder of one")
    if not (metrics or logs or events or traces):
        raise RunError(
            f"{path} has no {METRICS_FILE}, {LOG_FILE} or TensorBoard events: train with "
            "--moe-spec-metrics-interval and --tensorboard-dir, and name that folder"
        )
    run.sources += [*events, *logs, *metrics]
    for one in events:
        _read_tensorboard(one, run.series)
    for one in logs:
        for _, record in _json_lines(one, run.notices):
            for name in (TRAIN_LOSS, VALIDATION_LOSS, STEP_TIME, *AUXILIARY):
                _add(run.series, name, record["iteration"], record.get(name))
    run.series = {name: _one_value_an_iteration(name, values) for name, values in run.series.items()}
    for one in metrics:
        _read_metrics(one, run)
    if traces is None:
        return run
    # A run that still goes on has not written all of its last micro-batch.
    trace = run.trace = read_trace(traces, num_experts, drop_incomplete=True)
    of_trace = Run(traces, names=list(map(str, trace.layers)), num_experts=trace.num_experts)
    of_trace.top_k = trace.experts_TMK.shape[2]
    if not same_model(run, of_trace):
        raise RunError(
            f"{traces} has {of_trace.model}, the metrics of {path} {run.model}: name the trace of this run by --traces"
        )
    run.sources.append(traces)
    run.notices += trace.notices
    run.names, run.num_experts, run.top_k = run.names or of_trace.names, of_trace.num_experts, of_trace.top_k
    return run


def find_traces(path: Path) -> Optional[Path]:
    """The folder of a run's routing trace; raises RunError if there are several."""
    found = sorted({file.parent for file in path.rglob("router_trace_rank*.jsonl")}) if path.is_dir() else []
    if len(found) > 1:
        raise RunError(f"{path} holds several traces ({', '.join(map(str, found))}): name one with --traces")
    return found[0] if found else None


def final(values: Series, last_iteration: int, window: int) -> Optional[float]:
    """Mean of the values of the last ``window`` iterations of a run, or None without any."""
    tail = [value for iteration, value in values if iteration > last_iteration - window]
    return sum(tail) / len(tail) if tail else None


def median(values: Series) -> Optional[float]:
    """Median of the values, the upper of two, or None without any."""
    return statistics.median_high(value for _, value in values) if values else None


def _one_value_an_iteration(name: str, values: Series) -> Series:
    """Of several, the later counts, after a restart; of validation, the mean, as Megatron ends with two."""
    by_iteration: dict[int, list[float]] = {}
    previous = None
    for iteration, value in values:
        if iteration != previous or name != VALIDATION_LOSS:
            by_iteration[iteration] = []
        by_iteration[iteration].append(value)
        previous = iteration
    return [(iteration, sum(same) / len(same)) for iteration, same in sorted(by_iteration.items())]


def _add(series: dict[str, Series], name: str, iteration: int, value: object) -> None:
    if isinstance(value, (int, float)) and math.isfinite(value):
        series.setdefault(name, []).append((iteration, float(value)))


def _json_lines(path: Path, notices: list[str]) -> Iterator[tuple[int, dict]]:
    """(line, record) of a file of JSON lines; the last one may be cut off."""
    broken = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if broken:
                raise RunError(f"{path}:{broken} is no record of an iteration: delete this line")
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict) and type(record.get("iteration")) is int:
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
        before = (run.names, run.num_experts)
        try:
            _read_record(record, run, means, layers)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            raise RunError(
                f"{path}:{number} is not what --moe-spec-metrics-interval writes: delete this line"
            ) from None
        if before != (run.names, run.num_experts) and before[0]:
            raise RunError(f"{path}:{number} is of another model than the lines before: keep one run's lines")
    run.loads = dict(sorted(run.loads.items()))
    run.series.update({name: sorted(values.items()) for name, values in means.items()})
    run.layers = {name: {k: sorted(v.items()) for k, v in of.items()} for name, of in layers.items()}


def _read_record(record: dict, run: Run, means: dict, layers: dict) -> None:
    iteration = record["iteration"]
    rows, pairs = record.get("layers") or [], record.get("pairs") or []
    names = {row["layer"]: str(row.get("layer_index", row["layer"])) for row in rows}
    run.names = list(names.values()) or run.names
    values: dict[str, list[float]] = {}
    loads = []
    for row in (*rows, *pairs):
        which = "-".join(names[i] for i in row["layers"]) if "layers" in row else names[row["layer"]]
        for name, value in row.items():
            if name in _NOT_MEASURES or value is None:
                continue
            if name == "load":
                loads.append(value)
            elif isinstance(value, list):
                sum(value)  # raises unless all are numbers
                run.lists.setdefault(name, {})[which] = value
            elif math.isfinite(value):
                values.setdefault(name, []).append(value)
                layers.setdefault(name, {}).setdefault(which, {})[iteration] = value
    for name, found in values.items():
        means.setdefault(name, {})[iteration] = max(found) if name in _LARGEST else sum(found) / len(found)
    for name in AUXILIARY:
        if record.get(name) is not None:
            means.setdefault(name, {})[iteration] = float(record[name])
    if loads:
        run.loads[iteration] = torch.tensor(loads, dtype=torch.int64)
        run.num_experts = len(loads[0])
    if "mass_of_best" in run.lists:
        run.top_k = len(next(iter(run.lists["mass_of_best"].values())))
