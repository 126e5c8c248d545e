"""A program: launches of kernels by ``Launch`` compared with Triton's own, over the CUDA driver that does nothing."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import null_driver

launched = null_driver.install()

import itertools  # noqa: E402
import unittest.mock  # noqa: E402

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from megatron_moe_spec.kernels import launch as module  # noqa: E402
from megatron_moe_spec.kernels.launch import Launch  # noqa: E402


@triton.jit(do_not_specialize=["factor", "number"])
def _kernel(x_ptr, out_ptr, y_ptr, factor, number, size, stride, BLOCK: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + column * stride, mask=column < size, other=0.0).to(tl.float32) * factor + number
    if y_ptr is not None:
        x += tl.load(y_ptr + column, mask=column < size, other=0.0)
    tl.store(out_ptr + column, x, mask=column < size)


launch = Launch(_kernel, BLOCK=64, num_warps=2)
run, by_triton = JITFunction.run, []


def counted_run(self, *arguments, **options):
    kernel = run(self, *arguments, **options)
    by_triton.append(kernel.hash)
    return kernel


JITFunction.run = counted_run


def call(x, y, factor, number, sizes):
    """How many kernels were launched, and how many of these Triton's own way."""
    before, own = launched(), len(by_triton)
    launch(3, (x, torch.empty(512, dtype=x.dtype)), (factor, number), sizes, (y,))
    return launched() - before, len(by_triton) - own


def test_a_kernel_that_is_known_is_launched_past_triton():
    dtypes, sizes = (torch.float32, torch.bfloat16), ((16, 1), (17, 1), (16, 17), (1, 32))
    memory = {dtype: torch.zeros(1024, dtype=dtype) for dtype in dtypes}
    found = {}
    for dtype, size, has_y, number in itertools.product(dtypes, sizes, (False, True), (1, 16, 2**31 - 1)):
        x, y = memory[dtype], memory[torch.float32] if has_y else None
        module._IS_KNOWN = False  # which kernel would Triton launch?
        assert call(x, y, 0.5, number, size) == (1, 1)
        module._IS_KNOWN = True
        known = len(launch._compiled)
        once, twice = call(x, y, 2.0, number, size), call(x, y, 3.0, number, size)
        assert once == (1, len(launch._compiled) - known) and twice == (1, 0)
        # What Launch takes for the same, Triton does.
        ((key, _),) = [item for item in launch._compiled.items() if item[0] == key_of(x, y, size)]
        assert found.setdefault(key, by_triton[-1]) == by_triton[-1], key
    assert len(found) == len(dtypes) * len(sizes) * 2 == len(launch._compiled)


def key_of(x, y, size):
    return (0, *size, x.dtype, x.dtype, None if y is None else y.dtype)


def test_what_is_not_known_goes_tritons_own_way():
    x = torch.zeros(1024)
    call(x, None, 1.0, 2, (16, 1))
    assert call(x, None, 1.0, 2, (16, 1)) == (1, 0)
    for _ in range(2):
        assert call(x[1:], None, 1.0, 2, (16, 1)) == (1, 1)  # not aligned
        assert call(x, x[2:], 1.0, 2, (16, 1)) == (1, 1)
        assert call(x, None, 1.0, 2**31, (16, 1)) == (1, 1)  # 64 bits
    assert call(x, None, 1.0, 2, (16, 1)) == (1, 0)


def test_whoever_watches_launches_is_told_of_them():
    x, told = torch.zeros(1024), []
    call(x, None, 1.0, 2, (16, 1))
    _kernel.pre_run_hooks.append(lambda *arguments, **options: told.append("before"))
    assert call(x, None, 1.0, 2, (16, 1)) == (1, 1) and told == ["before"]
    _kernel.pre_run_hooks.clear()

    def hook(metadata):
        told.append("launched")

    owner = getattr(getattr(triton, "knobs", None), "runtime", None)
    if owner is None:  # before 3.4
        from triton.compiler import CompiledKernel as owner
    before = owner.launch_enter_hook
    chain = hasattr(before, "add")
    before.add(hook) if chain else setattr(owner, "launch_enter_hook", hook)
    assert call(x, None, 1.0, 2, (16, 1)) == (1, 1) and told[1:] == ["launched"]
    before.remove(hook) if chain else setattr(owner, "launch_enter_hook", before)
    assert call(x, None, 1.0, 2, (16, 1)) == (1, 0) and len(told) == 2


def test_torch_compile_sees_tritons_own_launch():
    x = torch.zeros(1024)
    call(x, None, 1.0, 2, (16, 1))
    with unittest.mock.patch("torch.compiler.is_compiling", lambda: True):
        assert call(x, None, 1.0, 2, (16, 1)) == (1, 1)
    assert call(x, None, 1.0, 2, (16, 1)) == (1, 0)


def test_an_unknown_release_is_left_to_triton():
    x = torch.zeros(1024)
    module._IS_KNOWN = False
    assert call(x, None, 1.0, 2, (16, 1)) == call(x, None, 1.0, 2, (16, 1)) == (1, 1)
    module._IS_KNOWN = True


if __name__ == "__main__":
    for name, test in list(globals().items()):
        if name.startswith("test_"):
            test()
            print(name)
    print("triton", triton.__version__)
