"""Under torchrun with two processes: gathers and reductions of tensors whose shapes differ between the ranks."""

import torch
import torch.distributed as dist

from megatron_moe_spec.integration.cpu import enable

SHAPES = {"rows differ": [(3, 2), (1, 2)], "one is empty": [(0, 2), (4, 2)], "equal": [(2, 2), (2, 2)]}


def tensor_of(rank, shape):
    return torch.arange(shape[0] * shape[1], dtype=torch.float32).view(shape) + 10 * rank


def check_all_gather(shapes, **options):
    outputs = [torch.full(shape, torch.nan) for shape in shapes]
    work = dist.all_gather(outputs, tensor_of(dist.get_rank(), shapes[dist.get_rank()]), **options)
    if options.get("async_op"):
        work.wait()
    for rank, output in enumerate(outputs):
        assert torch.equal(output, tensor_of(rank, shapes[rank])), (shapes, output)


def check_reduce_scatter(shapes, **options):
    rank = dist.get_rank()
    inputs = [tensor_of(rank, shape) for shape in shapes]
    output = torch.full(shapes[rank], torch.nan)
    work = dist.reduce_scatter(output, inputs, **options)
    if options.get("async_op"):
        work.wait()
    assert torch.equal(output, sum(tensor_of(r, shapes[rank]) for r in range(2))), (shapes, output)
    assert torch.equal(inputs[0], tensor_of(rank, shapes[0]))


if __name__ == "__main__":
    enable()
    dist.init_process_group("gloo")
    for shapes in SHAPES.values():
        for options in ({}, {"async_op": True}, {"group": dist.new_group([0, 1])}):
            check_all_gather(shapes, **options)
            check_reduce_scatter(shapes, **options)
    dist.destroy_process_group()
