"""A message that rides on the hidden states between pipeline stages, and one that rides back on their gradient.

Extra rows at the end of a tensor that is sent anyway: no communication of its own, so nothing that could block.
Suffixes: S sequence (this rank's), B micro-batch, H hidden size, T = S * B tokens, W values of a message per token.
"""

from collections.abc import Callable
from math import ceil
from typing import Any, Optional

import torch
from torch import Tensor


def packed_length(sequence: int, hidden_size: int, dtype: torch.dtype, width: int) -> int:
    """Length of a sequence [S, B, H] with the rows of a message [T, W], and its mark, at its end."""
    return sequence + ceil((sequence * width * _parts(dtype) + len(_MARK)) / hidden_size)


def sequence_length(packed: int, hidden_size: int, dtype: torch.dtype, width: int) -> int:
    """The inverse of ``packed_length``."""
    return (packed * hidden_size - len(_MARK)) // (hidden_size + width * _parts(dtype))


def encode(message_TW: Optional[Tensor], like_SBH: Tensor, width: int) -> Tensor:
    """Message as marked rows [rows, B, H] in the dtype of ``like_SBH``; zeros for None.

    In bf16 and fp16 a number is the sum of two, which keeps 16 (22) bits of it.
    """
    sequence, batch, hidden_size = like_SBH.shape
    num_rows = packed_length(sequence, hidden_size, like_SBH.dtype, width) - sequence
    rows = like_SBH.new_zeros(num_rows, batch, hidden_size)
    if message_TW is not None:
        # As many numbers as ``decode`` looks for, so that both parts are where it looks for them.
        numbers = torch.nn.functional.pad(message_TW, (0, 0, 0, sequence * batch - len(message_TW))).reshape(-1).float()
        if _parts(rows.dtype) == 2:
            high = numbers.to(rows.dtype)
            numbers = torch.cat([high, (numbers - high.float()).to(rows.dtype)])
        rows.view(-1)[: len(numbers)] = numbers
    rows.view(-1)[-len(_MARK) :] = _mark(rows)
    return rows


def decode(rows: Tensor, num_tokens: int, width: int) -> Tensor:
    """The message [T, W] of ``encode``, in fp32."""
    parts = rows.reshape(-1)[: _parts(rows.dtype) * num_tokens * width].float().view(-1, num_tokens, width)
    return parts.sum(dim=0)


def is_marked(rows: Tensor) -> Tensor:
    """Whether rows are of ``encode``: a bool scalar on their device."""
    return (rows.reshape(-1)[-len(_MARK) :] == _mark(rows)).all()


# Small whole numbers, which every floating dtype holds exactly.
_MARK = (-3.0, 5.0, -7.0, 11.0)


def _mark(rows: Tensor) -> Tensor:
    return torch.tensor(_MARK, dtype=rows.dtype, device=rows.device)


def _parts(dtype: torch.dtype) -> int:
    return 2 if dtype.itemsize < 4 else 1


class Append(torch.autograd.Function):
    """[S, B, H], rows -> [S + rows, B, H]; backward gives the gradient's last rows to ``receive`` and drops them."""

    @staticmethod
    def forward(ctx: Any, hidden_SBH: Tensor, rows: Tensor, receive: Callable[[Tensor], None]) -> Tensor:
        ctx.num_rows, ctx.receive = len(rows), receive
        return torch.cat([hidden_SBH, rows])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        length = len(gradient) - ctx.num_rows
        ctx.receive(gradient[length:])
        return gradient[:length], None, None


class Strip(torch.autograd.Function):
    """[S + rows, B, H] -> its first S, a view; backward puts ``answer`` in the place of the rows' gradient.

    ``answer`` takes the gradient [S, B, H], for its shape and dtype, and returns rows.
    """

    @staticmethod
    def forward(ctx: Any, packed: Tensor, length: int, answer: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.answer = answer
        return packed[:length]

    @staticmethod
    def backward(ctx: Any, gradient_SBH: Tensor) -> tuple[Tensor, None, None]:
        return torch.cat([gradient_SBH, ctx.answer(gradient_SBH)]), None, None


def bits_to_numbers(bits_TE: Tensor) -> Tensor:
    """Bool [T, E] -> [T, ceil(E / 8)] fp32 of whole numbers below 256, which every floating dtype holds exactly."""
    padded = torch.nn.functional.pad(bits_TE.float(), (0, -bits_TE.shape[1] % 8))
    return padded.unflatten(1, (-1, 8)) @ _powers(bits_TE.device)


def numbers_to_bits(numbers: Tensor, num_bits: int) -> Tensor:
    """The inverse of ``bits_to_numbers``: bool [T, num_bits]."""
    bits = (numbers.unsqueeze(-1) / _powers(numbers.device)).floor() % 2
    return bits.flatten(1)[:, :num_bits] > 0


def _powers(device: torch.device) -> Tensor:
    return 2.0 ** torch.arange(8, dtype=torch.float32, device=device)
