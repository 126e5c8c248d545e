"""Counts over the tokens of a routing trace. Suffixes: T tokens, M MoE layers, E experts, K experts of a token."""

from dataclasses import replace

import torch
from torch import Tensor

from megatron_moe_spec.traces.schema import Trace

_PART = 2**14  # tokens whose pairs of experts are in memory at once


def loads(trace: Trace) -> Tensor:
    """[M, E] int64: tokens that each expert served."""
    layers = (layer.flatten().long() for layer in trace.experts_TMK.unbind(dim=1))
    return torch.stack([torch.bincount(layer[layer >= 0], minlength=trace.num_experts) for layer in layers])


def transitions(experts_TK: Tensor, experts_next_TK: Tensor, num_experts: int) -> Tensor:
    """[E, E] int64: tokens that the row's expert served in one layer and the column's in the next; negative: none."""
    columns = num_experts + 1  # a last one for those that have none, which is cut off
    joint = torch.zeros(columns * columns, dtype=torch.int64)
    for here_TK, next_TK in zip(experts_TK.split(_PART), experts_next_TK.split(_PART)):
        here_TK, next_TK = (part.long().clamp_min(-1) % columns for part in (here_TK, next_TK))
        pairs_TKK = here_TK[:, :, None] * columns + next_TK[:, None]
        joint += torch.bincount(pairs_TKK.flatten(), minlength=columns * columns)
    return joint.view(columns, columns)[:-1, :-1]


def coactivation(experts_TK: Tensor, num_experts: int) -> Tensor:
    """[E, E] int64, symmetric, with 0 on the diagonal: tokens that both experts served in a layer."""
    return transitions(experts_TK, experts_TK, num_experts).fill_diagonal_(0)


def shuffled(trace: Trace, seed: int = 0) -> Trace:
    """The same trace with the tokens of each layer permuted: loads stay, what ties layers together is gone."""
    generator = torch.Generator().manual_seed(seed)
    layers = [layer[torch.randperm(len(layer), generator=generator)] for layer in trace.experts_TMK.unbind(dim=1)]
    return replace(trace, experts_TMK=torch.stack(layers, dim=1))


def recombined(trace: Trace, seed: int = 0) -> Trace:
    """The same, and what ties a token's experts is gone, too: the K columns are permuted. Experts may come twice."""
    generator = torch.Generator().manual_seed(seed)
    experts_TMK = torch.empty_like(trace.experts_TMK)
    num_tokens, num_layers, top_k = experts_TMK.shape
    # Rows are ascending, so a column of them holds some experts more than others: mix the columns first.
    order_TMK = torch.rand(num_tokens, num_layers, top_k, generator=generator).argsort(dim=2)
    mixed_TMK = trace.experts_TMK.gather(2, order_TMK)
    for layer in range(num_layers):
        for column in range(top_k):
            order_T = torch.randperm(num_tokens, generator=generator)
            experts_TMK[:, layer, column] = mixed_TMK[order_T, layer, column]
    return replace(trace, experts_TMK=experts_TMK)
