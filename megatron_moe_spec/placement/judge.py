"""Fits placements to one half of a trace; judges them, and what engines could fetch ahead, by the other, in words."""

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Optional

from scipy.stats import ttest_rel

from megatron_moe_spec.placement.eplb import rebalance_experts
from megatron_moe_spec.placement.halves import sample, tokens
from megatron_moe_spec.placement.measures import Measures, measure
from megatron_moe_spec.placement.objectives import OBJECTIVES
from megatron_moe_spec.placement.placement import Cluster, Placement, contiguous, random
from megatron_moe_spec.placement.prefetch import cache_hits, popularity_scores, predicted_hits, transition_scores
from megatron_moe_spec.traces.counts import loads, shuffled
from megatron_moe_spec.traces.schema import Trace

_FITTED_TOKENS = 2**14  # of a predictor
MEASURED_TOKENS = 2**16  # of placements
JUDGED_TOKENS = 5_000  # of predictors and caches

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


def judge(
    fitted: Trace, few: Trace, judged: Trace, cluster: Cluster, objective: str, num_groups: int
) -> dict[str, tuple[Placement, Measures]]:
    """Placements by their names, the objective's last, and how they serve the tokens judged.

    EPLB gets the loads of ``fitted`` and ``num_groups``; the objective, a name in ``OBJECTIVES``, is fitted to ``few``.
    """
    chosen = OBJECTIVES[objective]
    slots_MS = rebalance_experts(loads(fitted), cluster.num_slots, num_groups, cluster.num_nodes, cluster.num_devices)
    placements = {
        "contiguous": contiguous(cluster, fitted.layers),
        "random": random(cluster, fitted.layers),
        "EPLB": Placement(slots_MS, fitted.layers, cluster),
        f"{objective}, {chosen.without}": chosen.place(chosen.control(few), cluster),
        objective: chosen.place(few, cluster),
    }
    return {name: (placement, measure(placement, judged)) for name, placement in placements.items()}


def judge_prefetch(fitted: Trace, judged: Trace, num_predicted: int, num_slots: int) -> dict[str, list[float]]:
    """Hit rates in the trace, and in one of shuffled tokens; of predictions also those of the hottest experts.

    Of ``num_predicted`` experts for each token in the next layer, and of a cache of ``num_slots`` in each layer.
    """
    rates = {}
    if len(fitted.layers) > 1:
        few, some = sample(fitted, _FITTED_TOKENS), sample(judged, JUDGED_TOKENS)
        predictors = transition_scores(few), transition_scores(shuffled(few)), popularity_scores(fitted)
        rates[f"{num_predicted} predicted"] = [predicted_hits(scores, some, num_predicted) for scores in predictors]
    first = tokens(judged, slice(0, JUDGED_TOKENS))
    caches = zip(cache_hits(first, num_slots), cache_hits(shuffled(first), num_slots))
    return rates | {f"{num_slots} cached, {policy}": list(pair) for policy, pair in zip(("LRU", "LFU"), caches)}


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
