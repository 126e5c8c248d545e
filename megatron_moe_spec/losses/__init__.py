"""The losses as pure functions of tensors: eager PyTorch, differentiable, single process."""

from megatron_moe_spec.losses.coupling import coupling_loss
from megatron_moe_spec.losses.specialization import specialization_loss

__all__ = ["coupling_loss", "specialization_loss"]
