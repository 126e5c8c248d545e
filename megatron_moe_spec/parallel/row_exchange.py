"""Returning the rows of experts to the ranks that hold their tokens, and gradients to the experts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Generic, Optional, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe_spec.losses.base import A2A_DTYPES

Result = TypeVar("Result")

FP8 = torch.float8_e4m3fn
SCALE_BYTES = 4  # of a row, in fp32


class Pending(Generic[Result]):
    """What has begun, and is there after ``wait``. Holds what it works on until then."""

    def __init__(self, finish: Callable[[], Result]):
        self._finish: Optional[Callable[[], Result]] = finish

    def wait(self) -> Result:
        """The result; once. For a collective on a GPU, the current stream waits, and not the host."""
        if self._finish is None:
            raise RuntimeError("what was pending has been waited for before")
        finish, self._finish = self._finish, None
        return finish()


@dataclass(slots=True, eq=False)
class RowExchange:
    """A variable all-to-all between where rows lie sorted by expert and where their tokens are.

    Each direction is one collective of (rows on this rank) x (row size); they are each other's inverse.

    Attributes:
        order: rows of this rank's experts that travel, in the order of the ranks that hold their tokens; None: all of
            them, as they lie.
        num_rows: number P of this rank's experts' rows.
        rows_for: number of rows for each rank of the group.
        rows_from: number of rows of this rank's tokens that lie with each rank.
        group: the ranks.
        a2a_dtype: how floating-point rows [P, D] travel, both ways: "same", in their dtype, or "fp8", see
            ``quantized``: D + 4 bytes a row. They arrive in their dtype, and the same rows alike each time.
        places: the inverse of ``order``, where it is known.
        counts_L: numbers of rows of each local expert, where only the exchange knows them.
        asked: whether a rank of the group has asked for the rows to be checked; the same on all of them.
    """

    order: Optional[Tensor]
    num_rows: int
    rows_for: list[int]
    rows_from: list[int]
    group: dist.ProcessGroup
    a2a_dtype: str = "same"
    places: Optional[Tensor] = None
    counts_L: Optional[Sequence[int]] = None
    asked: bool = False

    def __post_init__(self) -> None:
        if (self.num_rows if self.order is None else self.order.shape[0]) != sum(self.rows_for):
            returned = sum(self.rows_for)
            raise RuntimeError(f"of {self.num_rows} rows of experts, {returned} are to be returned to their tokens")
        if self.a2a_dtype not in A2A_DTYPES:
            raise ValueError(f"a2a_dtype must be one of {', '.join(A2A_DTYPES)}; got {self.a2a_dtype!r}")

    @property
    def num_home(self) -> int:
        """Number of this rank's tokens' rows that travel."""
        return sum(self.rows_from)

    def part(self, chosen: Tensor) -> "RowExchange":
        """The exchange of some rows only. One all-to-all of a byte a row, and one host synchronisation.

        Args:
            chosen: bool, which rows of this rank's tokens, in the order of ``to_tokens``.
        """
        return self.begin_part(chosen).wait()

    def begin_part(self, chosen: Tensor) -> "Pending[RowExchange]":
        """As ``part``; the host waits in ``wait`` alone, and only for what was queued until now."""
        chosen = chosen.to(torch.uint8)
        chosen_there = self._begin(chosen, self.rows_from, self.rows_for).wait()
        ends = torch.tensor(list(accumulate((*self.rows_for, *self.rows_from), initial=0)), device="cpu")
        ends = ends.to(chosen.device, non_blocking=True)
        sums = torch.nn.functional.pad(torch.cat([chosen_there, chosen]).cumsum(0), (1, 0))
        counts = sums[ends].diff().to("cpu", non_blocking=chosen.is_cuda)
        copied = torch.cuda.current_stream().record_event() if chosen.is_cuda else None

        def finish() -> RowExchange:
            if copied is not None:
                copied.synchronize()
            ranks, rows = len(self.rows_for), counts.tolist()
            rows_for, rows_from = rows[:ranks], rows[ranks:]
            order = torch.arange(self.num_rows, device=chosen.device) if self.order is None else self.order
            # Where the number is known, repeating 0 or 1 times chooses without a synchronisation.
            order = order.repeat_interleave(chosen_there.long(), output_size=sum(rows_for))
            return replace(self, order=order, places=None, rows_for=rows_for, rows_from=rows_from)

        return Pending(finish)

    def in_blocks(self, counts_L: Sequence[int], blocks_L: Sequence[int], device: torch.device) -> "RowExchange":
        """The same rows, among those that local experts have padded at the ends of theirs.

        Args:
            counts_L: numbers of rows of each local expert, unless the exchange knows better.
            blocks_L: numbers of rows from each to the next, with padding.
            device: of the rows.
        """
        counts_L = counts_L if self.counts_L is None else self.counts_L
        if list(counts_L) == list(blocks_L):
            return self
        counts, blocks = torch.tensor([list(counts_L), list(blocks_L)], device="cpu").to(device, non_blocking=True)
        padding = blocks - counts
        before = (padding.cumsum(0) - padding).repeat_interleave(counts, output_size=self.num_rows)
        order = torch.arange(self.num_rows, device=device) if self.order is None else self.order
        order = order + before[order]
        return replace(self, order=order, places=None, num_rows=sum(blocks_L))

    def to_tokens(self, x_PD: Tensor) -> Tensor:
        """Rows by expert [P, ...] -> rows of this rank's tokens, those of expert 0 first."""
        return self._exchange(self._that_travel(x_PD), self.rows_for, self.rows_from)

    def begin_to_tokens(self, x_PD: Tensor) -> Pending[Tensor]:
        """As ``to_tokens``, beside what is queued until ``wait``; x may be freed or overwritten as soon as it returns.

        What travels is a copy: Megatron frees the storage of activations that it recomputes, whoever else holds it.
        """
        rows = self._that_travel(x_PD)
        if rows is x_PD and not self._quantizes(x_PD):
            rows = x_PD.clone()
        return self._begin(rows, self.rows_for, self.rows_from)

    def to_experts(self, x_PD: Tensor) -> Tensor:
        """The other way; rows that do not travel are 0."""
        received, places = self.received(x_PD)
        return received if places is None else received.index_select(0, places)

    def received(self, x_PD: Tensor) -> tuple[Tensor, Optional[Tensor]]:
        """What comes back, and of which of these rows ``to_experts`` would be made (None: of all, as they lie)."""
        received = self._exchange(x_PD, self.rows_from, self.rows_for)
        if self.order is None or self.places is not None:
            return received, self.places
        zeros = received.new_zeros(self.num_rows, *received.shape[1:])
        return zeros.index_copy_(0, self.order.long(), received), None

    def _that_travel(self, x_PD: Tensor) -> Tensor:
        return x_PD if self.order is None else x_PD.index_select(0, self.order)

    def _quantizes(self, x: Tensor) -> bool:
        return self.a2a_dtype == "fp8" and x.is_floating_point()

    def _exchange(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        _, _, received, quantizes = self._all_to_all(x, send, receive, async_op=False)
        return dequantized(received, x.dtype) if quantizes else received

    def _begin(self, x: Tensor, send: list[int], receive: list[int]) -> Pending[Tensor]:
        work, sent, received, quantizes = self._all_to_all(x, send, receive, async_op=True)

        def finish(sent: Tensor = sent) -> Tensor:  # holds what is sent
            work.wait()
            return dequantized(received, x.dtype) if quantizes else received

        return Pending(finish)

    def _all_to_all(self, x: Tensor, send: list[int], receive: list[int], async_op: bool) -> tuple:
        """What to wait for (None: nothing), what is sent, what is received, and whether these are quantized."""
        quantizes = self._quantizes(x)
        sent = quantized(x) if quantizes else x.contiguous()
        received = sent.new_empty(sum(receive), *sent.shape[1:])
        work = dist.all_to_all_single(received, sent, receive, send, group=self.group, async_op=async_op)
        return work, sent, received, quantizes


def quantized(x_PD: Tensor) -> Tensor:
    """Rows [P, D] in floating point -> bytes [P, Q = D + 4]: e4m3, rounded to nearest, and the row's scale in fp32.

    The scale is the row's largest magnitude / 448, e4m3's own largest. A row that is not finite becomes NaN.
    """
    num_rows, width = x_PD.shape
    largest_P1 = x_PD.abs().amax(dim=1, keepdim=True).float()
    # A row of zeros, too, needs a number to be divided by.
    scale_P1 = (largest_P1 / torch.finfo(FP8).max).clamp_min(torch.finfo(torch.float32).tiny)
    bytes_PQ = torch.empty(num_rows, width + SCALE_BYTES, dtype=torch.uint8, device=x_PD.device)
    bytes_PQ[:, :width].view(FP8).copy_(x_PD / scale_P1)
    bytes_PQ[:, width:] = scale_P1.view(torch.uint8)
    return bytes_PQ


def dequantized(bytes_PQ: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows [P, D] in ``dtype`` from bytes [P, Q], see ``quantized``."""
    width = bytes_PQ.shape[1] - SCALE_BYTES
    # A copy, for their place in a row may not be aligned.
    scale_P1 = bytes_PQ[:, width:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    return (bytes_PQ[:, :width].view(FP8).to(torch.float32) * scale_P1).to(dtype)
