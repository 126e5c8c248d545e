"""Fits placements to one half of a trace; judges them, and what engines could fetch ahead, by the other."""

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
