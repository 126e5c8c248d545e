"""The tokens of a trace that placements are fitted to, and those that judge them."""

from dataclasses import replace
from typing import Union

import torch
from torch import Tensor

from megatron_moe_spec.traces.schema import Trace


def halves(trace: Trace) -> tuple[Trace, Trace]:
    """Cuts a trace between the two sequences that are nearest to its middle, or within its only sequence.

    Raises:
        ValueError: the trace has one token.
    """
    num_tokens = len(trace.sequence_T)
    if num_tokens < 2:
        raise ValueError("the trace has one token, but half is fitted to and half judges: record a longer one")
    borders = 1 + torch.nonzero(trace.sequence_T.diff())[:, 0]
    middle = num_tokens // 2
    cut = int(borders[(borders - middle).abs().argmin()]) if len(borders) else middle
    return tokens(trace, slice(0, cut)), tokens(trace, slice(cut, None))


def some_batches(trace: Trace, most: int) -> Trace:
    """The trace of whole batches at equal distances, of about so many tokens in all."""
    kept = trace.batch_T.unique()[:: -(-len(trace.batch_T) // most)]
    return trace if len(kept) == len(trace.batch_T.unique()) else tokens(trace, torch.isin(trace.batch_T, kept))


def tokens(trace: Trace, which: Union[slice, Tensor]) -> Trace:
    """The trace of some of its tokens."""
    parts = {name: getattr(trace, name)[which] for name in ("experts_TMK", "batch_T", "sequence_T")}
    return replace(trace, **parts)


def sample(trace: Trace, most: int) -> Trace:
    """The trace of at most so many of its tokens, at equal distances."""
    return tokens(trace, slice(None, None, -(-len(trace.sequence_T) // most)))
