"""Random rows of tokens, and how a kernel is judged. Suffixes: P rows, F row size, T tokens, K experts of a token."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_moe_spec.kernels import interpreted
from megatron_moe_spec.kernels.launch import Launch

DEVICE = "cpu" if interpreted() else "cuda"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# By how much a kernel may be further from float64 than eager is, relative to the largest magnitude.
HAIR = 1e-5

# (T, K, F, rows of no token): full and ragged tiles of tokens, rows shorter and longer than a block
SHAPES = [
    (1, 2, 1, 0),
    (9, 2, 300, 3),
    (5, 3, 40, 0),
    (4, 4, 128, 17),
    (3, 6, 130, 1),
    (5, 8, 257, 2),
    (2, 16, 96, 5),
    (1, 16, 33, 0),
    (2, 22, 36, 4),
]


def tokens_of_rows(num_tokens, k, spare=0, seed=0, valid=0.8):
    """Each token's row numbers, scattered over all rows, -1 where it has none; and which rows are of a token."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(num_tokens * k + spare, generator=generator)[: num_tokens * k].view(num_tokens, k)
    rows = rows.masked_fill(torch.rand(num_tokens, k, generator=generator) >= valid, -1).to(DEVICE, torch.int32)
    return rows, covered_by(rows, num_tokens * k + spare)


def covered_by(rows, num_rows):
    return torch.zeros(num_rows, dtype=torch.bool, device=DEVICE).index_fill_(0, rows[rows >= 0].long(), True)


def assert_no_further(found, eager, exact, at_least=0.0):
    """``found`` is as near to the float64 values as ``eager`` is, plus a hair of these, or of what they cancel from."""
    assert found.isfinite().all()
    scale = max(float(exact.abs().max()), at_least) if exact.numel() else 0.0
    error = float((found.double() - exact).abs().max()) if exact.numel() else 0.0
    allowed = float((eager.double() - exact).abs().max()) if exact.numel() else 0.0
    assert error <= allowed + HAIR * scale, f"error {error:.2e}, eager {allowed:.2e}, scale {scale:.2e}"


def work_of(monkeypatch, operation):
    """How often the operation launches a kernel, and the names of what else it asks the device for."""
    launches, others = [], set()

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if not function.is_view:
                others.add(function.name())
            return function(*args, **(kwargs or {}))

    with monkeypatch.context() as patches, Mode():
        patches.setattr(Launch, "__call__", lambda launch, grid, *args, **options: launches.append(grid))
        operation()
    return len(launches), others
