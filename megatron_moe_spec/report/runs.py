"""Reads what a training run left: TensorBoard events, JSON lines, the file of metrics and routing traces."""

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from torch import Tensor

from megatron_moe_spec.metrics.writer import METRICS_FILE
from megatron_moe_spec.report.events import EVENT_FILES, read_scalars
from megatron_moe_spec.report.lines import RunError, json_lines
from megatron_moe_spec.report.measurements import AUXILIARY, read_measurements
from megatron_moe_spec.traces.files import read_trace
from megatron_moe_spec.traces.schema import Trace

TRAIN_LOSS = "lm_loss"
VALIDATION_LOSS = "validation_loss"
STEP_TIME = "step_time_s"
LOG_FILE = "log.jsonl"

# Megatron's TensorBoard tags, under the names that examples/pretrain_core.py uses.
TENSORBOARD_TAGS = {
    "lm loss": TRAIN_LOSS,
    "lm loss validation": VALIDATION_LOSS,
    "iteration-time": STEP_TIME,
    **{name: name for name in AUXILIARY},
}

Series = list[tuple[int, float]]  # (iteration, value), by iteration


@dataclass
class Run:
    """Values of a training run; empty or None where nothing tells. For those of a sample see ``read_measurements``."""

    path: Path  # as it was named
    # By measure: means over the layers (pairs), or the largest; and what the logs hold.
    series: dict[str, Series] = field(default_factory=dict)
    layers: dict[str, dict[str, Series]] = field(default_factory=dict)  # by measure and layer, or pair: "3", "3-4"
    lists: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # the same, of the last measured step
    measured_iterations: list[int] = field(default_factory=list)  # those in which layers were measured, ascending
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
        ends = [values[-1][0] for values in self.series.values() if values]
        return max([*ends, *self.measured_iterations[-1:]], default=0)

    @property
    def window(self) -> int:
        """Number of iterations that final values are averaged over: a tenth of all, and at least one measurement."""
        measured = self.measured_iterations
        step = measured[-1] - measured[-2] if len(measured) > 1 else 1
        return max(1, step, math.ceil(self.last_iteration / 10))


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
    events = sorted({file.parent for file in folder.rglob(EVENT_FILES)})
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
        for tag, iteration, value in read_scalars(one, TENSORBOARD_TAGS):
            _add(run.series, TENSORBOARD_TAGS[tag], iteration, value)
    for one in logs:
        for _, _, record in json_lines(one, run.notices):
            for name in (TRAIN_LOSS, VALIDATION_LOSS, STEP_TIME, *AUXILIARY):
                _add(run.series, name, record["iteration"], record.get(name))
    run.series = {name: _one_value_an_iteration(name, values) for name, values in run.series.items()}
    for one in metrics:
        read_measurements(one, run)
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
