"""The rows that the experts of each token compute, wherever they lie, and gradients through their angles and lengths.

In three stages, each made by the one before: ``LocatedRows``, while the experts run and hand in their rows;
``ComparedRows``, of which losses are computed; ``KeptRows``, until backward, which reads the rows again, recomputed by
then where the layer recomputes its activation.

Expert parallelism: rows are returned to the ranks of their tokens, by one all-to-all of them in forward, which runs
beside the experts until it is waited for; in backward another of them, so that no copy is kept, and one of the
gradients. Each moves the rows of the used tokens once: K D / stride numbers a token. With a stride, an all-to-all of K
bytes a token in forward tells the experts' ranks which rows are used.

Expert tensor parallelism: a rank has D / size columns of the rows of all the group's tokens. It sums products over
the group: three all-reduces in forward, of K, K and K x K numbers a token in fp32, and one gather of two bits
(bytes) per token and expert; none in backward.

Suffixes: T tokens (every N-th with a token stride), E experts, K experts per token, L local experts, P rows, D
components of a row, N pairs of a token's experts, U components of a SwiGLU's input.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional, Union

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_moe_spec import kernels
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

Weight = tuple[Union[Tensor, float], float]  # two factors: a number, or a tensor of one element, and a number


@dataclass(slots=True, eq=False)
class UsedTokens:
    """The tokens of a micro-batch whose vectors are compared, of all expert-tensor-parallel ranks.

    Attributes:
        active_TE: bool, the experts that count, of all tokens of these ranks.
        top_k: experts per token.
        tokens: which of a rank's tokens are used.
        own: which of the used tokens are this rank's.
        group: the ranks, over which the columns of the rows are divided.
        fused: whether the Triton kernels compute; else eager PyTorch.
    """

    active_TE: Tensor
    top_k: int
    tokens: slice
    own: slice
    group: ProcessGroup
    fused: bool

    @classmethod
    def gather(cls, active_TE: Tensor, top_k: int, tokens: slice, group: ProcessGroup, fused: bool) -> "UsedTokens":
        """Of the active experts of this rank's tokens."""
        if group.size() == 1:
            return cls(active_TE, top_k, tokens, slice(None), group, fused)
        number = len(range(len(active_TE))[tokens])
        own = slice(group.rank() * number, (group.rank() + 1) * number)
        return cls(all_gather(active_TE, group), top_k, tokens, own, group, fused)

    def experts(self) -> tuple[Tensor, Tensor]:
        """The experts whose vectors the used tokens have, see ``experts_of_tokens``."""
        return experts_of_tokens(used_tokens(self.active_TE, self.tokens, self.group.size()), self.top_k)

    def locate(self, dispatched_TE: Tensor, exchange: Optional[RowExchange]) -> "LocatedRows":
        """Takes where the rows are to be; with a stride, begins to tell which of them are used.

        Args:
            dispatched_TE: bool, the map that the dispatcher has permuted by, of all tokens whose rows the group shares.
            exchange: returns rows to the ranks of their tokens; None: they are there.
        """
        if exchange is None or self.tokens.step == 1:
            return LocatedRows(self, dispatched_TE, exchange)
        # The host is to wait for their number, and has more to queue before.
        _, used_P = self.find(dispatched_TE, exchange.num_home)
        return LocatedRows(self, dispatched_TE, exchange.begin_part(used_P))

    def find(self, dispatched_TE: Tensor, num_rows: int, **others: Any) -> tuple[Tensor, Tensor]:
        """See ``kernels.row_indices.rows_of_tokens``."""
        which = (dispatched_TE, self.active_TE, self.top_k, num_rows, self.tokens, self.group.size())
        find = kernels.module("row_indices").rows_of_tokens if self.fused else rows_of_tokens
        return find(*which, **others)


@dataclass(slots=True, eq=False)
class LocatedRows:
    """Rows that are being handed in; it is known, or being found out, where they lie. See ``UsedTokens.locate``."""

    used: UsedTokens
    dispatched_TE: Tensor
    exchange: Union[None, RowExchange, Pending[RowExchange]]

    @property
    def travel(self) -> bool:
        """Whether they come home from other ranks."""
        return self.exchange is not None

    def begin(
        self, parts: Sequence[Tensor], counts_L: Sequence[int], blocks_L: Optional[Sequence[int]]
    ) -> Pending["ComparedRows"]:
        """Finds the rows of each token, once all are there, and begins to bring them home; compares them there.

        Args:
            parts: one after another, all rows of this rank's experts.
            counts_L: numbers of rows that the dispatcher has handed to each local expert; where there are blocks.
            blocks_L: numbers of rows from each to the next, where they may be padded; None: they are not.
        """
        used, dispatched_TE, exchange, rows_PD = self.used, self.dispatched_TE, self.exchange, _joined(parts)
        if exchange is None:
            starts_E = None if blocks_L is None else first_rows(blocks_L, dispatched_TE.device)
            found = used.find(dispatched_TE, rows_PD.shape[0], starts_E=starts_E)
            return Pending(lambda: ComparedRows.of(rows_PD, found, None, used))
        if isinstance(exchange, Pending):
            exchange = exchange.wait()
            found = used.find(used.active_TE, exchange.num_home, only_used=True)
        else:
            found = used.find(dispatched_TE, exchange.num_home)
        if blocks_L is not None:
            exchange = exchange.in_blocks(counts_L, blocks_L, dispatched_TE.device)
        coming = exchange.begin_to_tokens(rows_PD)
        return Pending(lambda: ComparedRows.of(coming.wait(), found, exchange, used))


@dataclass(slots=True, eq=False)
class ComparedRows:
    """The angles between, and the lengths of, the vectors of each token.

    Attributes:
        rows_TK, used_P: see ``kernels.row_indices.rows_of_tokens``.
        exchange: returns rows to the ranks of their tokens; None: they are there.
        cosines: [T, K, K]; packed, [T, N], of the kernels where the columns are on one rank.
        inverse_lengths_TK: see ``unit_vectors``.
        packed_squares: where packed, terms of the sum of their squares over ordered pairs.
        own: which of the tokens are this rank's.
        fused: see ``UsedTokens``.
    """

    rows_TK: Tensor
    used_P: Tensor
    exchange: Optional[RowExchange]
    cosines: Tensor
    inverse_lengths_TK: Tensor
    packed_squares: Optional[Tensor]
    own: slice
    fused: bool

    @classmethod
    def of(
        cls, rows_PD: Tensor, found: tuple[Tensor, Tensor], exchange: Optional[RowExchange], used: UsedTokens
    ) -> "ComparedRows":
        """Compares rows that are where their tokens are, and does not hold them."""
        rows_TK, group = found[0], used.group
        if not used.fused:
            maximum, total = partial(all_reduce_max, group=group), partial(all_reduce_sum, group=group)
            units_TKD, inverse_lengths_TK = unit_vectors(_vectors(rows_PD, rows_TK), rows_TK >= 0, maximum, total)
            compared = total(pair_cosines(units_TKD)), inverse_lengths_TK, None
        else:
            fused = kernels.module("cosines")
            if group.size() == 1:
                compared = fused.row_cosines(rows_PD, rows_TK)
            else:
                products_TKK, units_TK = fused.row_products(rows_PD, rows_TK)
                common_TK = all_reduce_max(units_TK, group)
                products_TKK = all_reduce_sum(fused.in_units(products_TKK, units_TK, common_TK), group)
                compared = *fused.cosines_from_products(products_TKK, common_TK), None
        return cls(*found, exchange, *compared, used.own, used.fused)

    @property
    def active_TK(self) -> Tensor:
        """Bool, which vectors the tokens have."""
        return self.rows_TK >= 0

    @property
    def cosines_TKK(self) -> Tensor:
        return self.cosines if self.packed_squares is None else unpacked(self.cosines, self.rows_TK.shape[1])

    @property
    def lengths_TK(self) -> Tensor:
        return inverse(self.inverse_lengths_TK)

    @property
    def squares(self) -> Tensor:
        """Terms of the sum over this rank's tokens of the squared cosines of ordered pairs."""
        return self.cosines[self.own].square().sum() if self.packed_squares is None else self.packed_squares

    def keep_squares(self) -> "KeptRows":
        """For the gradient of the sum of the squared cosines of ordered pairs."""
        return self.keep(mixing_of_squares(self.cosines) if self.packed_squares is None else self.cosines)

    def keep(self, pairs: Tensor) -> "KeptRows":
        """For the gradient that ``pairs`` tell, see ``KeptRows``."""
        return KeptRows(self.rows_TK, self.used_P, self.exchange, pairs, self.inverse_lengths_TK, self.fused)


@dataclass(slots=True, eq=False)
class KeptRows:
    """What backward needs, with the rows. A token: K numbers of rows, K inverse lengths, N cosines or K x K numbers.

    Attributes:
        pairs: mixing matrices [T, K, K], see ``losses.vectors.mixing_of``; or, for the kernels, packed cosines [T, N],
            whose sum of squares over ordered pairs is differentiated.
        The others: see ``ComparedRows``.
    """

    rows_TK: Tensor
    used_P: Tensor
    exchange: Optional[RowExchange]
    pairs: Tensor
    inverse_lengths_TK: Tensor
    fused: bool

    def add_gradient(self, rows_PD: Tensor, weight: Weight, incoming_PD: Optional[Tensor]) -> Tensor:
        """incoming (None: 0) + weight * the gradient with respect to rows that are where their tokens are."""
        rows_TK, inverse_lengths_TK = self.rows_TK, self.inverse_lengths_TK
        if self.fused:
            kept = rows_TK, self.used_P, self.pairs, inverse_lengths_TK
            add_mixed, of_squares = kernels.module("cosines").add_mixed, self.pairs.dim() == 2
            return add_mixed(rows_PD, *kept, weight[0], incoming_PD, weight[1], of_squares=of_squares)
        units_TKD = _vectors(rows_PD, rows_TK).to(inverse_lengths_TK.dtype) * inverse_lengths_TK.unsqueeze(-1)
        gradient_TKD = mixed(self.pairs, units_TKD, inverse_lengths_TK) * (weight[0] * weight[1])
        gradient_PD = gradient_TKD.new_zeros(rows_PD.shape)
        if len(gradient_PD):
            # Vectors that are not there add their zero gradient to row 0; every other row has one token.
            gradient_PD.index_add_(0, rows_TK.clamp_min(0).view(-1), gradient_TKD.flatten(0, 1))
        gradient_PD = gradient_PD.to(rows_PD.dtype)
        return gradient_PD if incoming_PD is None else incoming_PD + gradient_PD

    def gradients(self, parts: Sequence[Tensor], weight: Weight) -> list[Tensor]:
        """weight * the gradient with respect to each part of the rows of this rank's experts."""
        rows_PD, exchange = _joined(parts), self.exchange
        if exchange is None:
            gradient_PD = self.add_gradient(rows_PD, weight, None)
        else:
            gradient_PD = exchange.to_experts(self.add_gradient(exchange.to_tokens(rows_PD), weight, None))
        return [gradient_PD] if len(parts) == 1 else list(gradient_PD.split([len(part) for part in parts]))

    @property
    def goes_through_swiglu(self) -> bool:
        """Whether ``swiglu_gradient`` can compute the gradient of rows that are where their tokens are."""
        return self.pairs.dim() == 2

    def swiglu_gradient(
        self, y_PU: Tensor, probs: Tensor, rows_PD: Optional[Tensor], weight: Weight, incoming_PD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the weighted SwiGLU whose results the rows are, with that of the rows in them; by kernels.

        Args:
            y_PU, probs: its inputs.
            rows_PD: its results, where they travel; else they are not needed.
            incoming_PD: gradient of its results.
        """
        fused = kernels.module("swiglu")
        if self.exchange is None:
            kept = self.rows_TK, self.used_P, self.pairs, self.inverse_lengths_TK
            return fused.swiglu_gradient(y_PU, probs, *kept, weight[0], incoming_PD, weight[1])
        gradient = self.add_gradient(self.exchange.to_tokens(rows_PD), weight, None)
        return fused.swiglu_gradient_of_sum(y_PU, probs, incoming_PD, *self.exchange.received(gradient))


def _vectors(rows_PD: Tensor, rows_TK: Tensor) -> Tensor:
    """[T, K, D] each token's rows; any row where a token has none."""
    return rows_PD[rows_TK] if len(rows_PD) else rows_PD.new_zeros(*rows_TK.shape, rows_PD.shape[-1])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """[P, D] the rows of this rank's experts."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
