"""Promises of the CPU back end about devices, checked in an interpreter of its own. Needs no Megatron."""

import pickle
import threading
import types

import torch
from torch.overrides import _get_current_function_mode_stack

from megatron_moe_spec.cpu import enable

CPU = torch.device("cpu")


def check_factories():
    for device in ("cuda", "cuda:0", 0, torch.device("cuda"), torch.device("cuda", 0), torch.cuda.current_device()):
        for tensor in (
            torch.empty(2, device=device),
            torch.tensor([1.0], device=device),
            torch.ones(2).new_zeros(2, device=device),
            torch.zeros_like(torch.ones(2), device=device),
            torch.ones(2).to(device),
            torch.ones(2).to(device, torch.bfloat16),
            torch.ones(2).to(device=device),
        ):
            assert tensor.device == CPU and not tensor.is_cuda
    for make in (
        torch.device("cuda"),
        torch.device("cuda", 0),
        torch.utils._device.DeviceContext("cuda"),
        torch.utils._device.DeviceContext(0),
    ):
        with make:
            assert torch.empty(2).device == torch.tensor(1.0).device == torch.ones(2).new_zeros(2).device == CPU
    with torch.device("meta"):
        assert torch.empty(2).device.type == torch.tensor(1.0).device.type == torch.arange(2).device.type == "meta"
        assert torch.empty(2, device="cuda").device == CPU
        assert torch.nn.Linear(2, 2).cuda().weight.device.type == "meta"
    torch.set_default_device("cuda")
    assert torch.zeros(2).device == CPU
    torch.set_default_device(None)


def check_all_that_take_a_device():
    names = {
        schema.name.removeprefix("aten::")
        for schema in torch._C._jit_get_all_schemas()
        if any(argument.name in ("device", "pin_memory") for argument in schema.arguments)
    }
    owners = [
        (owner, name)
        for owner in (torch, torch.Tensor)
        for name in sorted(names - {"Generator"})
        if hasattr(owner, name) and not name.startswith("_")
    ]
    assert len(owners) > 40
    for owner, name in owners:
        assert isinstance(getattr(owner, name), types.FunctionType), name


def check_each_factory():
    data, indices = torch.ones(2, 2), torch.tensor([[0, 1], [0, 1]])
    pointers, columns, values = torch.tensor([0, 1, 2]), torch.tensor([0, 1]), torch.ones(2)
    calls = {
        torch.arange: (3,),
        torch.as_tensor: ([1.0],),
        torch.asarray: ([1.0],),
        torch.bartlett_window: (3,),
        torch.blackman_window: (3,),
        torch.empty: (3,),
        torch.empty_like: (data,),
        torch.empty_permuted: ((2, 3), (1, 0)),
        torch.empty_strided: ((2, 3), (3, 1)),
        torch.eye: (3,),
        torch.full: ((2,), 1.0),
        torch.full_like: (data, 1.0),
        torch.hamming_window: (3,),
        torch.hann_window: (3,),
        torch.kaiser_window: (3,),
        torch.linspace: (0, 1, 3),
        torch.logspace: (0, 1, 3),
        torch.normal: (0.0, 1.0, (2,)),
        torch.ones: (3,),
        torch.ones_like: (data,),
        torch.rand: (3,),
        torch.rand_like: (data,),
        torch.randint: (3, (2,)),
        torch.randint_like: (data, 3),
        torch.randn: (3,),
        torch.randn_like: (data,),
        torch.randperm: (3,),
        torch.scalar_tensor: (1.0,),
        torch.sparse_coo_tensor: (indices, values),
        torch.sparse_csc_tensor: (pointers, columns, values),
        torch.sparse_csr_tensor: (pointers, columns, values),
        torch.tensor: ([1.0],),
        torch.tril_indices: (2, 2),
        torch.triu_indices: (2, 2),
        torch.zeros: (3,),
        torch.zeros_like: (data,),
        torch.fft.fftfreq: (3,),
        torch.fft.rfftfreq: (3,),
        data.new_empty: (3,),
        data.new_empty_strided: ((2, 3), (3, 1)),
        data.new_full: ((2,), 1.0),
        data.new_ones: (3,),
        data.new_tensor: ([1.0],),
        data.new_zeros: (3,),
    }
    for make, args in calls.items():
        for device in ("cuda:0", torch.device("cuda"), 0):
            tensor = make(*args, device=device)
            assert tensor.device == CPU, make
            assert tensor.shape == make(*args).shape == make(*args, device=None).shape, make


def check_copies_that_are_none():
    tensor = torch.ones(2)
    assert tensor.cuda() is tensor
    assert tensor.cuda(non_blocking=True) is tensor
    assert tensor.to("cuda") is tensor
    assert tensor.pin_memory() is tensor
    assert torch.empty(2, pin_memory=True).device == CPU
    tensor.record_stream(torch.cuda.current_stream())


def check_what_is_not_a_device():
    assert torch.ones(2).to(torch.float64).dtype == torch.float64
    assert torch.ones(2).to("cpu").device == CPU
    assert torch.empty(2, device="meta").device.type == "meta"
    assert torch.sum(torch.ones(2, 3), 0).shape == (3,)


def check_modules():
    for move in (lambda m: m.cuda(), lambda m: m.to("cuda"), lambda m: m.to(torch.device("cuda"), torch.bfloat16)):
        module = move(torch.nn.Linear(2, 2))
        assert module.weight.device == CPU
    assert module.weight.dtype == torch.bfloat16
    with torch.device("meta"):
        module = torch.nn.Linear(2, 2, device=0)
        empty = torch.nn.Linear(2, 2).to_empty(device="cuda")
    assert module.weight.device == empty.weight.device == CPU
    assert torch.nn.LazyLinear(2).to("cuda").cuda()(torch.ones(1, 3)).shape == (1, 2)


def check_types():
    assert torch.ones(2).type() == "torch.cuda.FloatTensor"
    assert torch.ones(2, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.ones(2).type(torch.float64).dtype == torch.float64


def check_streams_and_events():
    stream = torch.cuda.Stream()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    with torch.cuda.stream(stream):
        end = stream.record_event(end)
    stream.wait_stream(torch.cuda.current_stream())
    stream.wait_event(end)
    torch.cuda.synchronize()
    assert end.query() and start.elapsed_time(end) >= 0


def check_queries():
    assert torch.cuda.is_available()
    assert torch.cuda.device_count() == 1
    assert torch.cuda.memory_allocated() == 0
    assert torch.cuda.memory_stats()["allocation.all.current"] == 0
    assert torch.accelerator.current_accelerator() is None
    torch.optim.Adam(torch.nn.Linear(2, 2).parameters()).step()


def check_random_states():
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(first, torch.rand(3))


class MakesTensorInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        return gradient + torch.ones(2, device="cuda").cuda()


def check_backward():
    for run in (
        lambda x: MakesTensorInBackward.apply(x).sum().backward(),
        lambda x: torch.autograd.backward(MakesTensorInBackward.apply(x).sum()),
        lambda x: setattr(x, "grad", torch.autograd.grad(MakesTensorInBackward.apply(x).sum(), x)[0]),
    ):
        x = torch.zeros(2, requires_grad=True)
        run(x)
        assert x.grad.tolist() == [2.0, 2.0]


def check_threads():
    devices = []

    class Subclass(threading.Thread):
        def run(self):
            x = torch.zeros(2, requires_grad=True, device="cuda")
            MakesTensorInBackward.apply(x).sum().backward()
            devices.append(x.grad.device)

    for thread in (Subclass(), threading.Thread(target=lambda: devices.append(torch.empty(1, device="cuda").device))):
        thread.start()
        thread.join()
    assert devices == [CPU, CPU]


def check_cost():
    # What reads no device must run no Python of this backend, however often a step calls it.
    assert not _get_current_function_mode_stack()
    for function in (torch.add, torch.matmul, torch.cat, torch.Tensor.view, torch.Tensor.mul_, torch.Tensor.detach):
        assert not isinstance(function, types.FunctionType)


def check_scripts():
    @torch.jit.script
    def make(x: torch.Tensor):
        return torch.zeros(2, device=x.device) + torch.ones_like(x) + x.new_zeros([2]) + torch.tensor([1.0, 2.0])

    assert make(torch.ones(2)).tolist() == [2.0, 3.0]


def check_pickles():
    for function in (torch.zeros, torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.new_ones, torch.fft.fftfreq):
        assert pickle.loads(pickle.dumps(function)) is function


def check_compile():
    @torch.compile
    def bare(x):
        return x + 1

    @torch.compile(dynamic=True)
    def called(x):
        return x + 1

    assert bare(1) == called(1) == 2


if __name__ == "__main__":
    enable()
    enable()
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            check()
            print(name)
