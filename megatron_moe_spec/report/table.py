"""The table of a report: what training ended with."""

from typing import Optional

from megatron_moe_spec.report.runs import AUXILIARY, TRAIN_LOSS, VALIDATION_LOSS, Run, final

# (what the reader sees, series, digits)
ROWS = (
    ("load-balancing loss", "load_balancing_loss", 4),
    ("specialization loss", "specialization_loss", 5),
    ("coupling loss", "coupling_loss", 4),
    ("routing entropy of a token (nats)", "routing_entropy", 4),
    ("routing entropy over all tokens (nats)", "marginal_entropy", 4),
    ("probability of the chosen experts", "topk_mass", 4),
    ("expert overlap, mean abs(cos)", "mean_abs_cos", 4),
    ("expert overlap, largest abs(cos)", "max_abs_cos", 4),
    ("load imbalance, max / mean", "load_imbalance", 3),
    ("entropy of the next layer's expert given this one's (nats)", "conditional_entropy", 4),
    ("mutual information of adjacent layers, normalised", "normalized_mutual_information", 4),
    ("the same for shuffled tokens", "null_normalized_mutual_information", 4),
)
_LOSSES = (("training loss", TRAIN_LOSS, 4), ("validation loss", VALIDATION_LOSS, 4))
_MORE_ROWS = (
    ("max violation of the load, of a step", "max_violation", 3),
    ("max violation of the load, of a micro-batch", "max_violation_micro_batch", 3),
    ("experts without a token", "dead_experts", 3),
    ("effective experts, share", "effective_experts", 3),
    ("router rows, mean abs(cos)", "router_mean_abs_cos", 4),
    ("router rows, largest abs(cos)", "router_max_abs_cos", 4),
)
_TITLES = {name: title for title, name, _ in (*_LOSSES, *ROWS, *_MORE_ROWS)}


def title_of(name: str) -> str:
    """What the reader sees for a series."""
    return _TITLES.get(name, name.replace("_", " "))


def summary(run: Run, baseline: Optional[Run]) -> list[tuple[str, ...]]:
    """Rows of final values, with the baseline's and the change where there is one."""
    values, before = _finals(run), _finals(baseline) if baseline is not None else {}
    rows = []
    losses = [(title_of(name), name, 4) for name in AUXILIARY if name not in _TITLES]
    for title, name, digits in (*_LOSSES, *ROWS, *losses, *_MORE_ROWS):
        value, old = values.get(name), before.get(name)
        if value is None:
            continue
        cells = [f"{value:.{digits}f}"]
        if baseline is not None:
            change = f"{(value - old) / abs(old):+.1%}" if old else ""
            cells = ["" if old is None else f"{old:.{digits}f}", *cells, change]
        rows.append((title, *cells))
    return rows


def _finals(run: Run) -> dict[str, Optional[float]]:
    """Of each series, the mean over its last iterations: others may go on for longer. Of validation, the last value."""
    finals = {name: final(values, values[-1][0], run.window) for name, values in run.series.items() if values}
    if values := run.series.get(VALIDATION_LOSS):
        finals[VALIDATION_LOSS] = values[-1][1]
    return finals
