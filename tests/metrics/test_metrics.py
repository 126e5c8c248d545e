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
    whole = LayerStatistics(6, 2, torch.device("cpu"))
    parts = LayerStatistics(6, 2, torch.device("cpu"))
    scores, live = _routing(10, 6, 2, seed=0)
    cosines = torch.rand(10, 2, 2) * 2 - 1
    cosines = (cosines + cosines.transpose(1, 2)) / 2
    cosines.diagonal(dim1=1, dim2=2).zero_()
    valid = torch.ones(10, 2, dtype=torch.bool)
    whole.add_routing(scores, live, 10)
    whole.add_cosines(cosines, valid)
    for part in (slice(0, 3), slice(3, 10)):
        parts.add_routing(scores[part], live[part], part.stop - part.start)
        parts.add_cosines(cosines[part], valid[part])
    found, in_parts = whole.summary(), parts.summary()
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
    statistics = LayerStatistics(4, 2, torch.device("cpu"))
    statistics.add_routing(*_routing(2, 4, 2, seed=0), 2)
    cosines = torch.tensor([[[0.0, 0.5], [0.5, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    statistics.add_cosines(cosines, torch.tensor([[True, True], [True, False]]))
    assert statistics.summary()["mean_abs_cos"] == pytest.approx(0.5)


def test_violations_of_micro_batches_are_averaged():
    statistics = LayerStatistics(4, 1, torch.device("cpu"))
    # Each shared by two ranks; the second one without tokens.
    statistics.add_violations(torch.tensor([[4, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 0, 0]]), share=0.5)
    statistics.add_violations(torch.tensor([[4, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 0, 0]]), share=0.5)
    assert statistics.summary()["max_violation_micro_batch"] == pytest.approx((3 + 0 + 1) / 3)


def test_an_expert_without_tokens_is_dead():
    statistics = LayerStatistics(4, 1, torch.device("cpu"))
    active = torch.tensor([[True, False, False, False], [False, True, False, False]])
    statistics.add_routing(active.float(), active, 2)
    found = statistics.summary()
    assert found["dead_experts"] == 0.5 and found["effective_experts"] == pytest.approx(0.5)
    assert found["max_violation"] == pytest.approx(1.0) and found["load"] == [1, 1, 0, 0]
    nothing = LayerStatistics(4, 1, torch.device("cpu")).summary()
    assert nothing.pop("load") == [0, 0, 0, 0] and set(nothing.values()) == {None}


def test_geometry_of_a_router():
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    statistics = RouterStatistics(5, torch.device("cpu"))
    assert set(statistics.summary().values()) == {None}
    for _ in range(3):  # ranks that hold it
        statistics.add(weight)
    found = statistics.summary()
    cosines = [
        abs(float(torch.cosine_similarity(weight[i], weight[j], dim=0))) for i in range(5) for j in range(5) if i != j
    ]
    assert found["router_mean_abs_cos"] == pytest.approx(sum(cosines) / 20, rel=1e-5)
    assert found["router_max_abs_cos"] == pytest.approx(max(cosines), rel=1e-5)
    assert found["router_singular_values"] == pytest.approx(torch.linalg.svdvals(weight).tolist(), rel=1e-4)


def test_pair_statistics_find_a_pathway_and_its_null_does_not():
    _, live = _routing(4000, 8, 1, seed=1)
    pathway = live[:, torch.randperm(8, generator=torch.Generator().manual_seed(2))]
    statistics = PairStatistics(8, 8, torch.device("cpu"))
    statistics.add(live, pathway)
    found = statistics.summary()
    assert found["normalized_mutual_information"] == pytest.approx(1.0)
    assert found["conditional_entropy"] == pytest.approx(0.0, abs=1e-9)
    assert 0.0 < found["null_normalized_mutual_information"] < 0.02


def test_independent_layers_look_like_their_null():
    _, live = _routing(4000, 8, 2, seed=3)
    _, other = _routing(4000, 8, 2, seed=4)
    statistics = PairStatistics(8, 8, torch.device("cpu"))
    statistics.add(live, other)
    found = statistics.summary()
    null = found["null_normalized_mutual_information"]
    assert found["normalized_mutual_information"] == pytest.approx(null, abs=3e-3)
