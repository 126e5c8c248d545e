"""A loss of one's own: the example of CONTRIBUTING.md."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron_moe_spec.losses import ScoresLoss, option


@dataclass(frozen=True)
class RoutingInformation(ScoresLoss):
    """Minus the mutual information of tokens and experts: each token is sure of its experts, and all are in use."""

    name: ClassVar[str] = "routing_information_loss"
    coeff: float = option(0.0, "--moe-routing-information-loss-coeff", "Weight of the routing information loss.")

    def token_statistics(self, scores_TE, active_TE):
        return scores_TE  # token_losses needs their mean over the micro-batch

    def token_losses(self, scores_TE, active_TE, mean_E):
        return torch.special.entr(scores_TE).sum(dim=-1) - torch.special.entr(mean_E).sum()
