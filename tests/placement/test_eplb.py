"""DeepSeek's load balancer: the example of its README, and what it promises."""

import pytest
import torch

from megatron_moe_spec.placement.eplb import rebalance_experts, replicate

pytestmark = pytest.mark.once


def test_the_example_of_its_readme():
    weight = torch.tensor(
        [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
    )
    slots = rebalance_experts(weight, num_replicas=16, num_groups=4, num_nodes=2, num_gpus=8)
    assert slots.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


def _loads(num_layers, num_experts, seed):
    return (torch.rand(num_layers, num_experts, generator=torch.Generator().manual_seed(seed)) ** 4 * 1000).long()


@pytest.mark.parametrize("num_replicas", [32, 40, 64])
def test_every_expert_is_placed_and_the_hottest_have_replicas(num_replicas):
    weight = _loads(3, 32, seed=num_replicas)
    for slots_S, weight_E in zip(rebalance_experts(weight, num_replicas, 1, 1, 8), weight):
        counts_E = torch.bincount(slots_S, minlength=32)
        assert len(slots_S) == num_replicas and (counts_E > 0).all()
        # The last replica went to the expert whose replicas bore most.
        borne_E = weight_E / counts_E
        assert (weight_E / (counts_E - 1).clamp_min(1))[counts_E > 1].ge(borne_E.max()).all()


@pytest.mark.parametrize("num_groups, num_nodes", [(1, 1), (8, 4)])
def test_loads_are_balanced_no_worse_than_in_order(num_groups, num_nodes):
    weight = _loads(4, 32, seed=1)
    slots = rebalance_experts(weight, 40, num_groups, num_nodes, 8)
    for slots_S, weight_E in zip(slots, weight):
        borne_S = (weight_E / torch.bincount(slots_S))[slots_S]
        in_order = weight_E.view(8, 4).sum(dim=1).max()
        assert borne_S.view(8, 5).sum(dim=1).max() < in_order


def test_groups_stay_on_a_node():
    slots = rebalance_experts(_loads(3, 32, seed=2), 48, num_groups=8, num_nodes=4, num_gpus=8)
    for slots_S in slots:
        of_nodes = [set((node // 4).tolist()) for node in slots_S.view(4, 12)]
        assert sorted(group for groups in of_nodes for group in groups) == list(range(8))


def test_groups_that_nodes_do_not_divide_do_not_count():
    weight = _loads(2, 24, seed=3)
    assert torch.equal(rebalance_experts(weight, 24, 3, 2, 4), rebalance_experts(weight, 24, 1, 1, 4))


def test_replicas_are_limited():
    weight = torch.tensor([[1000, 1, 2, 3]])
    assert replicate(weight, 8, most=3)[1].tolist() == [[3, 1, 2, 2]]
    assert replicate(weight, 8)[1].tolist() == [[5, 1, 1, 1]]
