"""Specialization loss of one MoE layer, on the rows of z as they lie before the down projection.

Suffixes: T tokens (every N-th with a token stride), E experts, K experts per token, F expert hidden size.
"""

from typing import Optional

import torch
from torch import Tensor

from megatron_moe_spec.losses.specialization import (
    pair_cosines,
    squared_cosine_gradient,
    squared_cosine_sum,
    unit_vectors,
)
from megatron_moe_spec.parallel.rows import RowExchange


def expert_rows(dispatched_TE: Tensor, live_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Where each of this rank's tokens has its vectors among their rows, ordered by (expert, token).

    No host synchronisation.

    Args:
        dispatched_TE: bool, the routing map that the dispatcher permutes by.
        live_TE: bool, the part of it that counts.

    Returns:
        Row numbers [T, K], 0 where there is none, and which of them are there, bool [T, K].
    """
    row_TE = (dispatched_TE.T.reshape(-1).cumsum(0) - 1).view(dispatched_TE.shape[::-1]).T
    experts_TK = live_TE.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :top_k]
    valid_TK = live_TE.gather(1, experts_TK)
    return row_TE.gather(1, experts_TK) * valid_TK, valid_TK


class ExpertRows:
    """The vectors z of a layer's local experts in one micro-batch, by reference, and the loss on them.

    Experts hand in their rows one after another (TEGroupedMLP: all at once). When all have, the cosines are
    computed; backward reads z again, recomputed by then where the layer recomputes its activation.

    Under expert parallelism the rows come home to their tokens' rank: one all-to-all of z in forward; in backward
    another of z, so that no copy of it is kept, and one of the gradients. Each moves every row once, in z's dtype.

    Attributes:
        cosines_TKK: between each token's vectors; None until all rows are there.
        valid_TK: bool, which vectors a token has.
    """

    def __init__(self, rows_TK: Tensor, valid_TK: Tensor, num_parts: int):
        self._rows_TK = rows_TK
        self.valid_TK = valid_TK
        self.cosines_TKK = None
        self._num_parts = num_parts
        self._parts: list[Tensor] = []
        self._gradients: list[Tensor] = []
        self._exchange: Optional[RowExchange] = None

    def add(self, z: Tensor) -> bool:
        """Takes the rows of the next expert; returns whether they were the last."""
        self._parts.append(z.detach())
        return len(self._parts) == self._num_parts

    @property
    def num_rows(self) -> int:
        return sum(len(z) for z in self._parts)

    def compare(self, exchange: Optional[RowExchange]) -> None:
        """Computes the cosines, once all rows are there. ``exchange`` brings rows home; None: they are."""
        self._exchange = exchange
        self.cosines_TKK = pair_cosines(self._units(self._rows())[0])

    def squared_cosine_sum(self) -> Tensor:
        return squared_cosine_sum(self.cosines_TKK)

    def gradient(self, part: int, weight) -> Tensor:
        """Gradient of weight * ``squared_cosine_sum`` for the rows of one part; each part asks once."""
        if not self._gradients:
            z_PF = self._rows()
            gradient_TKF = squared_cosine_gradient(*self._units(z_PF), self.cosines_TKK) * weight
            gradient_PF = gradient_TKF.new_zeros(z_PF.shape)
            if len(gradient_PF):
                # Vectors that are not there add their zero gradient to row 0; every other row has one token.
                gradient_PF.index_add_(0, self._rows_TK.reshape(-1), gradient_TKF.flatten(0, 1))
            if self._exchange is not None:
                gradient_PF = self._exchange.to_experts(gradient_PF.to(z_PF.dtype))
            self._gradients = list(gradient_PF.split([len(z) for z in self._parts]))
        gradient, self._gradients[part] = self._gradients[part], None
        self._num_parts -= 1
        if not self._num_parts:
            self._parts = []
        return gradient

    def _rows(self) -> Tensor:
        """The rows of this rank's tokens."""
        z_PF = self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts)
        return z_PF if self._exchange is None else self._exchange.to_home(z_PF)

    def _units(self, z_PF: Tensor) -> tuple[Tensor, Tensor]:
        if len(z_PF):
            z_TKF = z_PF[self._rows_TK]
        else:
            z_TKF = z_PF.new_zeros(*self._rows_TK.shape, z_PF.shape[-1])
        return unit_vectors(z_TKF, self.valid_TK)
