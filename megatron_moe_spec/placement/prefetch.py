"""What a trace promises to engines that fetch experts when they need them; no placement matters here."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from megatron_moe_spec.traces.counts import loads, transitions
from megatron_moe_spec.traces.schema import Trace


def transition_scores(trace: Trace) -> Tensor:
    """[M - 1, E, E] fp32: the probability that a token of the row's expert goes to the column's in the next layer."""
    experts = trace.experts_TMK.unbind(dim=1)
    counts = [transitions(*pair, trace.num_experts).float() for pair in zip(experts, experts[1:])]
    return torch.stack([count / count.sum(dim=1, keepdim=True).clamp_min(1) for count in counts])


def popularity_scores(trace: Trace) -> Tensor:
    """[M - 1, E, E] fp32: the tokens of the column's expert in the next layer, whatever the row's."""
    return loads(trace)[1:, None].float().expand(-1, trace.num_experts, -1)


def predicted_hits(scores: Tensor, trace: Trace, num_predicted: int) -> float:
    """Share of tokens' experts that are among as many predicted one layer before: those of the highest scores.

    ``scores`` [M - 1, E, E] of a token's experts in one layer are added up for the next.
    """
    hits = total = 0
    for layer, scores_EE in enumerate(scores):
        here_TK, next_TK = trace.experts_TMK[:, layer].long(), trace.experts_TMK[:, layer + 1].long()
        with_none_EE = pad(scores_EE, (0, 0, 0, 1))  # a last row of zeros, for dropped ones
        scores_TE = embedding_bag(here_TK % len(with_none_EE), with_none_EE, mode="sum")
        predicted_TE = torch.zeros_like(scores_TE).scatter_(1, scores_TE.topk(num_predicted).indices, 1)
        is_there_TK = next_TK >= 0
        hits += int((predicted_TE.gather(1, next_TK.clamp_min(0)) * is_there_TK).sum())
        total += int(is_there_TK.sum())
    return hits / total


def cache_hits(trace: Trace, num_slots: int) -> tuple[float, float]:
    """Hit rates of caches of ``num_slots`` experts in each layer, which see the tokens in order.

    The experts of a token are looked up together, then all enter. The least recently used (LRU) of the others leave, or
    the least frequently used in the trace up to here (LFU); of those, the least recently used; of those, the ones of
    lower indices. ``num_slots`` is not less than K.
    """
    num_tokens, num_layers = trace.experts_TMK.shape[:2]
    rows = np.arange(2 * num_layers)  # a cache each: LRU, then LFU
    row_X1 = rows[:, None]
    weight_X1 = np.repeat([0, num_tokens], num_layers)[:, None]
    # The least value leaves; infinite: not in the cache. Dropped experts, -1, use the last column.
    values_XE = np.full((len(rows), trace.num_experts + 1), np.inf)
    uses_XE = np.zeros(values_XE.shape)
    sizes_X = np.zeros(len(rows), dtype=np.int64)
    hits_X = np.zeros(len(rows), dtype=np.int64)
    for token, experts_MK in enumerate(trace.experts_TMK.long().numpy()):
        experts_XK = np.concatenate([experts_MK, experts_MK])
        is_cached_XK = values_XE[row_X1, experts_XK] < np.inf
        hits_X += is_cached_XK.sum(axis=1)
        sizes_X += ((experts_XK >= 0) & ~is_cached_XK).sum(axis=1)
        values_XE[row_X1, experts_XK] = np.inf  # they stay
        while (is_full_X := sizes_X > num_slots).any():
            values_XE[rows[is_full_X], values_XE.argmin(axis=1)[is_full_X]] = np.inf
            sizes_X -= is_full_X
        uses_XE[row_X1, experts_XK] += 1
        values_XE[row_X1, experts_XK] = weight_X1 * uses_XE[row_X1, experts_XK] + token
        values_XE[:, -1] = np.inf
    lru, lfu = hits_X.reshape(2, -1).sum(axis=1) / int((trace.experts_TMK >= 0).sum())
    return float(lru), float(lfu)
