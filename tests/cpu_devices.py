"""Promises of the CPU back end about devices, checked in an interpreter of its own. Needs no Megatron."""

import threading

import torch

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
    with torch.device("cuda"):
        assert torch.empty(2).device == CPU


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
