"""Counts over a trace against loops over its tokens."""

import torch
from traces import random_trace

from megatron_moe_spec.traces import counts as trace_counts

EXPERTS, LAYERS = 6, 3
TRACE = random_trace(60, LAYERS, EXPERTS, 2, seed=0, dropped=0.2)


def _pairs(here, there):
    joint = torch.zeros(EXPERTS, EXPERTS, dtype=torch.int64)
    for one, other in zip(here.tolist(), there.tolist()):
        for i in one:
            for j in other:
                if i >= 0 and j >= 0:
                    joint[i, j] += 1
    return joint


def test_counts_are_those_of_loops():
    layers = TRACE.experts_TMK.unbind(dim=1)
    assert bool((TRACE.experts_TMK < 0).any())
    loads = [[sum(row.count(e) for row in layer.tolist()) for e in range(EXPERTS)] for layer in layers]
    assert trace_counts.loads(TRACE).tolist() == loads
    assert torch.equal(trace_counts.transitions(*layers[:2], EXPERTS), _pairs(*layers[:2]))
    together = _pairs(layers[0], layers[0]).fill_diagonal_(0)
    assert torch.equal(trace_counts.coactivation(layers[0], EXPERTS), together) and together.any()


def test_controls_keep_the_loads():
    for control in (trace_counts.shuffled, trace_counts.recombined):
        found = control(TRACE, seed=1)
        assert torch.equal(trace_counts.loads(found), trace_counts.loads(TRACE))
        assert not torch.equal(found.experts_TMK, TRACE.experts_TMK)
        assert torch.equal(found.experts_TMK, control(TRACE, seed=1).experts_TMK)
    # Shuffling moves a token's experts together.
    rows = sorted(map(tuple, TRACE.experts_TMK[:, 1].tolist()))
    assert sorted(map(tuple, trace_counts.shuffled(TRACE).experts_TMK[:, 1].tolist())) == rows
