"""The losses as pure functions of tensors (eager PyTorch, differentiable, single process), and what declares them.

``LOSSES`` is the only list of the losses: flags, settings, documentation and tests are made from it.
"""

from megatron_moe_spec.losses.base import Loss, RouterWeightLoss, RowsLoss, ScoresLoss, option
from megatron_moe_spec.losses.coupling import Coupling, coupling_loss
from megatron_moe_spec.losses.expert_router_coupling import (
    ExpertRouterCoupling,
    expert_router_coupling_loss,
    router_noise,
)
from megatron_moe_spec.losses.orthogonality import Orthogonality, orthogonality_loss
from megatron_moe_spec.losses.router_orthogonality import RouterOrthogonality, router_orthogonality_loss
from megatron_moe_spec.losses.score_variance import ScoreVariance, score_variance_loss
from megatron_moe_spec.losses.specialization import Specialization, specialization_loss

LOSSES: tuple[type[Loss], ...] = (
    Specialization,
    Coupling,
    Orthogonality,
    ScoreVariance,
    ExpertRouterCoupling,
    RouterOrthogonality,
)
