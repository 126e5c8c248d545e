"""Measures of routing and overlap against loops written from their definitions."""

from math import exp, log

import pytest
import torch

from megatron_moe_spec.metrics import conditional_entropy, entropy, normalized_mutual_information
from megatron_moe_spec.metrics.accumulators import LayerStatistics, PairStatistics, RouterStatistics


def _entropy(weights):
    total = float(sum(weights))
    return -sum(w / total * log(w / total) for w in map(float, weights) if w > 0)


def test_entropy_of_known_distributions():
    assert float(entropy(torch.ones(8))) == pytest.approx(log(8))
    assert float(entropy(torch.tensor([5.0, 0.0]))) == 0.0
    assert float(entropy(torch.zeros(3))) == 0.0
    assert entropy(torch.tensor([[1.0, 1.0], [3.0, 1.0]])).tolist() == pytest.approx([log(2), _entropy([3, 1])])


def test_mutual_information_against_its_definition():
    joint = torch.rand(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows, columns = joint.sum(1).tolist(), joint.sum(0).tolist()
    total = float(joint.sum())
    information = sum(
        float(joint[i, j]) / total * log(float(joint[i, j]) * total / (rows[i] * columns[j]))
        for i in range(4)
        for j in range(5)
    )
    expected = 2 * information / (_entropy(rows) + _entropy(columns))
    assert float(normalized_mutual_information(joint)) == pytest.approx(expected)
    expected = _entropy(joint.flatten().tolist()) - _entropy(rows)
    assert float(conditional_entropy(joint)) == pytest.approx(expected)


def test_mutual_information_at_its_ends():
    assert float(normalized_mutual_information(torch.eye(4))) == pytest.approx(1.0)
    assert float(normalized_mutual_information(torch.ones(4, 4))) == pytest.approx(0.0, abs=1e-6)
    assert float(normalized_mutual_information(torch.tensor([[3.0]]))) == 0.0
    assert float(conditional_entropy(torch.eye(4))) == pytest.approx(0.0, abs=1e-6)
    assert float(conditional_entropy(torch.ones(4, 4))) == pytest.approx(log(4))


def _routing(num_tokens, num_experts, top_k, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, num_experts, generator=generator).softmax(-1)
    live = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(top_k).indices, True)
    return scores, live


def test_layer_statistics_add_up_over_micro_batches():
    whole = LayerStatistics(1, 6, 2, torch.device("cpu"))
    parts = LayerStatistics(1, 6, 2, torch.device("cpu"))
    scores, live = _routing(10, 6, 2, seed=0)
    cosines = torch.rand(10, 2, 2) * 2 - 1
    cosines = (cosines + cosines.transpose(1, 2)) / 2
    cosines.diagonal(dim1=1, dim2=2).zero_()
    valid = torch.ones(10, 2, dtype=torch.bool)
    whole.add_routing(0, scores, live, 10)
    whole.add_cosines(0, cosines, valid)
    for part in (slice(0, 3), slice(3, 10)):
        parts.add_routing(0, scores[part], live[part], part.stop - part.start)
        parts.add_cosines(0, cosines[part], valid[part])
    (found,), (in_parts,) = whole.summaries(), parts.summaries()
    load = live.sum(0).tolist()
    assert found.pop("load") == in_parts.pop("load") == load
    masses = [sorted((scores * live)[token].tolist(), reverse=True)[:2] for token in range(10)]
    best = [sum(one for one, _ in masses) / 10, sum(map(sum, masses)) / 10]
    assert found.pop("mass_of_best") == in_parts.pop("mass_of_best") == pytest.approx(best, rel=1e-5)
    # Nothing was said of micro-batches.
    assert found.pop("max_violation_micro_batch") is in_parts.pop("max_violation_micro_batch") is None
    assert in_parts == pytest.approx(found)
    assert found == pytest.approx(
        {
            "routing_entropy": sum(_entropy(row) for row in scores.tolist()) / 10,
            "marginal_entropy": _entropy(scores.sum(0).tolist()),
            "topk_mass": float((scores * live).sum() / 10),
            "mean_abs_cos": float(cosines[:, 0, 1].abs().mean()),
            "max_abs_cos": float(cosines.abs().max()),
            "load_imbalance": max(load) / (sum(load) / 6),
            "max_violation": max(load) / (sum(load) / 6) - 1,
            "dead_experts": load.count(0) / 6,
            "effective_experts": exp(_entropy(load)) / 6,
        },
        rel=1e-5,
    )


def test_missing_experts_do_not_dilute_the_mean_cosine():
    statistics = LayerStatistics(1, 4, 2, torch.device("cpu"))
    statistics.add_routing(0, *_routing(2, 4, 2, seed=0), 2)
    cosines = torch.tensor([[[0.0, 0.5], [0.5, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    statistics.add_cosines(0, cosines, torch.tensor([[True, True], [True, False]]))
    assert statistics.summaries()[0]["mean_abs_cos"] == pytest.approx(0.5)


def test_violations_of_micro_batches_are_averaged():
    statistics = LayerStatistics(3, 4, 1, torch.device("cpu"))
    # Each shared by two ranks; the second one without tokens. The layer between has none.
    loads = torch.tensor([[[4, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 0, 0]]])
    for _ in range(2):
        statistics.add_violations([0, 2], torch.cat([loads, loads.flip(1).clamp_max(1)]), share=0.5)
    found = [row["max_violation_micro_batch"] for row in statistics.summaries()]
    assert found == [pytest.approx((3 + 0 + 1) / 3), None, pytest.approx((1 + 0 + 3) / 3)]


def test_an_expert_without_tokens_is_dead():
    statistics = LayerStatistics(1, 4, 1, torch.device("cpu"))
    active = torch.tensor([[True, False, False, False], [False, True, False, False]])
    statistics.add_routing(0, active.float(), active, 2)
    (found,) = statistics.summaries()
    assert found["dead_experts"] == 0.5 and found["effective_experts"] == pytest.approx(0.5)
    assert found["max_violation"] == pytest.approx(1.0) and found["load"] == [1, 1, 0, 0]
    nothing = LayerStatistics(1, 4, 1, torch.device("cpu")).summaries()[0]
    assert nothing.pop("load") == [0, 0, 0, 0] and set(nothing.values()) == {None}


def test_geometry_of_routers():
    weight, other = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    other[1, 2] = torch.nan
    statistics = RouterStatistics(4, 5, torch.device("cpu"))
    for _ in range(3):  # ranks that hold it
        for layer, held in ((2, weight), (0, other), (3, weight * 2.0)):
            statistics.add(layer, held)
        statistics.add_up()
    unknown, absent, found, longer = statistics.summaries()
    assert set(absent.values()) == set(unknown.values()) == {None}
    assert longer["router_mean_abs_cos"] == found["router_mean_abs_cos"]
    assert longer["router_singular_values"] == pytest.approx(
        [2.0 * x for x in found["router_singular_values"]], rel=1e-5
    )
    cosines = [
        abs(float(torch.cosine_similarity(weight[i], weight[j], dim=0))) for i in range(5) for j in range(5) if i != j
    ]
    assert found["router_mean_abs_cos"] == pytest.approx(sum(cosines) / 20, rel=1e-5)
    assert found["router_max_abs_cos"] == pytest.approx(max(cosines), rel=1e-5)
    assert found["router_singular_values"] == pytest.approx(torch.linalg.svdvals(weight).tolist(), rel=1e-4)


def test_layers_and_pairs_are_apart():
    """Each has the measures that it has alone; one without tokens has none."""
    alone = [LayerStatistics(1, 6, 2, torch.device("cpu")) for _ in range(3)]
    together = LayerStatistics(3, 6, 2, torch.device("cpu"))
    pair_alone, pairs = PairStatistics(1, 6, torch.device("cpu")), PairStatistics(2, 6, torch.device("cpu"))
    routing = [_routing(10, 6, 2, seed) for seed in range(2)]
    cosines = torch.rand(2, 10, 2, 2, generator=torch.Generator().manual_seed(0))
    for layer, (scores, live) in zip((0, 2), routing):
        for statistics, place in ((alone[layer], 0), (together, layer)):
            statistics.add_routing(place, scores, live, 10)
            statistics.add_cosines(place, cosines[layer // 2], torch.ones(10, 2, dtype=torch.bool))
    for statistics, place in ((pair_alone, 0), (pairs, 1)):
        statistics.add(place, routing[0][1], routing[1][1])
    assert together.summaries() == [statistics.summaries()[0] for statistics in alone]
    first, nothing, last = together.summaries()
    assert first["mean_abs_cos"] != last["mean_abs_cos"] and nothing["mean_abs_cos"] is None
    assert pairs.summaries(pairs.measures()) == [{}, *pair_alone.summaries(pair_alone.measures())]
    assert "conditional_entropy" in pairs.summaries(pairs.measures())[1]


def test_pair_statistics_find_a_pathway_and_its_null_does_not():
    _, live = _routing(4000, 8, 1, seed=1)
    pathway = live[:, torch.randperm(8, generator=torch.Generator().manual_seed(2))]
    statistics = PairStatistics(1, 8, torch.device("cpu"))
    statistics.add(0, live, pathway)
    (found,) = statistics.summaries(statistics.measures())
    assert found["normalized_mutual_information"] == pytest.approx(1.0)
    assert found["conditional_entropy"] == pytest.approx(0.0, abs=1e-9)
    assert 0.0 < found["null_normalized_mutual_information"] < 0.02


def test_independent_layers_look_like_their_null():
    _, live = _routing(4000, 8, 2, seed=3)
    _, other = _routing(4000, 8, 2, seed=4)
    statistics = PairStatistics(1, 8, torch.device("cpu"))
    statistics.add(0, live, other)
    (found,) = statistics.summaries(statistics.measures())
    null = found["null_normalized_mutual_information"]
    assert found["normalized_mutual_information"] == pytest.approx(null, abs=3e-3)
