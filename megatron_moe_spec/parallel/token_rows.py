"""The rows that the experts of each token compute, wherever they lie, and gradients through their angles and lengths.

Suffixes: T tokens (every N-th with a token stride), E experts, K experts per token, P rows, D components of a row, N
pairs of a token's experts, U components of a SwiGLU's input.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Optional, Union

import torch
from torch import Tensor

from megatron_moe_spec.losses.vectors import (
    inverse,
    mixed,
    mixing_of_squares,
    pair_cosines,
    unit_vectors,
    unpacked,
)
from megatron_moe_spec.parallel.collectives import all_gather, all_reduce_max, all_reduce_sum
from megatron_moe_spec.parallel.row_exchange import Pending, RowExchange
from megatron_moe_spec.parallel.row_indices import experts_of_tokens, first_rows, rows_of_tokens, used_tokens

Weight = tuple[Union[Tensor, float], float]


class TokenRows:
    """The rows of a layer's local experts in one micro-batch, as vectors of the tokens they belong to.

    Experts hand in their rows one after another (TEGroupedMLP: all at once). When all have, the tokens' vectors are
    compared; backward reads the rows again, recomputed by then where the layer recomputes its activation.

    Expert parallelism: rows are returned to the ranks of their tokens, by one all-to-all of them in forward, which runs
    beside the experts until ``finish``; in backward another of them, so that no copy is kept, and one of the gradients.
    Each moves the rows of the used tokens once: K D / stride numbers a token. With a stride, an all-to-all of K bytes a
    token in forward tells the experts' ranks which rows are used.

    Expert tensor parallelism: a rank has D / size columns of the rows of all the group's tokens. It sums products over
    the group: three all-reduces in forward, of K, K and K x K numbers a token in fp32, and one gather of two bits
    (bytes) per token and expert; none in backward.

    Kept for backward, a token: K numbers of rows, K inverse lengths, K (K - 1) / 2 cosines or a mixing matrix of K x K.

    Attributes:
        own: which of the compared tokens are this rank's.
        active_TK: bool, which vectors the compared tokens have; from ``finish``.
        cosines_TKK, lengths_TK: between, and of, these vectors; from ``finish`` to ``keep_mixing``.
        squares: terms of the sum over this rank's tokens of the squared cosines of ordered pairs; from ``finish``.

    Args:
        active_TE: bool, the experts of this rank's tokens that count.
        top_k: experts per token.
        tokens: which of the tokens to use.
        num_parts: how many times rows are handed in.
        etp_group: ranks that the columns of the rows are divided over.
        fused: whether the Triton kernels compute; else eager PyTorch.
    """

    def __init__(self, active_TE: Tensor, top_k: int, tokens: slice, num_parts: int, etp_group, fused: bool):
        self._fused = fused
        self._group = etp_group
        self._tokens = tokens
        self._top_k = top_k
        self._active_TE: Optional[Tensor] = all_gather(active_TE, etp_group)
        own = len(range(len(active_TE))[tokens])
        self.own = slice(etp_group.rank() * own, (etp_group.rank() + 1) * own)
        self._mixing_TKK: Optional[Tensor] = None
        self._cosines_TN: Optional[Tensor] = None
        self._num_parts = num_parts
        self._parts: list[Tensor] = []
        self._sizes: list[int] = []
        self._kept: list[Callable[[], Tensor]] = []
        self._gradients: list[Optional[Tensor]] = []
        self._dispatched_TE: Optional[Tensor] = None
        self._located: Union[None, RowExchange, Pending[RowExchange]] = None
        self._exchange: Optional[RowExchange] = None
        self._coming: Optional[Pending[Tensor]] = None

    def experts(self) -> tuple[Tensor, Tensor]:
        """The experts whose vectors the compared tokens have, see ``experts_of_tokens``; before ``begin``."""
        return experts_of_tokens(used_tokens(self._active_TE, self._tokens, self._group.size()), self._top_k)

    def add(self, rows: Tensor) -> None:
        """Takes the rows of the next expert."""
        self._parts.append(rows.detach())
        self._sizes.append(len(rows))

    def keep(self, rows: Callable[[], Tensor]) -> None:
        """Takes what gives the rows of the next expert in backward: after ``finish``, nothing here holds them."""
        self._kept.append(rows)

    @property
    def complete(self) -> bool:
        """Whether all experts have handed in their rows."""
        return len(self._sizes) == self._num_parts

    @property
    def num_rows(self) -> int:
        """That have been handed in."""
        return sum(self._sizes)

    @property
    def travel(self) -> bool:
        """Whether they come home from other ranks."""
        return self._exchange is not None

    def locate(self, dispatched_TE: Tensor, exchange: Optional[RowExchange]) -> None:
        """Takes where the rows are, before they are handed in; with a stride, begins to tell which of them are used.

        Args:
            dispatched_TE: bool, the map that the dispatcher has permuted by, of all tokens whose rows the column group
                shares.
            exchange: returns rows to the ranks of their tokens; None: they are there.
        """
        self._dispatched_TE = dispatched_TE
        self._located = exchange
        if exchange is not None and self._tokens.step > 1:
            # The host is to wait for their number, and has more to queue before.
            _, used_P = self._find(dispatched_TE, num_rows=exchange.num_home)
            self._located = exchange.begin_part(used_P)

    def begin(self, counts_L: Sequence[int], blocks_L: Optional[Sequence[int]]) -> None:
        """Finds the rows of each token, once all are there, and begins to bring them home.

        Args:
            counts_L: numbers of rows that the dispatcher has handed to each local expert; where there are blocks.
            blocks_L: numbers of rows from each to the next, where they may be padded; None: they are not.
        """
        located, dispatched_TE = self._located, self._dispatched_TE
        if located is None:
            starts_E = None if blocks_L is None else first_rows(blocks_L, dispatched_TE.device)
            found = self._find(dispatched_TE, num_rows=self.num_rows, starts_E=starts_E)
        else:
            if isinstance(located, Pending):
                exchange = located.wait()
                found = self._find(self._active_TE, exchange.num_home, used_alone=True)
            else:
                exchange = located
                found = self._find(dispatched_TE, exchange.num_home)
            if blocks_L is not None:
                exchange = exchange.in_blocks(counts_L, blocks_L, dispatched_TE.device)
            self._exchange = exchange
            self._coming = exchange.begin_to_tokens(_joined(self._parts))
        self._rows_TK, self._used_P = found
        self._located = self._dispatched_TE = self._active_TE = None

    def _find(self, dispatched_TE: Tensor, num_rows: int, **others) -> tuple[Tensor, Tensor]:
        """See ``rows_of_tokens``."""
        which = (dispatched_TE, self._active_TE, self._top_k, num_rows, self._tokens, self._group.size())
        if not self._fused:
            return rows_of_tokens(*which, **others)
        from megatron_moe_spec.kernels import row_indices as kernels  # imports triton

        return kernels.rows_of_tokens(*which, **others)

    def finish(self) -> None:
        """Compares the vectors of each token."""
        rows_PD = _joined(self._parts) if self._coming is None else self._coming.wait()
        self._coming, self._parts = None, []
        if self._fused:
            self._compare_fused(rows_PD)
        else:
            self._compare_eagerly(rows_PD)

    def _compare_eagerly(self, rows_PD: Tensor) -> None:
        units_TKD, self._inverse_lengths_TK = unit_vectors(
            self._vectors(rows_PD),
            self.active_TK,
            maximum=partial(all_reduce_max, group=self._group),
            total=partial(all_reduce_sum, group=self._group),
        )
        self._cosines_TKK = all_reduce_sum(pair_cosines(units_TKD), self._group)

    def _compare_fused(self, rows_PD: Tensor) -> None:
        from megatron_moe_spec.kernels import cosines as kernels  # imports triton

        if self._group.size() == 1:
            self._cosines_TN, self._inverse_lengths_TK, self._squares = kernels.row_cosines(rows_PD, self._rows_TK)
            return
        products_TKK, units_TK = kernels.row_products(rows_PD, self._rows_TK)
        common_TK = all_reduce_max(units_TK, self._group)
        products_TKK = all_reduce_sum(kernels.in_units(products_TKK, units_TK, common_TK), self._group)
        self._cosines_TKK, self._inverse_lengths_TK = kernels.cosines_from_products(products_TKK, common_TK)

    @property
    def active_TK(self) -> Tensor:
        return self._rows_TK >= 0

    @property
    def cosines_TKK(self) -> Tensor:
        return self._cosines_TKK if self._cosines_TN is None else unpacked(self._cosines_TN, self._top_k)

    @property
    def lengths_TK(self) -> Tensor:
        return inverse(self._inverse_lengths_TK)

    @property
    def squares(self) -> Tensor:
        return self._cosines_TKK[self.own].square().sum() if self._cosines_TN is None else self._squares

    def keep_squares(self) -> None:
        """Has the gradient be that of the sum of the squared cosines of ordered pairs."""
        if self._cosines_TN is None:
            self.keep_mixing(mixing_of_squares(self._cosines_TKK))

    def keep_mixing(self, mixing_TKK: Tensor) -> None:
        """Takes how the gradient mixes the vectors' directions, from ``losses.vectors.mixing_of``, for backward."""
        self._mixing_TKK = mixing_TKK
        self._cosines_TKK = self._cosines_TN = None

    def add_gradient(self, part: int, weight: Callable[[], Weight], incoming: Tensor) -> Tensor:
        """incoming + weight * the gradient with respect to the rows of one part; each part asks once.

        Args:
            weight: gives it as two factors: a number, or a tensor of one element, and a number.
        """
        if self._fused and self._exchange is None and len(self._sizes) == 1:
            (rows,), self._kept = self._kept, []
            return self._mix_fused(rows(), weight(), incoming)
        if not self._gradients:
            self._gradients = list(self._all_gradients(weight()).split(self._sizes))
            self._kept = []
        gradient, self._gradients[part] = self._gradients[part], None
        return incoming + gradient.to(incoming.dtype)

    @property
    def goes_through_swiglu(self) -> bool:
        """Whether ``swiglu_gradient`` can compute the gradient; once it is known what to keep."""
        return self._fused and self._cosines_TN is not None and self._exchange is None and len(self._sizes) == 1

    def swiglu_gradient(
        self, y_PU: Tensor, probs: Tensor, weight: Weight, incoming_PD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the weighted SwiGLU whose results the rows are, with that of the rows in them.

        Args:
            y_PU, probs: its inputs.
            weight: two factors, as of ``add_gradient``.
            incoming_PD: gradient of its results.
        """
        from megatron_moe_spec.kernels.swiglu import swiglu_gradient  # imports triton

        kept = self._rows_TK, self._used_P, self._cosines_TN, self._inverse_lengths_TK
        return swiglu_gradient(y_PU, probs, *kept, weight[0], incoming_PD, weight[1])

    def _mix_fused(self, rows_PD: Tensor, weight: Weight, incoming: Optional[Tensor] = None) -> Tensor:
        from megatron_moe_spec.kernels import cosines as kernels  # imports triton

        tensor, number = weight
        of_squares = self._cosines_TN is not None
        add = kernels.add_squares_gradient if of_squares else kernels.add_mixed
        of_pairs = self._cosines_TN if of_squares else self._mixing_TKK
        found = self._rows_TK, self._used_P, of_pairs, self._inverse_lengths_TK
        return add(rows_PD, *found, tensor, incoming, number)

    def _all_gradients(self, weight: Weight) -> Tensor:
        rows_PD = _joined([rows() for rows in self._kept])
        if self._exchange is not None:
            rows_PD = self._exchange.to_tokens(rows_PD)
        if self._fused:
            gradient_PD = self._mix_fused(rows_PD, weight)
            return gradient_PD if self._exchange is None else self._exchange.to_experts(gradient_PD)
        inverse_TK = self._inverse_lengths_TK
        units_TKD = self._vectors(rows_PD).to(inverse_TK.dtype) * inverse_TK.unsqueeze(-1)
        gradient_TKD = mixed(self._mixing_TKK, units_TKD, inverse_TK) * (weight[0] * weight[1])
        gradient_PD = gradient_TKD.new_zeros(rows_PD.shape)
        if len(gradient_PD):
            # Vectors that are not there add their zero gradient to row 0; every other row has one token.
            gradient_PD.index_add_(0, self._rows_TK.clamp_min(0).view(-1), gradient_TKD.flatten(0, 1))
        if self._exchange is None:
            return gradient_PD
        return self._exchange.to_experts(gradient_PD.to(rows_PD.dtype))

    def _vectors(self, rows_PD: Tensor) -> Tensor:
        """[T, K, D] each token's rows; any row where a token has none."""
        if len(rows_PD):
            return rows_PD[self._rows_TK]
        return rows_PD.new_zeros(*self._rows_TK.shape, rows_PD.shape[-1])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """[P, D] the rows of this rank's experts."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
