"""Inputs of the tests of kernels."""

import pytest
import torch
from kernel_cases import DEVICE


@pytest.fixture
def poisoned(monkeypatch):
    """What a kernel allocates is filled with NaN first."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))


@pytest.fixture
def random():
    """A seeded torch.randn, of fp32 numbers on the device."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)
