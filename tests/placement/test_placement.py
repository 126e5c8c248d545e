"""Slots, halves of a trace, and the measures, by loops over tokens written from their definitions."""

import pytest
import torch
from traces import random_trace

from megatron_moe_spec.placement.halves import halves, sample, some_batches, tokens
from megatron_moe_spec.placement.measures import measure
from megatron_moe_spec.placement.placement import Cluster, Placement, contiguous, random
from megatron_moe_spec.placement.prefetch import cache_hits, popularity_scores, predicted_hits, transition_scores
from megatron_moe_spec.traces.counts import loads, shuffled

pytestmark = pytest.mark.once


def _trace(seed, num_batches=3, **settings):
    sizes = {"num_tokens": 60, "num_layers": 3, "num_experts": 8, "top_k": 3, **settings}
    return random_trace(seed=seed, num_batches=num_batches, sequences_per_batch=2, **sizes)


def test_sizes_that_do_not_divide_name_flags_that_do():
    with pytest.raises(ValueError, match="--nodes 3 does not divide --devices 8: use --nodes 2 or 4"):
        Cluster(16, 8, num_nodes=3)
    with pytest.raises(ValueError, match="--devices 8 .* 19 slots of 16 .* use --redundant 0 or --redundant 8, or"):
        Cluster(16, 8, num_redundant=3)
    with pytest.raises(ValueError, match="--devices 24 .* use --redundant 8, or --devices 16"):
        Cluster(16, 24)
    with pytest.raises(ValueError, match="--redundant 18: use 16 at most"):
        Cluster(16, 2, num_redundant=18)
    assert Cluster(16, 8, 2, 8).slots_per_device == 3


def test_replicas_and_their_devices():
    placement = Placement(
        torch.tensor([[0, 1, 0, 2, 2, 0], [2, 1, 0, 0, 1, 2]]), (4, 7), Cluster(3, 3, num_redundant=3)
    )
    assert placement.replicas().tolist() == [[3, 1, 2], [2, 2, 2]]
    assert placement.devices().tolist() == [
        [[0, 1, 2], [0, -1, -1], [1, 2, -1]],
        [[1, 1, -1], [0, 2, -1], [0, 2, -1]],
    ]


def test_contiguous_and_random_hold_the_same_experts():
    cluster = Cluster(6, 3, num_redundant=3)
    ordered, mixed = contiguous(cluster, (0, 1)), random(cluster, (0, 1))
    assert ordered.logical_MS.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2]] * 2
    assert torch.equal(ordered.replicas(), mixed.replicas())
    assert not torch.equal(mixed.logical_MS[0], mixed.logical_MS[1])


def test_halves_are_cut_between_sequences():
    trace = _trace(0)
    borders = [t for t in range(1, 60) if trace.sequence_T[t] != trace.sequence_T[t - 1]]
    first, second = halves(trace)
    assert len(first.sequence_T) == min(borders, key=lambda border: abs(border - 30))
    assert torch.equal(torch.cat([first.experts_TMK, second.experts_TMK]), trace.experts_TMK)
    assert torch.equal(torch.cat([first.batch_T, second.batch_T]), trace.batch_T)


def test_one_sequence_is_cut_in_the_middle():
    trace = random_trace(11, 2, 4, 2, seed=0)
    assert [len(half.sequence_T) for half in halves(trace)] == [5, 6]
    with pytest.raises(ValueError, match="one token"):
        halves(tokens(trace, slice(0, 1)))


def test_a_sample_is_spread_over_the_tokens():
    trace = random_trace(11, 2, 4, 2, seed=0)
    assert torch.equal(sample(trace, 4).experts_TMK, trace.experts_TMK[::3])
    assert torch.equal(sample(trace, 11).experts_TMK, trace.experts_TMK)


def _device(placement, layer, expert, token):
    slots = [slot for slot, one in enumerate(placement.logical_MS[layer].tolist()) if one == expert]
    return slots[token % len(slots)] // placement.cluster.slots_per_device


@pytest.mark.parametrize("dropped", [0.0, 0.3])
@pytest.mark.parametrize("redundant", [0, 4])
def test_measures_equal_loops_over_tokens(redundant, dropped, monkeypatch):
    monkeypatch.setattr("megatron_moe_spec.placement.measures._PART", 7)
    trace = _trace(1, dropped=dropped)
    placement = random(Cluster(8, 4, num_nodes=2, num_redundant=redundant), trace.layers)
    measured = measure(placement, trace)
    num_tokens, num_layers, _ = trace.experts_TMK.shape
    places = [
        [[_device(placement, m, e, t) for e in trace.experts_TMK[t, m].tolist() if e >= 0] for m in range(num_layers)]
        for t in range(num_tokens)
    ]
    for m in range(num_layers):
        batches = {}
        for t in range(num_tokens):
            for device in places[t][m]:
                batches.setdefault(int(trace.batch_T[t]), [0] * 4)[device] += 1
        total = [sum(column) for column in zip(*batches.values())]
        assert measured.load[m] == pytest.approx(max(total) / (sum(total) / 4))
        each = [max(one) / (sum(one) / 4) for one in batches.values()]
        assert measured.batch_load[m] == pytest.approx(sum(each) / len(each))
        touched = [set(places[t][m]) for t in range(num_tokens)]
        assert measured.devices[m] == pytest.approx(sum(map(len, touched)) / num_tokens)
        nodes = [len({device // 2 for device in one}) for one in touched]
        assert measured.nodes[m] == pytest.approx(sum(nodes) / num_tokens)
        sent = [2 * len(one - {int(trace.sequence_T[t]) % 4}) for t, one in enumerate(touched)]
        assert measured.rows[m] == pytest.approx(sum(sent) / num_tokens)
        if m + 1 < num_layers:
            pairs = [(a, b) for t in range(num_tokens) for a in places[t][m] for b in places[t][m + 1]]
            assert measured.hops[m] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    assert len(measured.hops) == num_layers - 1


@pytest.mark.parametrize("dropped", [0.0, 0.05])
def test_predictions_equal_loops_over_tokens(dropped):
    trace = _trace(2, num_tokens=300, dropped=dropped)
    assert (trace.experts_TMK >= 0).any(dim=2).all()  # else a prediction is as good as any other
    fitted, judged = halves(trace)
    experts = range(fitted.num_experts)
    hits = popular = total = 0
    for m in range(2):
        counts = [[0] * len(experts) for _ in experts]
        for here, following in fitted.experts_TMK[:, m : m + 2].tolist():
            for e in here:
                for f in following:
                    if e >= 0 and f >= 0:
                        counts[e][f] += 1
        served = loads(fitted)[m + 1].tolist()
        hottest = sorted(experts, key=lambda f: -served[f])[:3]
        for here, following in judged.experts_TMK[:, m : m + 2].tolist():
            wanted = {f for f in following if f >= 0}
            scores = [sum(counts[e][f] / sum(counts[e]) for e in here if e >= 0) for f in experts]
            hits += len(wanted & set(sorted(experts, key=lambda f: -scores[f])[:3]))
            popular += len(wanted & set(hottest))
            total += len(wanted)
    assert predicted_hits(transition_scores(fitted), judged, 3) == pytest.approx(hits / total)
    assert predicted_hits(popularity_scores(fitted), judged, 3) == pytest.approx(popular / total)


def _cache_hits(experts, num_slots, by_frequency):
    cache, uses, last, hits, clock = set(), {}, {}, 0, 0
    for token in experts:
        token = [expert for expert in token if expert >= 0]
        hits += len(cache & set(token))
        cache |= set(token)
        while len(cache) > num_slots:
            leaving = min(cache - set(token), key=lambda e: (uses[e] if by_frequency else 0, last[e]))
            cache.remove(leaving)
        for expert in token:
            clock += 1
            uses[expert], last[expert] = uses.get(expert, 0) + 1, clock
    return hits


@pytest.mark.parametrize("dropped", [0.0, 0.3])
@pytest.mark.parametrize("num_slots", [3, 5, 8])
def test_cache_hits_equal_loops_over_tokens(num_slots, dropped):
    trace = _trace(3, num_tokens=200, dropped=dropped)
    layers = trace.experts_TMK.transpose(0, 1).tolist()
    total = int((trace.experts_TMK >= 0).sum())
    lru, lfu = cache_hits(trace, num_slots)
    assert lru == pytest.approx(sum(_cache_hits(layer, num_slots, by_frequency=False) for layer in layers) / total)
    assert lfu == pytest.approx(sum(_cache_hits(layer, num_slots, by_frequency=True) for layer in layers) / total)


def test_shuffled_tokens_predict_no_better_than_popularity():
    trace = _trace(4, num_tokens=4000, num_experts=16, top_k=1)
    trace.experts_TMK[:, 1] = trace.experts_TMK[:, 0]
    fitted, judged = halves(trace)
    by_experts = predicted_hits(transition_scores(fitted), judged, 2)
    mixed = predicted_hits(transition_scores(shuffled(fitted)), judged, 2)
    hottest = predicted_hits(popularity_scores(fitted), judged, 2)
    assert by_experts > hottest + 0.1
    assert abs(mixed - hottest) < 0.03


def test_some_batches_are_whole_and_evenly_spaced():
    trace = random_trace(400, 2, 4, 2, seed=0, num_batches=8, sequences_per_batch=2)
    some = some_batches(trace, 150)
    assert some.batch_T.unique().tolist() == [0, 3, 6]
    kept = (trace.batch_T == 0) | (trace.batch_T == 3) | (trace.batch_T == 6)
    assert torch.equal(some.experts_TMK, trace.experts_TMK[kept])
    assert some_batches(trace, 400) is trace
