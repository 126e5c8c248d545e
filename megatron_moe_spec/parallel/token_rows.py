"""The rows that the experts of each token compute, wherever they lie, and gradients through their angles and lengths.

Suffixes: T tokens (every N-th with a token stride), E experts, K experts per token, P rows, D components of a row.
"""

from collections.abc import Sequence
from functools import partial
from typing import Optional

import torch
from torch import Tensor

from megatron_moe_spec.losses.vectors import inverse, mixed, pair_cosines, unit_vectors
from megatron_moe_spec.parallel.collectives import all_gather, all_reduce_max, all_reduce_sum
from megatron_moe_spec.parallel.rows import RowExchange


def expert_rows(dispatched_TE: Tensor, blocks_E: Optional[Sequence[int]] = None) -> Tensor:
    """[T, E] positions of each token's rows among the rows of these tokens, ordered by (expert, token).

    No host synchronisation. Meaningless where a token has no row.

    Args:
        dispatched_TE: bool, the map that the dispatcher has permuted by.
        blocks_E: numbers of rows from each expert to the next, where those of an expert may be padded at the end.
    """
    if blocks_E is None:
        return (dispatched_TE.T.reshape(-1).cumsum(0) - 1).view(dispatched_TE.shape[::-1]).T
    sizes_E = torch.tensor(blocks_E, device=dispatched_TE.device)
    return dispatched_TE.cumsum(dim=0) - 1 + sizes_E.cumsum(0) - sizes_E


class TokenRows:
    """The rows of a layer's local experts in one micro-batch, by reference, as vectors of the tokens they belong to.

    Experts hand in their rows one after another (TEGroupedMLP: all at once). When all have, the tokens' vectors are
    compared; backward reads the rows again, recomputed by then where the layer recomputes its activation.

    Expert parallelism: rows are returned to the ranks of their tokens, by one all-to-all of them in forward; in
    backward another of them, so that no copy is kept, and one of the gradients. Each moves the rows of the used tokens
    once, in their dtype: K D / stride numbers a token. With a stride, an all-to-all of K bytes a token in forward tells
    the experts' ranks which rows are used.

    Expert tensor parallelism: a rank has D / size columns of the rows of all the group's tokens. It sums products over
    the group: three all-reduces in forward, of K, K and K x K numbers a token in fp32, and one gather of two bits
    (bytes) per token and expert; none in backward.

    Attributes:
        own: which of the compared tokens are this rank's.
        experts_TK: numbers of the experts that the compared tokens have vectors of, ascending; until ``keep_mixing``.
        active_TK: bool, which vectors the compared tokens have.
        cosines_TKK, lengths_TK: between, and of, these vectors; from ``compare``.

    Args:
        active_TE: bool, the experts of this rank's tokens that count.
        top_k: experts per token.
        tokens: which of the tokens to use.
        num_parts: how many times rows are handed in.
        column_group: ranks that the columns of the rows are divided over.
        fused: whether the Triton kernels compute; else eager PyTorch.
    """

    def __init__(self, active_TE: Tensor, top_k: int, tokens: slice, num_parts: int, column_group, fused: bool):
        self._fused = fused
        self._group = column_group
        self._tokens = tokens
        active_TE = self._used(all_gather(active_TE, column_group))
        self.experts_TK = active_TE.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :top_k]
        self.active_TK = active_TE.gather(1, self.experts_TK)
        own = len(active_TE) // column_group.size()
        self.own = slice(column_group.rank() * own, (column_group.rank() + 1) * own)
        self._rows_TK: Optional[Tensor] = None
        self._inverse_lengths_TK: Optional[Tensor] = None
        self._mixing_TKK: Optional[Tensor] = None
        self._num_parts = num_parts
        self._parts: list[Tensor] = []
        self._gradients: list[Optional[Tensor]] = []
        self._exchange: Optional[RowExchange] = None

    def add(self, rows: Tensor) -> None:
        """Takes the rows of the next expert."""
        self._parts.append(rows.detach())

    @property
    def complete(self) -> bool:
        """Whether all experts have handed in their rows."""
        return len(self._parts) == self._num_parts

    def compare(
        self, dispatched_TE: Tensor, exchange: Optional[RowExchange], blocks_E: Optional[Sequence[int]] = None
    ) -> None:
        """Compares the vectors of each token, once all rows are there.

        Args:
            dispatched_TE: bool, the map that the dispatcher has permuted by, of all tokens whose rows the column group
                shares.
            exchange: returns rows to the ranks of their tokens; None: they are there.
            blocks_E: see ``expert_rows``; without an exchange.
        """
        if exchange is None:
            row_TE = self._used(expert_rows(dispatched_TE, blocks_E))
        else:
            row_TE = expert_rows(self._used(dispatched_TE))
            if self._tokens.step > 1:
                exchange = exchange.part(self._used_rows(dispatched_TE))
        self._exchange = exchange
        self._rows_TK = row_TE.gather(1, self.experts_TK) * self.active_TK
        compare = self._compare_fused if self._fused else self._compare_eagerly
        self.cosines_TKK, self._inverse_lengths_TK = compare(self._rows())
        self.lengths_TK = inverse(self._inverse_lengths_TK)

    def _compare_eagerly(self, rows_PD: Tensor) -> tuple[Tensor, Tensor]:
        units_TKD, inverse_lengths_TK = unit_vectors(
            self._vectors(rows_PD),
            self.active_TK,
            maximum=partial(all_reduce_max, group=self._group),
            total=partial(all_reduce_sum, group=self._group),
        )
        return all_reduce_sum(pair_cosines(units_TKD), self._group), inverse_lengths_TK

    def _compare_fused(self, rows_PD: Tensor) -> tuple[Tensor, Tensor]:
        from megatron_moe_spec.kernels import rows as kernels  # imports triton

        if self._group.size() == 1:
            return kernels.row_cosines(rows_PD, self._rows_TK, self.active_TK)
        products_TKK, units_TK = kernels.row_products(rows_PD, self._rows_TK, self.active_TK)
        common_TK = all_reduce_max(units_TK, self._group)
        products_TKK = all_reduce_sum(kernels.in_units(products_TKK, units_TK, common_TK), self._group)
        return kernels.cosines_from_products(products_TKK, common_TK)

    def keep_mixing(self, mixing_TKK: Tensor) -> None:
        """Takes how the gradient mixes the vectors' directions, from ``losses.vectors.mixing_of``, for backward."""
        self._mixing_TKK = mixing_TKK
        del self.cosines_TKK, self.lengths_TK, self.experts_TK

    def add_gradient(self, part: int, weight, incoming: Tensor) -> Tensor:
        """incoming + weight * the gradient with respect to the rows of one part; each part asks once."""
        if self._fused and self._exchange is None and len(self._parts) == 1:
            (rows_PD,), self._parts = self._parts, []
            return self._mix_fused(rows_PD, weight, incoming)
        if not self._gradients:
            self._gradients = list(self._all_gradients(weight).split([len(rows) for rows in self._parts]))
        gradient, self._gradients[part] = self._gradients[part], None
        self._num_parts -= 1
        if not self._num_parts:
            self._parts = []
        return incoming + gradient.to(incoming.dtype)

    def _mix_fused(self, rows_PD: Tensor, weight, incoming: Optional[Tensor] = None) -> Tensor:
        from megatron_moe_spec.kernels import rows as kernels  # imports triton

        return kernels.add_mixed(
            rows_PD, self._rows_TK, self.active_TK, self._mixing_TKK, self._inverse_lengths_TK, weight, incoming
        )

    def _all_gradients(self, weight) -> Tensor:
        rows_PD = self._rows()
        if self._fused:
            gradient_PD = self._mix_fused(rows_PD, weight)
            return gradient_PD if self._exchange is None else self._exchange.to_experts(gradient_PD)
        inverse_TK = self._inverse_lengths_TK
        units_TKD = self._vectors(rows_PD).to(inverse_TK.dtype) * inverse_TK.unsqueeze(-1)
        gradient_TKD = mixed(self._mixing_TKK, units_TKD, inverse_TK) * weight
        gradient_PD = gradient_TKD.new_zeros(rows_PD.shape)
        if len(gradient_PD):
            # Vectors that are not there add their zero gradient to row 0; every other row has one token.
            gradient_PD.index_add_(0, self._rows_TK.reshape(-1), gradient_TKD.flatten(0, 1))
        if self._exchange is None:
            return gradient_PD
        return self._exchange.to_experts(gradient_PD.to(rows_PD.dtype))

    def _used(self, x_T: Tensor) -> Tensor:
        """Of [T, ...] for all tokens of the column group, that of the used tokens; a view but for the last step."""
        return x_T.unflatten(0, (self._group.size(), -1))[:, self._tokens].flatten(0, 1)

    def _used_rows(self, dispatched_TE: Tensor) -> Tensor:
        """Bool, in the order of (expert, token): the rows of used tokens."""
        used_T = torch.zeros_like(dispatched_TE[:, 0])
        used_T.unflatten(0, (self._group.size(), -1))[:, self._tokens] = True
        return used_T.expand(dispatched_TE.shape[::-1])[dispatched_TE.T]

    def _rows(self) -> Tensor:
        """[P, D] the rows of the group's tokens."""
        rows_PD = self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts)
        return rows_PD if self._exchange is None else self._exchange.to_tokens(rows_PD)

    def _vectors(self, rows_PD: Tensor) -> Tensor:
        """[T, K, D] each token's rows; any row where a token has none."""
        if len(rows_PD):
            return rows_PD[self._rows_TK]
        return rows_PD.new_zeros(*self._rows_TK.shape, rows_PD.shape[-1])
