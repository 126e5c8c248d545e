"""The losses as pure functions of tensors: eager PyTorch, differentiable, single process."""

from megatron_moe_spec.losses.coupling import coupling_loss
from megatron_moe_spec.losses.expert_router_coupling import expert_router_coupling_loss, router_noise
from megatron_moe_spec.losses.orthogonality import orthogonality_loss
from megatron_moe_spec.losses.score_variance import score_variance_loss
from megatron_moe_spec.losses.specialization import specialization_loss

__all__ = [
    "coupling_loss",
    "expert_router_coupling_loss",
    "orthogonality_loss",
    "router_noise",
    "score_variance_loss",
    "specialization_loss",
]
