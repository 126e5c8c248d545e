"""The CPU backend, in processes of its own: it changes torch for good."""

import pytest
from forks import ranks
from processes import needs_megatron, python

pytestmark = pytest.mark.slow


def _check(*command) -> str:
    run = python(*command)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_nothing_but_enable_activates_it():
    _check(
        "-c",
        """
import sys, torch
from torch.overrides import _get_current_function_mode_stack

def state():
    names = [torch.compile, torch.empty, torch.Tensor.to, torch.Tensor.new_zeros, torch._C._nn._parse_to]
    names += [torch.distributed.all_gather, torch.distributed.reduce_scatter, torch.accelerator.is_available]
    names += [torch.distributed.all_gather_into_tensor, torch.distributed.init_process_group]
    names += [torch.cuda.is_available, torch.cuda.Stream, torch.cuda.current_stream, torch.Tensor.record_stream]
    return names, torch.cuda.is_available(), list(sys.meta_path), _get_current_function_mode_stack()

before = state()
import megatron_moe_spec, megatron_moe_spec.losses, megatron_moe_spec.launch
import megatron_moe_spec.cpu
assert state() == before and not before[-1]
""",
    )


@needs_megatron
def test_refused_after_megatron():
    run = python("-c", "import megatron.core; from megatron_moe_spec.cpu import enable; enable()")
    assert run.returncode == 1
    assert "RuntimeError" in run.stderr and "megatron_moe_spec.launch --cpu" in run.stderr


def test_devices():
    assert len(_check("cpu_devices.py").split()) > 8


def test_collectives_as_on_nccl():
    ranks(2, "cpu_collectives.py", "gloo")


@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl"])
def test_gloo_in_the_place_of_nccl(backend):
    output = ranks(2, "cpu_collectives.py", backend)
    assert output.count(f"process groups use gloo where the script asks for {backend}") == 1


@needs_megatron
def test_context_and_sequence_parallel():
    ranks(2, "cpu_parallel.py")


@needs_megatron
def test_resume_equals_the_uninterrupted_run(tmp_path):
    pytest.importorskip("psutil", reason="psutil is not installed, which saving torch_dist checkpoints needs")
    ranks(2, "cpu_checkpoint.py", tmp_path)


@needs_megatron
def test_models_train(tmp_path):
    ranks(1, "cpu_models.py", tmp_path / "store")
