"""Errors of the losses of other papers name the argument that does not fit."""

import math

import pytest
import torch

from megatron_moe_spec.losses import (
    expert_router_coupling_loss,
    orthogonality_loss,
    router_noise,
    score_variance_loss,
)

ROUTER, GATE = torch.ones(3, 4), torch.ones(3, 2, 4)


@pytest.mark.parametrize(
    "loss, arguments, name",
    [
        (orthogonality_loss, (torch.zeros(4, 3),), "x"),
        (orthogonality_loss, (torch.zeros(4, 2, 3, dtype=torch.long),), "x"),
        (orthogonality_loss, (torch.zeros(4, 1, 3),), "x"),
        (orthogonality_loss, (torch.zeros(4, 2, 3), torch.ones(4, 3, dtype=torch.bool)), "valid"),
        (orthogonality_loss, (torch.zeros(4, 2, 3), torch.ones(4, 2)), "valid"),
        (score_variance_loss, (torch.zeros(4),), "scores"),
        (score_variance_loss, (torch.zeros(4, 2, dtype=torch.long),), "scores"),
        (expert_router_coupling_loss, (ROUTER[0], GATE), "router_weight"),
        (expert_router_coupling_loss, (ROUTER.long(), GATE), "router_weight"),
        (expert_router_coupling_loss, (ROUTER[:1], GATE[:1]), "router_weight"),
        (expert_router_coupling_loss, (ROUTER, GATE[0]), "gate_weight"),
        (expert_router_coupling_loss, (ROUTER, GATE.long()), "gate_weight"),
        (expert_router_coupling_loss, (ROUTER, GATE[:2]), "gate_weight"),
        (expert_router_coupling_loss, (ROUTER, GATE[..., :3]), "gate_weight"),
        (expert_router_coupling_loss, (ROUTER, GATE, -0.5), "alpha"),
        (expert_router_coupling_loss, (ROUTER, GATE, math.nan), "alpha"),
        (expert_router_coupling_loss, (ROUTER, GATE, 1.0, ROUTER[:2]), "noise"),
        (expert_router_coupling_loss, (ROUTER, GATE, 1.0, ROUTER.long()), "noise"),
        (router_noise, (ROUTER[:1], 0), "router_weight"),
    ],
)
def test_bad_argument_is_named(loss, arguments, name):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        loss(*arguments)
