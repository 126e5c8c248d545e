"""What the two main losses have a device do, by layer: counted on Megatron models, forward and backward."""

import contextlib
from collections import Counter

import pytest
from processes import needs_megatron

pytest.importorskip("triton", reason="triton is not installed")

from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

pytestmark = [needs_megatron, pytest.mark.slow]

BOTH = dict(specialization_loss_coeff=2e-3, coupling_loss_coeff=1e-3, kernels="triton")
# Besides views: what gives a tensor another shape, or memory, and leaves the device alone.
NO_LAUNCH = ("empty", "new_empty", "detach", "alias", "_unsafe_view", "_reshape_alias", "is_pinned")
SYNCHRONIZES = ("_local_scalar_dense", "nonzero", "masked_select", "item", "is_nonzero", "equal")


class _Count(TorchDispatchMode):
    """Counts operations; a kernel of Triton's as one."""

    def __init__(self):
        super().__init__()
        self.launches, self.synchronizations = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in SYNCHRONIZES:
            self.synchronizations[name] += 1
        elif not function.is_view and not name.startswith(NO_LAUNCH):
            self.launches[name] += 1
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def counting(monkeypatch):
    from triton.runtime import interpreter

    count, launch = _Count(), interpreter.GridExecutor.__call__

    def counted(executor, *args, **kwargs):
        with _disable_current_modes():
            count.launches[executor.fn.__name__] += 1
            return launch(executor, *args, **kwargs)

    with monkeypatch.context() as patch, count:
        patch.setattr(interpreter.GridExecutor, "__call__", counted)
        yield count


def operations(mm, monkeypatch, num_layers, losses, micro_batches=1, **settings):
    """Of a training step: launches and synchronisations, by name."""
    from megatron_moe_spec import SpecConfig, attach

    model = mm.build_model(num_layers=num_layers, **settings)
    handle = attach(model, SpecConfig(**losses)) if losses else None
    batches = mm.micro_batches(micro_batches)
    mm.train_step(model, batches)  # the first compares the order of rows
    with counting(monkeypatch) as count:
        mm.train_step(model, batches)
    if handle:
        handle.detach()
    return count.launches, count.synchronizations


def by_layer(mm, monkeypatch, losses, **settings):
    """What a layer more has the device do more often with the losses than without."""
    found = []
    for added in (losses, None):
        more, fewer = (operations(mm, monkeypatch, layers, added, **settings) for layers in (4, 3))
        found.append([Counter({name: m[name] - f[name] for name in m | f}) for m, f in zip(more, fewer)])
    (ours, our_waits), (plain, plain_waits) = found
    names = ours | plain
    return {name: ours[name] - plain[name] for name in names if ours[name] != plain[name]}, our_waits - plain_waits


KERNELS = {"_count_kernel", "_rows_kernel", "_cosines_kernel", "_mass_kernel", "_mass_gradient_kernel"}


@pytest.mark.parametrize("fused_swiglu", [True, False])
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_a_layer_costs_eight_launches_at_most_and_no_synchronisation(mm, monkeypatch, dispatcher, fused_swiglu):
    settings = dict(moe_token_dispatcher_type=dispatcher, moe_grouped_gemm=True, bias_activation_fusion=fused_swiglu)
    launches, synchronizations = by_layer(mm, monkeypatch, BOTH, **settings)
    ours = {name: number for name, number in launches.items() if number > 0}
    backward = "_swiglu_gradient_kernel" if fused_swiglu else "_mixing_kernel"
    assert {name for name in ours if name.endswith("kernel")} == {*KERNELS, backward}
    assert sum(ours.values()) <= 8, ours
    assert not synchronizations, synchronizations
    # Megatron's own backward of the SwiGLU, which is one operation or two where it is compiled, is gone.
    assert bool(set(launches) - set(ours)) == fused_swiglu
