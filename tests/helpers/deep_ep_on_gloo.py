"""A stand-in on gloo for the library deep_ep, to run Megatron's own flex dispatcher on CPU.

What it stands for, as published in github.com/deepseek-ai/DeepEP:

- ``Buffer`` (deep_ep/buffers/legacy.py): a rank receives each token once that any of its experts is to have, ordered
  by (source rank, token), with the numbers of its own experts, -1 for others; ``combine`` sums what comes back. A
  handle dispatches again.
- ``HybridEPBuffer`` (deep_ep/hybrid_ep_buffer.py, branch hybrid-ep): rows ordered by (local expert, source rank,
  token), as its test compares bitwise; each expert's padded by zeros to a multiple of ``pad_multiple``.

Import only after the CPU backend is enabled, and before Megatron's dispatchers.
"""

import sys
from types import ModuleType, SimpleNamespace

import torch
import torch.distributed as dist


class Order:
    """How received rows are ordered: ``reversed`` breaks the contract, in both directions alike."""

    reversed = False


def _flip(x):
    return x.flip(0) if Order.reversed else x


def _send(x, send, receive, group):
    output = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(output, x.contiguous(), receive, send, group=group)
    return output


def _gather(x, group):
    output = x.new_empty(group.size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(output, x.contiguous(), group=group)
    return output


class EventOverlap:
    def __init__(self, event=None):
        pass

    def current_stream_wait(self):
        pass


class Buffer:
    def __init__(self, group, num_nvl_bytes=0, num_rdma_bytes=0):
        self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes

    @staticmethod
    def set_num_sms(number):
        pass

    @staticmethod
    def get_dispatch_config(ranks):
        zero = lambda hidden_bytes, ranks: 0  # noqa: E731
        return SimpleNamespace(get_nvl_buffer_size_hint=zero, get_rdma_buffer_size_hint=zero)

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx, num_experts, **others):
        ranks = self.group.size()
        chosen = torch.zeros(len(topk_idx), num_experts + 1, dtype=torch.bool)
        chosen = chosen.scatter_(1, topk_idx % (num_experts + 1), True)[:, :num_experts]
        in_rank = chosen.view(len(topk_idx), ranks, -1).any(dim=2)
        return in_rank.sum(0).int(), None, chosen.sum(0).int(), in_rank, EventOverlap()

    def dispatch(
        self,
        x,
        handle=None,
        is_token_in_rank=None,
        topk_idx=None,
        topk_weights=None,
        num_tokens_per_expert=None,
        **others,
    ):
        group = self.group
        if handle is None:
            ranks = [mask.nonzero().squeeze(1) for mask in is_token_in_rank.T]
            numbers = _gather(is_token_in_rank.sum(0), group).view(group.size(), -1)[:, group.rank()]
            handle = torch.cat(ranks), [len(tokens) for tokens in ranks], numbers.tolist(), len(x)
            local = len(num_tokens_per_expert) // group.size()
            experts, probs = (_flip(_send(y[handle[0]], *handle[1:3], group)) for y in (topk_idx, topk_weights))
            mine = (experts >= 0) & (experts // local == group.rank())
            experts, probs = torch.where(mine, experts % local, -1), torch.where(mine, probs, 0.0)
            counts = torch.bincount(experts[mine], minlength=local).tolist()
        else:
            experts = probs = counts = None
        tokens, send, receive, _ = handle
        return _flip(_send(x[tokens], send, receive, group)), experts, probs, counts, handle, EventOverlap()

    def combine(self, x, handle, topk_weights=None, **others):
        tokens, send, receive, number = handle

        def combined(rows):
            back = _send(_flip(rows), receive, send, self.group)
            return back.new_zeros(number, *back.shape[1:]).index_add_(0, tokens, back)

        return combined(x), None if topk_weights is None else combined(topk_weights), EventOverlap()


class HybridEPBuffer:
    def __init__(self, group, num_local_experts, **others):
        self.group, self.local = group, num_local_experts

    def dispatch_with_permute(self, *, hidden, routing_map=None, probs=None, handle=None, pad_multiple=None, **others):
        if handle is None:
            mine = slice(self.group.rank() * self.local, (self.group.rank() + 1) * self.local)
            whole = _gather(routing_map.to(torch.uint8), self.group).bool()[:, mine]
            # For each local expert its tokens, and how many rows fill it up.
            tokens = [_flip(chosen.nonzero().squeeze(1)) for chosen in whole.T]
            padding = [-len(chosen) % (pad_multiple or 1) for chosen in tokens]
            handle = tokens, padding, len(hidden), mine
        tokens, padding, _, mine = handle
        pad = torch.nn.functional.pad
        rows = _gather(hidden, self.group)
        rows = torch.cat([pad(rows[chosen], (0, 0, 0, fill)) for chosen, fill in zip(tokens, padding)])
        permuted_probs = None
        if probs is not None:
            columns = _gather(probs, self.group)[:, mine].T
            permuted_probs = [pad(p[chosen], (0, fill)) for p, chosen, fill in zip(columns, tokens, padding)]
            permuted_probs = torch.cat(permuted_probs)
        counts = torch.tensor([len(chosen) + fill for chosen, fill in zip(tokens, padding)])
        return rows, permuted_probs, None, counts, handle

    def combine_with_unpermute(self, *, hidden, probs=None, handle=None, **others):
        tokens, padding, number, mine = handle
        group, sizes = self.group, [len(chosen) + fill for chosen, fill in zip(tokens, padding)]
        total = hidden.new_zeros(group.size() * number, hidden.shape[1])
        total_probs = hidden.new_zeros(group.size() * number, group.size() * self.local, dtype=torch.float32)
        for expert, (chosen, rows) in enumerate(zip(tokens, hidden.split(sizes))):
            total.index_add_(0, chosen, rows[: len(chosen)])
            if probs is not None:
                total_probs[chosen, mine.start + expert] = probs.split(sizes)[expert][: len(chosen)]
        own = slice(group.rank() * number, (group.rank() + 1) * number)
        dist.all_reduce(total, group=group)
        dist.all_reduce(total_probs, group=group)
        return total[own].clone(), None if probs is None else total_probs[own].clone()


def use_deep_ep() -> None:
    """Makes the library importable."""
    package, utils = ModuleType("deep_ep"), ModuleType("deep_ep.utils")
    package.Buffer, package.HybridEPBuffer, package.utils = Buffer, HybridEPBuffer, utils
    utils.EventHandle, utils.EventOverlap = object, EventOverlap
    sys.modules.update({"deep_ep": package, "deep_ep.utils": utils})
