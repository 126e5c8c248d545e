"""Coupling against a float64 loop written from the definition, and the properties that are promised.

Suffixes: T tokens, k experts of a token, F activation width, E experts of a layer, H hidden size.
"""

import pytest
import torch
from gradients import value_and_gradient

from megatron_moe_spec.losses import (
    coupling_loss,
)


def top_k_indices(row, top_k) -> list[int]:
    return sorted(range(len(row)), key=lambda e: -row[e])[:top_k]


def mass_by_loops(scores_TE, next_TE, map_TE, map_next_TE) -> float:
    joint = 0.0
    for t in range(len(scores_TE)):
        mass = sum(float(s) for s, live in zip(scores_TE[t], map_TE[t]) if live)
        mass_next = sum(float(s) for s, live in zip(next_TE[t], map_next_TE[t]) if live)
        joint += mass * mass_next
    return 1.0 - joint / len(scores_TE)


def pathway_by_loops(scores_TE, next_TE, top_k) -> float:
    scores, following = scores_TE.tolist(), next_TE.tolist()
    kept = 0.0
    for e in range(len(scores[0])):
        row = [sum(s[e] * n[v] for s, n in zip(scores, following)) / len(scores) for v in range(len(following[0]))]
        kept += sum(row[v] for v in top_k_indices(row, top_k))
    return 1.0 - kept


def layer_pair(random, num_tokens=9, num_experts=6):
    """Scores of two layers, and maps with 0 to E live experts a token."""
    scores = torch.softmax(random(2, num_tokens, num_experts), dim=-1)
    maps = random(2, num_tokens, num_experts) > 0.2
    maps[0, 0] = maps[1, 1] = False
    maps[:, 2] = True
    return scores[0], scores[1], maps[0], maps[1]


def test_mass_equals_its_definition(random):
    scores, following, live, live_next = layer_pair(random)
    value = coupling_loss(scores, following, live, live_next)
    assert value.dtype == torch.float64 and 0.0 < float(value) < 1.0
    assert float(value) == pytest.approx(mass_by_loops(scores, following, live, live_next), rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda s, n: coupling_loss(s, n, live, live_next), (scores.requires_grad_(), following.requires_grad_())
    )


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_mass_without_maps_takes_the_highest_scores(random, top_k):
    scores, following, *_ = layer_pair(random)
    highest = [[[e in top_k_indices(row, top_k) for e in range(6)] for row in x.tolist()] for x in (scores, following)]
    expected = mass_by_loops(scores, following, *highest)
    assert float(coupling_loss(scores, following, top_k=top_k)) == pytest.approx(expected, rel=1e-12)
    one_map = coupling_loss(scores, following, routing_map=torch.tensor(highest[0]), top_k=top_k)
    assert float(one_map) == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda s, n: coupling_loss(s, n, top_k=top_k), (scores.requires_grad_(), following.requires_grad_())
    )


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_pathway_equals_its_definition(random, top_k):
    scores, following, *_ = layer_pair(random)
    value = coupling_loss(scores, following, kind="pathway", top_k=top_k)
    assert value.dtype == torch.float64 and 0.0 < float(value) < 1.0
    assert float(value) == pytest.approx(pathway_by_loops(scores, following, top_k), rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda s, n: coupling_loss(s, n, kind="pathway", top_k=top_k),
        (scores.requires_grad_(), following.requires_grad_()),
    )


@pytest.mark.parametrize("kind", ["mass", "pathway"])
def test_coupling_over_all_experts_is_zero(random, kind):
    scores, following, *_ = layer_pair(random)
    assert float(coupling_loss(scores, following, kind=kind, top_k=6)) == pytest.approx(0.0, abs=1e-12)


def test_mass_of_tokens_without_experts():
    scores, none = torch.full((3, 4), 0.25), torch.zeros(3, 4, dtype=torch.bool)
    value, gradient = value_and_gradient(lambda s: coupling_loss(s, scores, none, ~none), scores)
    assert float(value) == 1.0 and gradient.abs().max() == 0.0


def test_mass_gradient_of_a_layer_is_its_neighbours_mass(random):
    before, scores, live_before, live = layer_pair(random)
    after, _, live_after, _ = layer_pair(random)
    _, gradient = value_and_gradient(
        lambda s: coupling_loss(before, s, live_before, live) + coupling_loss(s, after, live, live_after), scores
    )
    for t in range(9):
        neighbours = float(before[t][live_before[t]].sum() + after[t][live_after[t]].sum())
        for e in range(6):
            expected = -neighbours / 9 if live[t, e] else 0.0
            assert float(gradient[t, e]) == pytest.approx(expected, rel=1e-12)


def test_coupling_and_the_permutation_of_experts(random):
    scores, following, live, live_next = layer_pair(random)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    mass = float(coupling_loss(scores, following, live, live_next))
    permuted = coupling_loss(scores[:, order], following, live[:, order], live_next)
    assert float(permuted) == pytest.approx(mass, rel=1e-12)
    pathway = float(coupling_loss(scores, following, kind="pathway", top_k=2))
    for first, second in ((order, order), (order, slice(None)), (slice(None), order)):
        permuted = coupling_loss(scores[:, first], following[:, second], kind="pathway", top_k=2)
        assert float(permuted) == pytest.approx(pathway, rel=1e-12)


def test_pathway_sees_the_pairing_of_tokens_and_mass_does_not():
    """64 tokens, each sent with 0.9 to one of 8 experts and then with 0.9 to that expert's fixed successor."""
    expert = torch.arange(64) % 8
    row = torch.full((64, 8), 0.1 / 7)
    scores = row.scatter(1, expert[:, None], 0.9)
    following = row.scatter(1, ((3 * expert + 1) % 8)[:, None], 0.9)
    shuffled = following[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    paired, broken = (coupling_loss(scores, x, kind="pathway", top_k=1) for x in (following, shuffled))
    assert float(paired) == pytest.approx(1 - 0.9**2 - 7 * (0.1 / 7) ** 2, rel=1e-5)
    assert float(broken) > float(paired) + 0.2
    paired, broken = (coupling_loss(scores, x, top_k=1) for x in (following, shuffled))
    assert float(paired) == pytest.approx(1 - 0.9**2, rel=1e-5)
    assert float(broken) == pytest.approx(float(paired), rel=1e-6)


def test_coupling_ignores_the_order_of_tokens(random):
    scores, following, live, live_next = layer_pair(random)
    order = torch.tensor([8, 1, 3, 0, 2, 7, 5, 4, 6])
    mass = coupling_loss(scores[order], following[order], live[order], live_next[order])
    assert float(mass) == pytest.approx(float(coupling_loss(scores, following, live, live_next)), rel=1e-12)
    pathway = coupling_loss(scores[order], following[order], kind="pathway", top_k=2)
    expected = coupling_loss(scores, following, kind="pathway", top_k=2)
    assert float(pathway) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("kind", ["mass", "pathway"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_coupling_of_half_precision_accumulates_in_fp32(random, kind, dtype):
    scores, following, *_ = (x.to(dtype) for x in layer_pair(random, num_tokens=600, num_experts=16))
    value = coupling_loss(scores, following, kind=kind, top_k=3)
    exact = coupling_loss(scores.double(), following.double(), kind=kind, top_k=3)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(exact), rel=1e-5)


@pytest.mark.parametrize("kind", ["mass", "pathway"])
def test_coupling_of_no_tokens(kind):
    value, gradient = value_and_gradient(
        lambda s: coupling_loss(s, torch.zeros(0, 4), kind=kind, top_k=2), torch.zeros(0, 4)
    )
    assert 0.0 <= float(value) <= 1.0 and gradient.shape == (0, 4)


SCORES, MAP = torch.full((4, 5), 0.2), torch.ones(4, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    "changes, name",
    [
        (dict(kind="product", top_k=2), "kind"),
        (dict(), "routing_map"),
        (dict(routing_map=MAP), "routing_map_next"),
        (dict(kind="pathway"), "top_k"),
        (dict(kind="pathway", top_k=6), "top_k"),
        (dict(kind="pathway", top_k=0), "top_k"),
        (dict(top_k=6), "top_k"),
        (dict(scores=SCORES[0], top_k=2), "scores"),
        (dict(scores=SCORES.long(), top_k=2), "scores"),
        (dict(scores_next=SCORES.long(), top_k=2), "scores_next"),
        (dict(scores_next=SCORES[:3], top_k=2), "scores_next"),
        (dict(routing_map=MAP[:, :4], routing_map_next=MAP), "routing_map"),
        (dict(routing_map=MAP.float(), routing_map_next=MAP), "routing_map"),
        (dict(routing_map=MAP, routing_map_next=MAP[:3]), "routing_map_next"),
        (dict(routing_map=MAP, routing_map_next=MAP.long()), "routing_map_next"),
    ],
)
def test_coupling_names_the_bad_argument(changes, name):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        coupling_loss(**{**dict(scores=SCORES, scores_next=SCORES), **changes})
