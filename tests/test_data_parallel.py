"""Two data-parallel ranks with half the micro-batches each train as one process does, and log the same."""

import pytest
import torch
from processes import needs_megatron, torchrun


def _run(tmp_path, processes, *options):
    output = tmp_path / f"{processes}.pt"
    torchrun(processes, "data_parallel.py", output, *options)
    return torch.load(output)


@needs_megatron
@pytest.mark.parametrize("loss", ["mean", "per-token"])
def test_two_ranks_equal_one(tmp_path, loss):
    one, two = (_run(tmp_path, processes, loss, 1) for processes in (1, 2))
    compared = 0
    for name, gradient in one["gradients"].items():
        error = float((two["gradients"][name] - gradient).norm())
        assert error <= 1e-5 * float(gradient.norm()) + 1e-7, name
        compared += float(gradient.norm()) > 1e-3
    assert compared > 10
    diagnostics = one["metrics"].pop("diagnostics"), two["metrics"].pop("diagnostics")
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-6)
    for part in ("layers", "pairs"):
        for expected, found in zip(diagnostics[0][part], diagnostics[1][part], strict=True):
            assert found.keys() == expected.keys()
            for name in expected:
                assert found[name] == pytest.approx(expected[name], rel=1e-6), (part, name)
