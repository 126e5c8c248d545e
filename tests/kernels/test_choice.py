"""Whether the kernels or eager PyTorch compute the losses."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from megatron_moe_spec.kernels import choose


def test_choice(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("triton", cpu) and not choose("auto", cpu) and not choose("torch", cpu)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    choose.cache_clear()
    assert not choose("auto", cpu)
    with pytest.raises(ValueError, match="--moe-spec-kernels"):
        choose("triton", cpu)
    choose.cache_clear()
