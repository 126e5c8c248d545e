"""Specialization loss of one MoE layer, on the rows of z as they lie before the down projection.

Suffixes: T tokens (every N-th with a token stride), E experts, K experts per token, F expert hidden size.
"""

from functools import partial
from typing import Optional

import torch
from torch import Tensor

from megatron_moe_spec.kernels import load
from megatron_moe_spec.losses.specialization import (
    pair_cosines,
    squared_cosine_gradient,
    squared_cosine_sum,
    unit_vectors,
)
from megatron_moe_spec.parallel.collectives import gathered, largest, summed
from megatron_moe_spec.parallel.rows import RowExchange


def expert_rows(dispatched_TE: Tensor, live_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Where each token has its vectors among the rows of these tokens, ordered by (expert, token).

    No host synchronisation.

    Args:
        dispatched_TE: bool, the routing map that the dispatcher permutes by.
        live_TE: bool, the part of it that counts.

    Returns:
        Row numbers [T, K], 0 where there is none, and which of them are there, bool [T, K].
    """
    row_TE = (dispatched_TE.T.reshape(-1).cumsum(0) - 1).view(dispatched_TE.shape[::-1]).T
    experts_TK, valid_TK = token_experts(live_TE, top_k)
    return row_TE.gather(1, experts_TK) * valid_TK, valid_TK


def token_experts(live_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Numbers of each token's experts [T, K] in ascending order, and which of them are there, bool [T, K]."""
    experts_TK = live_TE.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :top_k]
    return experts_TK, live_TE.gather(1, experts_TK)


class ExpertRows:
    """The vectors z of a layer's local experts in one micro-batch, by reference, and the loss on them.

    Experts hand in their rows one after another (TEGroupedMLP: all at once). When all have, the cosines are
    computed; backward reads z again, recomputed by then where the layer recomputes its activation.

    Expert parallelism: the rows come home to their tokens' rank, by one all-to-all of z in forward; in backward
    another of z, so that no copy of it is kept, and one of the gradients. Each moves the rows of the used tokens once,
    in z's dtype: k F / stride numbers a token. With a stride, an all-to-all of k bytes a token in forward tells the
    experts' ranks which rows are used.

    Expert tensor parallelism: a rank has F / size columns of the rows of all the group's tokens. It sums products over
    the group: three all-reduces in forward, of k, k and k x k numbers a token in fp32, and one gather of two bits
    (bytes) per token and expert; none in backward.

    Attributes:
        dispatched_TE: bool, the routing map of all tokens whose rows this rank's experts share.

    Args:
        dispatched_TE, live_TE: of this rank's tokens, see ``expert_rows``.
        top_k: experts per token.
        tokens: which of the tokens to use.
        num_parts: how many times rows are handed in.
        column_group: ranks that the columns of z are divided over.
        come_home: whether rows are exchanged with other ranks before they are compared.
        fused: whether the Triton kernels compute; else eager PyTorch.
    """

    def __init__(
        self,
        dispatched_TE: Tensor,
        live_TE: Tensor,
        top_k: int,
        tokens: slice,
        num_parts: int,
        column_group,
        come_home: bool,
        fused: bool,
    ):
        self._fused = fused
        self._group = column_group
        self._tokens = tokens
        ranks = column_group.size()
        self.dispatched_TE = gathered(dispatched_TE, column_group)
        live_TE = gathered(live_TE, column_group)
        if come_home:
            used = expert_rows(self._used(self.dispatched_TE), self._used(live_TE), top_k)
        else:
            used = map(self._used, expert_rows(self.dispatched_TE, live_TE, top_k))
        self._rows_TK, self._valid_TK = used
        own = len(self._rows_TK) // ranks
        self._own = slice(column_group.rank() * own, (column_group.rank() + 1) * own)
        self._cosines_TKK = self._inverse_lengths_TK = None
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

    def compare(self, exchange: Optional[RowExchange]) -> tuple[Tensor, Tensor, Tensor]:
        """Computes the cosines, once all rows are there. ``exchange`` brings rows home; None: they are.

        Returns:
            Cosines [T, K, K] between the vectors of each of this rank's tokens, which there are, bool [T, K], and the
            sum of the squared cosines.
        """
        if exchange is not None and self._tokens.step > 1:
            exchange = exchange.part(self._used_rows())
        self._exchange = exchange
        total = None
        if self._fused:
            self._cosines_TKK, self._inverse_lengths_TK, total = self._fused_cosines(self._rows())
        else:
            units_TKF, self._inverse_lengths_TK = unit_vectors(
                self._vectors(self._rows()),
                self._valid_TK,
                maximum=partial(largest, group=self._group),
                total=partial(summed, group=self._group),
            )
            self._cosines_TKK = summed(pair_cosines(units_TKF), self._group)
        own_TKK = self._cosines_TKK[self._own]
        return own_TKK, self._valid_TK[self._own], squared_cosine_sum(own_TKK) if total is None else total

    def _fused_cosines(self, z_PF: Tensor) -> tuple[Tensor, Tensor, Optional[Tensor]]:
        kernels = load("specialization")
        if self._group.size() == 1:
            return kernels.row_cosines(z_PF, self._rows_TK, self._valid_TK)
        products_TKK, units_TK = kernels.row_products(z_PF, self._rows_TK, self._valid_TK)
        common_TK = largest(units_TK, self._group)
        products_TKK = summed(kernels.in_units(products_TKK, units_TK, common_TK), self._group)
        return (*kernels.cosines_from_products(products_TKK, common_TK), None)

    def add_gradient(self, part: int, weight, incoming: Tensor) -> Tensor:
        """incoming + gradient of weight * ``squared_cosine_sum`` for the rows of one part; each part asks once."""
        if self._fused and self._exchange is None and len(self._parts) == 1:
            (z_PF,), self._parts = self._parts, []
            return self._fused_gradient(z_PF, weight, incoming)
        if not self._gradients:
            self._gradients = list(self._all_gradients(weight).split([len(z) for z in self._parts]))
        gradient, self._gradients[part] = self._gradients[part], None
        self._num_parts -= 1
        if not self._num_parts:
            self._parts = []
        return incoming + gradient.to(incoming.dtype)

    def _fused_gradient(self, z_PF: Tensor, weight, incoming: Optional[Tensor] = None) -> Tensor:
        return load("specialization").add_cosine_gradient(
            z_PF, self._rows_TK, self._valid_TK, self._cosines_TKK, self._inverse_lengths_TK, weight, incoming
        )

    def _all_gradients(self, weight) -> Tensor:
        z_PF = self._rows()
        if self._fused:
            gradient_PF = self._fused_gradient(z_PF, weight)
            return gradient_PF if self._exchange is None else self._exchange.to_experts(gradient_PF)
        inverse_TK = self._inverse_lengths_TK
        units_TKF = self._vectors(z_PF).to(inverse_TK.dtype) * inverse_TK.unsqueeze(-1)
        gradient_TKF = self._loss_gradient(units_TKF) * weight
        gradient_PF = gradient_TKF.new_zeros(z_PF.shape)
        if len(gradient_PF):
            # Vectors that are not there add their zero gradient to row 0; every other row has one token.
            gradient_PF.index_add_(0, self._rows_TK.reshape(-1), gradient_TKF.flatten(0, 1))
        if self._exchange is None:
            return gradient_PF
        return self._exchange.to_experts(gradient_PF.to(z_PF.dtype))

    def _used(self, x_T: Tensor) -> Tensor:
        """Of [T, ...] for all tokens of the column group, that of the used tokens; a view but for the last step."""
        return x_T.unflatten(0, (self._group.size(), -1))[:, self._tokens].flatten(0, 1)

    def _used_rows(self) -> Tensor:
        """Which rows, in the order of (expert, token), are a used token's, bool."""
        used_T = torch.zeros_like(self.dispatched_TE[:, 0])
        used_T.unflatten(0, (self._group.size(), -1))[:, self._tokens] = True
        return used_T.expand(self.dispatched_TE.shape[::-1])[self.dispatched_TE.T]

    def _loss_gradient(self, units_TKF: Tensor) -> Tensor:
        return squared_cosine_gradient(units_TKF, self._inverse_lengths_TK, self._cosines_TKK)

    def _rows(self) -> Tensor:
        """[P, F] the rows of the group's tokens."""
        z_PF = self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts)
        return z_PF if self._exchange is None else self._exchange.to_home(z_PF)

    def _vectors(self, z_PF: Tensor) -> Tensor:
        """[T, K, F] each token's rows; any row where a token has none."""
        if len(z_PF):
            return z_PF[self._rows_TK]
        return z_PF.new_zeros(*self._rows_TK.shape, z_PF.shape[-1])
