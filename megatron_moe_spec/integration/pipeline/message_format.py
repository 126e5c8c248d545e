"""What a message between pipeline stages holds. Suffixes: T tokens, E experts, W values of a message per token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe_spec.integration.hooks.routing import LayerRouting, TokenCount
from megatron_moe_spec.parallel.messages import bits_to_numbers, numbers_to_bits, packed_length


@dataclass(frozen=True)
class MessageFormat:
    """Columns of a message: m (mass) or the scores (pathway), and, where routing is to be measured, the experts that
    the token was dispatched to, eight in a column."""

    kind: str
    num_experts: int
    with_active: bool

    @property
    def scores_width(self) -> int:
        return 1 if self.kind == "mass" else self.num_experts

    @property
    def width(self) -> int:
        return self.scores_width + (-(-self.num_experts // 8) if self.with_active else 0)

    def packed_shape(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[int, int, int]:
        """Shape of hidden states [sequence, batch, hidden] with a message."""
        sequence, batch, hidden_size = shape
        return packed_length(sequence, hidden_size, dtype, self.width), batch, hidden_size

    def pack(self, message: Tensor, active_TE: Tensor) -> Tensor:
        """[T, W] from what the coupling loss needs of a layer, see ``LayerRouting``."""
        parts = [message.reshape(-1, self.scores_width).float()]
        if self.with_active:
            parts.append(bits_to_numbers(active_TE))
        return torch.cat(parts, dim=1)

    def unpack(self, message_TW: Tensor) -> LayerRouting:
        active_TE = None
        if self.with_active:
            active_TE = numbers_to_bits(message_TW[:, self.scores_width :], self.num_experts)
        return LayerRouting(active_TE, TokenCount(0, 0), message=self.unpack_grad(message_TW))

    def pack_grad(self, neighbor_grad: Tensor) -> Tensor:
        neighbor_grad_TW = neighbor_grad.reshape(-1, self.scores_width).float()
        return torch.nn.functional.pad(neighbor_grad_TW, (0, self.width - self.scores_width))

    def unpack_grad(self, message_TW: Tensor) -> Tensor:
        """[T] (mass) or [T, E] (pathway)."""
        return message_TW[:, 0] if self.kind == "mass" else message_TW[:, : self.scores_width]
