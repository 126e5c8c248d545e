"""Returning the rows of experts to the ranks that hold their tokens, and gradients to the experts."""

from collections.abc import Sequence
from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor


class RowExchange:
    """A variable all-to-all between where rows lie sorted by expert and where their tokens are.

    Each direction is one collective of (rows on this rank) x (row size); they are each other's inverse.

    Args:
        order: rows of this rank's experts that travel, in the order of the ranks that hold their tokens; None: all of
            them, as they lie.
        num_rows: number P of this rank's experts' rows.
        rows_for: number of rows for each rank of the group.
        rows_from: number of rows of this rank's tokens that lie with each rank.
        group: the ranks.
    """

    def __init__(
        self, order: Optional[Tensor], num_rows: int, rows_for: Sequence[int], rows_from: Sequence[int], group
    ):
        if (num_rows if order is None else len(order)) != sum(rows_for):
            raise RuntimeError(f"of {num_rows} rows of experts, {sum(rows_for)} are to be returned to their tokens")
        self._order = order
        self._num_rows = num_rows
        self._rows_for = [int(rows) for rows in rows_for]
        self._rows_from = [int(rows) for rows in rows_from]
        self._group = group

    def part(self, chosen: Tensor) -> "RowExchange":
        """The exchange of some rows only. One all-to-all of a byte a row, and one host synchronisation.

        Args:
            chosen: bool, which rows of this rank's tokens, in the order of ``to_tokens``.
        """
        order = torch.arange(self._num_rows, device=chosen.device) if self._order is None else self._order
        chosen_there = self.to_experts(chosen.to(torch.uint8))[order].bool()
        numbers = [rows.sum() for rows in (*chosen_there.split(self._rows_for), *chosen.split(self._rows_from))]
        numbers = torch.stack(numbers).tolist()
        ranks = len(self._rows_for)
        return RowExchange(order[chosen_there], self._num_rows, numbers[:ranks], numbers[ranks:], self._group)

    def to_tokens(self, x_PD: Tensor) -> Tensor:
        """Rows by expert [P, ...] -> rows of this rank's tokens, those of expert 0 first."""
        x_PD = x_PD if self._order is None else x_PD[self._order]
        return self._all_to_all(x_PD, self._rows_for, self._rows_from)

    def to_experts(self, x_PD: Tensor) -> Tensor:
        """The other way; rows that do not travel are 0."""
        received = self._all_to_all(x_PD, self._rows_from, self._rows_for)
        if self._order is None:
            return received
        return received.new_zeros(self._num_rows, *received.shape[1:]).index_copy_(0, self._order, received)

    def _all_to_all(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        output = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(output, x.contiguous(), receive, send, group=self._group)
        return output
