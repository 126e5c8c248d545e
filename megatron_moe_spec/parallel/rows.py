"""Bringing rows that lie with their experts home to the ranks that hold their tokens, and gradients back."""

from typing import Optional, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class RowExchange:
    """A variable all-to-all between where rows lie sorted by expert and where their tokens are.

    Each direction is one collective of (rows on this rank) x (row size); they are each other's inverse.

    Args:
        order: [P] the rows of this rank's experts in the order of the ranks that hold their tokens; None where they
            lie so already.
        rows_for: number of rows for each rank of the group.
        rows_from: number of rows of this rank's tokens that lie with each rank.
        group: the ranks.
    """

    def __init__(self, order: Optional[Tensor], rows_for: Sequence[int], rows_from: Sequence[int], group):
        self._order = order
        self._rows_for = [int(rows) for rows in rows_for]
        self._rows_from = [int(rows) for rows in rows_from]
        self._group = group

    def to_home(self, x_PF: Tensor) -> Tensor:
        """Rows by expert [P, F] -> rows of this rank's tokens, those of expert 0 first."""
        x_PF = x_PF if self._order is None else x_PF[self._order]
        return self._all_to_all(x_PF, self._rows_for, self._rows_from)

    def to_experts(self, x_PF: Tensor) -> Tensor:
        """The other way."""
        received = self._all_to_all(x_PF, self._rows_from, self._rows_for)
        if self._order is None:
            return received
        return torch.empty_like(received).index_copy_(0, self._order, received)

    def _all_to_all(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        output = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(output, x.contiguous(), receive, send, group=self._group)
        return output
