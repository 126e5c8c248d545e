"""Read what one training run left: TensorBoard events or JSON lines, and the metrics file."""

import json
import math
from pathlib import Path

TRAIN_LOSS = "lm_loss"
VALIDATION_LOSS = "validation_loss"
STEP_TIME = "step_time_s"
AUXILIARY = (
    "load_balancing_loss",
    "specialization_loss",
    "coupling_loss",
    "orthogonality_loss",
    "score_variance_loss",
    "erc_loss",
)
MEMORY = "memory_bytes"
METRICS_FILE = "moe_spec_metrics.jsonl"

# Megatron's TensorBoard tags, under the names that examples/pretrain_core.py uses.
TENSORBOARD_TAGS = {
    "lm loss": TRAIN_LOSS,
    "lm loss validation": VALIDATION_LOSS,
    "iteration-time": STEP_TIME,
    "mem-max-allocated-bytes": MEMORY,
    **{name: name for name in AUXILIARY},
}


def read_run(folder):
    """All measured values of a run.

    Args:
        folder: one run's output folder.

    Returns:
        {name: [(iteration, value), ...]} in the order of iterations. Metrics of layers and of pairs of layers are
        averaged over them, but for ``max_abs_cos``, which is the largest. Values that are not finite are left out;
        several of one iteration are averaged, as Megatron validates twice at the last one.
    """
    folder = Path(folder)
    series = {}
    for path in folder.rglob("events.out.tfevents.*"):
        _read_tensorboard(path.parent, series)
        break
    for record in _json_lines(folder / "log.jsonl"):
        for name in (TRAIN_LOSS, VALIDATION_LOSS, STEP_TIME, *AUXILIARY):
            _add(series, name, record["iteration"], record.get(name))
    measured = {}
    for path in folder.rglob(METRICS_FILE):
        for record in _json_lines(path):
            _read_metrics(record, measured)
    # Measured the same way in every run, whereas the logs hold a loss only where it is trained on.
    series.update(measured)
    return {name: _one_value_an_iteration(values) for name, values in series.items()}


def final(values, last_iteration, window):
    """Mean of the values of the last ``window`` iterations of a run, or None without any."""
    tail = [value for iteration, value in values if iteration > last_iteration - window]
    return sum(tail) / len(tail) if tail else None


def median(values):
    """Median of the values, or None without any."""
    ordered = sorted(value for _, value in values)
    return ordered[len(ordered) // 2] if ordered else None


def _one_value_an_iteration(values):
    by_iteration = {}
    for iteration, value in values:
        by_iteration.setdefault(iteration, []).append(value)
    return [(iteration, sum(same) / len(same)) for iteration, same in sorted(by_iteration.items())]


def _add(series, name, iteration, value):
    if isinstance(value, (int, float)) and math.isfinite(value):
        series.setdefault(name, []).append((iteration, float(value)))


def _json_lines(path):
    """Records of a JSON-lines file; the last one may have been cut off."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and "iteration" in record:
            yield record


def _read_tensorboard(folder, series):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    for tag in events.Tags()["scalars"]:
        if tag in TENSORBOARD_TAGS:
            for event in events.Scalars(tag):
                _add(series, TENSORBOARD_TAGS[tag], event.step, event.value)


def _read_metrics(record, series):
    iteration = record["iteration"]
    for name in AUXILIARY:
        _add(series, name, iteration, record.get(name))
    for rows in (record.get("layers") or [], record.get("pairs") or []):
        names = {name for row in rows for name in row} - {"layer", "layers"}
        for name in names:
            values = [row[name] for row in rows if isinstance(row.get(name), (int, float))]
            if values:
                combined = max(values) if name == "max_abs_cos" else sum(values) / len(values)
                _add(series, name, iteration, combined)
