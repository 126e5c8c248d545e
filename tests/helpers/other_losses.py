"""More losses of one's own: of everything else that such a loss may read."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from example_loss import RoutingInformation

from megatron_moe_spec.losses import RouterWeightLoss, RowsLoss
from megatron_moe_spec.losses.base import ACTIVATIONS


@dataclass(frozen=True)
class LengthSpread(RowsLoss):
    """Of the lengths of a token's activations, and their angles, too. Without a flag."""

    name: ClassVar[str] = "length_spread_loss"
    reads: ClassVar[str] = ACTIVATIONS

    def token_losses(self, cosines_TKK, lengths_TK, active_TK):
        mean_T1 = lengths_TK.sum(dim=1, keepdim=True) / active_TK.sum(dim=1, keepdim=True).clamp_min(1)
        spread_T = ((lengths_TK - mean_T1).square() * active_TK).sum(dim=1)
        return spread_T + 0.1 * (cosines_TKK.sum(dim=2) * lengths_TK).sum(dim=1)


@dataclass(frozen=True)
class RouterLength(RouterWeightLoss):
    name: ClassVar[str] = "router_length_loss"

    def of_weight(self, router_weight_EH):
        return torch.linalg.vector_norm(router_weight_EH, dim=1).square().mean()


def losses_of_ones_own(coefficient: float) -> tuple:
    return RoutingInformation(coefficient), LengthSpread(coefficient), RouterLength(coefficient)
