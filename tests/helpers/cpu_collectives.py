"""Two ranks: gathers and reductions of tensors whose shapes gloo does not take.

The name of the backend is the only argument.
"""

import datetime
import sys

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_moe_spec.cpu import enable

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


def check_one_tensor_for_all_ranks(shape, **options):
    """Stacked [2, n, m] and concatenated [2 n, m], as both modules and under all names."""
    rank = dist.get_rank()
    expected = torch.stack([tensor_of(0, shape), tensor_of(1, shape)])
    for stacked in (expected, expected.flatten(0, 1)):
        for module in (dist, distributed_c10d):
            for name in ("all_gather_into_tensor", "_all_gather_base", "all_gather_single"):
                if hasattr(module, name):
                    output = torch.full_like(stacked, torch.nan)
                    finish(getattr(module, name)(output, tensor_of(rank, shape), **options), **options)
                    assert torch.equal(output, stacked), (name, output)
            for name in ("reduce_scatter_tensor", "_reduce_scatter_base", "reduce_scatter_single"):
                if hasattr(module, name):
                    output = torch.full(shape, torch.nan)
                    finish(getattr(module, name)(output, stacked.clone(), **options), **options)
                    assert torch.equal(output, 2 * expected[rank]), (name, output)
    output = torch.full_like(expected, torch.nan)
    dist.all_gather_into_tensor(output_tensor=output, input_tensor=tensor_of(rank, shape))
    assert torch.equal(output, expected)


def finish(work, async_op=False, **_):
    if async_op:
        work.wait()


if __name__ == "__main__":
    enable()
    backend = sys.argv[1]
    device = {} if backend == "gloo" else {"device_id": torch.device("cuda", 0)}
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=60), **device)
    assert dist.get_backend() == dist.get_backend(dist.new_group([0, 1], backend=backend)) == "gloo"
    for shapes in SHAPES.values():
        for options in ({}, {"async_op": True}, {"group": dist.new_group([0, 1])}):
            check_all_gather(shapes, **options)
            check_reduce_scatter(shapes, **options)
    for options in ({}, {"async_op": True}, {"group": dist.new_group([0, 1])}):
        check_one_tensor_for_all_ranks((3, 2), **options)
    dist.destroy_process_group()
