"""Collectives that gloo lacks: all_gather and reduce_scatter of lists with tensors of different sizes.

Megatron's all-to-all dispatcher uses them with expert tensor parallelism.
"""

import torch
import torch.distributed as dist


def allow_uneven_sizes() -> None:
    gather, scatter = dist.all_gather, dist.reduce_scatter

    def all_gather(tensor_list, tensor, group=None, async_op=False):
        if len({part.shape for part in tensor_list}) == 1:
            return gather(tensor_list, tensor, group=group, async_op=async_op)
        longest = max(len(part) for part in tensor_list)
        padded = tensor.new_zeros(longest, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        received = [torch.empty_like(padded) for _ in tensor_list]
        gather(received, padded, group=group)
        for part, whole in zip(tensor_list, received):
            part.copy_(whole[: len(part)])

    def reduce_scatter(output, input_list, op=dist.ReduceOp.SUM, group=None, async_op=False):
        if len({part.shape for part in input_list}) == 1:
            return scatter(output, input_list, op=op, group=group, async_op=async_op)
        for rank, part in enumerate(input_list):
            total = part.contiguous().clone()
            dist.all_reduce(total, op=op, group=group)
            if rank == dist.get_rank(group):
                output.copy_(total)

    dist.all_gather, dist.reduce_scatter = all_gather, reduce_scatter
