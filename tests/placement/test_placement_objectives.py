"""Placements fitted to traces: they find what is there, and nothing where nothing is."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from traces import random_trace

from megatron_moe_spec.placement.eplb import rebalance_experts
from megatron_moe_spec.placement.halves import halves
from megatron_moe_spec.placement.measures import measure
from megatron_moe_spec.placement.objectives import OBJECTIVES, assign, assign_pairs, pairs_by_chance
from megatron_moe_spec.placement.placement import Cluster, Placement, contiguous, random
from megatron_moe_spec.traces.counts import coactivation, loads, recombined, shuffled

pytestmark = pytest.mark.once

_CLUSTER = Cluster(32, 4)


def _structured(num_tokens=6000, num_layers=4, seed=0):
    """Each token has one of 8 subjects, and likes the 4 experts of its subject in each layer."""
    generator = torch.Generator().manual_seed(seed)
    trace = random_trace(num_tokens, num_layers, 32, 4, seed=seed)
    subject_T = torch.randint(8, (num_tokens,), generator=generator)
    layers = []
    for _ in range(num_layers):
        subject_E = torch.randperm(32, generator=generator) % 8
        liking_TE = torch.randn(32, generator=generator) / 2 + 3 * (subject_E == subject_T[:, None])
        scores_TE = liking_TE + torch.randn(num_tokens, 32, generator=generator)
        layers.append(scores_TE.topk(4).indices.sort(dim=1).values.short())
    return replace(trace, experts_TMK=torch.stack(layers, dim=1))


def _mean(placement, trace, name):
    return float(getattr(measure(placement, trace), name).mean())


@pytest.mark.parametrize("seed", range(3))
def test_assign_is_the_best_of_all(seed):
    gain_ED = np.random.default_rng(seed).normal(size=(6, 3))
    logical_S, device_S = assign(gain_ED, np.ones(6, dtype=np.int64))
    best = max(sum(gain_ED[e, slot // 2] for slot, e in enumerate(order)) for order in permutations(range(6)))
    assert gain_ED[logical_S, device_S].sum() == pytest.approx(best)


def test_assign_pairs_finds_the_best_of_all():
    cost_SS = np.random.default_rng(0).normal(size=(8, 8))
    cost_SS += cost_SS.T
    device_S = assign_pairs(cost_SS, np.arange(8), 4)

    def cost(device_S):
        return sum(cost_SS[s, t] for s in range(8) for t in range(s) if device_S[s] == device_S[t])

    places = np.repeat(np.arange(4), 2)
    assert cost(device_S) == pytest.approx(min(cost(places[list(order)]) for order in permutations(range(8))))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("redundant", [0, 4, 40])
def test_every_expert_is_placed_and_no_device_has_one_twice(objective, redundant):
    trace = random_trace(400, 3, 16, 2, seed=1, dropped=0.1)
    cluster = Cluster(16, 4, num_nodes=2, num_redundant=redundant)
    placement = OBJECTIVES[objective].place(trace, cluster)
    assert (placement.replicas() > 0).all()
    for slots_DS in placement.logical_MS.unflatten(1, (4, -1)):
        for on_device in slots_DS.tolist():
            assert len(set(on_device)) == len(on_device)


def test_replicas_are_of_the_hottest_experts():
    trace = random_trace(1000, 2, 16, 2, seed=1)
    placement = OBJECTIVES["load"].place(trace, Cluster(16, 4, num_redundant=4))
    for load_E, replicas_E in zip(loads(trace), placement.replicas()):
        assert load_E[replicas_E > 1].min() > load_E[replicas_E == 1].median()


def test_load_parts_experts_that_are_hot_at_the_same_time():
    """Half of the experts serve every other batch of 20 tokens, the others the rest: totals are even."""
    generator = torch.Generator().manual_seed(0)
    batch_T = torch.arange(2560, dtype=torch.int32) // 20
    serves_E = torch.randperm(16, generator=generator) % 2
    scores_TE = torch.rand(2560, 16, generator=generator) + (serves_E == batch_T[:, None] % 2)
    trace = random_trace(2560, 1, 16, 1, seed=0)
    trace = replace(trace, experts_TMK=scores_TE.topk(1).indices.short()[:, None], batch_T=batch_T)
    fitted, judged = halves(trace)
    cluster = Cluster(16, 8)
    ours = _mean(OBJECTIVES["load"].place(fitted, cluster), judged, "batch_load")
    eplb = Placement(rebalance_experts(loads(fitted), 16, 1, 1, 8), trace.layers, cluster)
    assert ours < 0.9 * _mean(eplb, judged, "batch_load")
    assert ours < 0.9 * _mean(OBJECTIVES["load"].place(shuffled(fitted), cluster), judged, "batch_load")


def test_fanout_finds_experts_of_the_same_tokens():
    fitted, judged = halves(_structured())
    ours = _mean(OBJECTIVES["fanout"].place(fitted, _CLUSTER), judged, "devices")
    assert ours < 0.8 * _mean(contiguous(_CLUSTER, fitted.layers), judged, "devices")
    assert ours < 0.8 * _mean(random(_CLUSTER, fitted.layers), judged, "devices")
    assert ours < 0.8 * _mean(OBJECTIVES["fanout"].place(recombined(fitted), _CLUSTER), judged, "devices")


def test_fanout_brings_devices_of_the_same_tokens_to_one_node():
    fitted, judged = halves(_structured())
    cluster = Cluster(32, 16, num_nodes=2)  # subjects have four experts, devices two
    placement = OBJECTIVES["fanout"].place(fitted, cluster)
    nodes = []
    for seed in range(10):
        order_D = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
        logical_MS = placement.logical_MS.unflatten(1, (16, 2))[:, order_D].flatten(1)
        mixed = Placement(logical_MS, placement.layers, cluster)
        assert _mean(mixed, judged, "devices") == pytest.approx(_mean(placement, judged, "devices"))
        nodes.append(_mean(mixed, judged, "nodes"))
    assert _mean(placement, judged, "nodes") < min(nodes)
    assert _mean(placement, judged, "nodes") < 0.9 * sum(nodes) / len(nodes)


@pytest.mark.parametrize("redundant", [0, 4])
def test_pathway_finds_experts_that_follow_each_other(redundant):
    fitted, judged = halves(_structured())
    cluster = Cluster(32, 4, num_redundant=redundant)
    ours = _mean(OBJECTIVES["pathway"].place(fitted, cluster), judged, "hops")
    assert ours > 1.4 * _mean(contiguous(cluster, fitted.layers), judged, "hops")
    assert ours > 1.4 * _mean(random(cluster, fitted.layers), judged, "hops")
    assert ours > 1.4 * _mean(OBJECTIVES["pathway"].place(shuffled(fitted), cluster), judged, "hops")


@pytest.mark.parametrize("objective, name", [("fanout", "devices"), ("pathway", "hops")])
def test_nothing_is_gained_where_there_is_no_structure(objective, name):
    """Tokens choose independently, with a liking for some experts: within the scatter of random placements."""
    fitted, judged = halves(random_trace(6000, 4, 32, 4, seed=5))
    ours = _mean(OBJECTIVES[objective].place(fitted, _CLUSTER), judged, name)
    others = torch.tensor([_mean(random(_CLUSTER, fitted.layers, seed), judged, name) for seed in range(20)])
    gain = others.mean() - ours if name == "devices" else ours - others.mean()
    assert gain < 2 * others.std()


def test_pairs_by_chance_have_the_sums_of_the_counts():
    trace = random_trace(500, 1, 12, 3, seed=0)
    counts_EE = coactivation(trace.experts_TMK[:, 0], 12).double()
    chance_EE = pairs_by_chance(counts_EE).fill_diagonal_(0)
    torch.testing.assert_close(chance_EE.sum(dim=1), counts_EE.sum(dim=1))
    assert (pairs_by_chance(torch.zeros(3, 3, dtype=torch.float64)) == 0).all()


def test_what_an_objective_lacks_is_said():
    trace = random_trace(40, 1, 4, 1, seed=0)
    for objective in ("fanout", "pathway"):
        with pytest.raises(ValueError, match=f"--objective {objective}"):
            OBJECTIVES[objective].place(trace, Cluster(4, 2))
