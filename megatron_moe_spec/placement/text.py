"""The judgement in plain text."""

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Optional

from scipy.stats import ttest_rel

from megatron_moe_spec.placement.measures import Measures
from megatron_moe_spec.placement.objectives import OBJECTIVES

# Headings of the measures, and what they are.
_COLUMNS = {
    "load": ("load", "of the device that bears most, over the mean of devices"),
    "batch_load": ("batch load", "the same in each batch, the mean of batches"),
    "devices": ("devices", "that a token goes to in a layer"),
    "nodes": ("nodes", "that a token goes to in a layer"),
    "rows": ("rows sent", "by a token in a layer to devices other than its own, and back"),
    "hops": ("hops", "of a token's pairs of an expert and one in the next layer, the share on one device"),
}
_MORE_IS_BETTER = ("hops",)
_SMALL = 0.005  # relative; smaller differences decide nothing


def measures_table(measures: Mapping[str, Measures], num_nodes: int, hidden_size: Optional[int]) -> str:
    """A row for each placement, with means over layers; rows sent as KiB of bf16 where ``hidden_size`` is known."""
    columns, legend = [], ["*: the best"]
    for name, (heading, meaning) in _COLUMNS.items():
        values = [getattr(one, name) for one in measures.values()]
        if (name == "nodes" and num_nodes == 1) or not len(values[0]):
            continue
        means = [float(value.mean()) for value in values]
        if name == "rows" and hidden_size:
            heading, means = "KiB sent", [mean * hidden_size * 2 / 1024 for mean in means]
        best = (max if name in _MORE_IS_BETTER else min)(means)
        columns.append([heading, *(f"{mean:.4g}{'*' if mean == best else ' '}" for mean in means)])
        legend.append(f"{heading}: {meaning}")
    rows = zip(["placement", *measures], *columns)
    return "\n".join([_aligned(list(rows)), *legend])


def rates_table(rates: Mapping[str, Sequence[float]]) -> str:
    """A row for each hit rate: of the trace, of shuffled tokens, of the hottest experts."""
    rows = [["hit rate of experts", "this trace", "tokens shuffled", "the hottest"]]
    for name, values in rates.items():
        rows.append([name, *(f"{value:.1%}" for value in values), *["-"] * (3 - len(values))])
    return _aligned(rows)


def verdict(measures: Mapping[str, Measures], objective: str) -> str:
    """Whether the placement beats the others, whether the trace has what it lives on, and which engines gain."""
    chosen = OBJECTIVES[objective]
    values = {name: getattr(one, chosen.judged_by).double() for name, one in measures.items()}
    ours_M, control_M = values[objective], values[f"{objective}, {chosen.without}"]
    ours, sign = float(ours_M.mean()), 1 if chosen.judged_by in _MORE_IS_BETTER else -1
    changes = {name: ours / float(values[name].mean()) - 1 for name in ("contiguous", "random", "EPLB")}
    beaten = [name for name in ("contiguous", "EPLB") if sign * changes[name] > _SMALL]
    compared = [f"{abs(by):.1%} {'more' if by > 0 else 'less'} than {name}" for name, by in changes.items()]
    first = (
        f"{objective} beats {' and '.join(beaten) or 'neither contiguous nor EPLB'} on the tokens judged: "
        f"{_COLUMNS[chosen.judged_by][0]} {ours:.4g}, {', '.join(compared)}."
    )
    control = f"Fitted to the same loads with {chosen.without}, it is {float(control_M.mean()):.4g}: "
    better = "greater" if sign > 0 else "less"
    # Of one layer there is no test: the difference alone decides.
    is_chance = len(ours_M) > 1 and ttest_rel(ours_M, control_M, alternative=better).pvalue > 0.05
    if sign * (ours - float(control_M.mean())) <= 0 or is_chance:
        control += "as good, so the trace has no structure beyond loads that this objective could use."
    else:
        control += "the trace has structure beyond loads, and the placement uses it."
    return "\n".join(fill(paragraph, 120) for paragraph in (first, control, chosen.engines))


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    first, *others = widths
    return "\n".join(
        "  ".join([row[0].ljust(first), *(text.rjust(width) for text, width in zip(row[1:], others))]).rstrip()
        for row in rows
    )
