"""Options of compilation: which a kernel gets, by the GPU and by what a sweep has written."""

import json

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch

from megatron_moe_spec.kernels import cosines as row_kernels
from megatron_moe_spec.kernels import options as kernel_options
from megatron_moe_spec.kernels.options import DEFAULTS, options, trial, write_tuned

TUNED = dict(BLOCK_D=32, num_warps=2, num_stages=4)


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """The file that is read, on a GPU of capability 9.0."""
    file = tmp_path / "tuned.json"
    monkeypatch.setattr(kernel_options, "TUNED", file)
    monkeypatch.setattr(kernel_options, "capability", lambda: "9.0")
    kernel_options.forget()
    yield file
    kernel_options.forget()


def test_defaults_where_nothing_was_tuned(tuned):
    assert all(options(kernel, size) == default for kernel in DEFAULTS for size, default in DEFAULTS[kernel].items())


def test_what_was_tuned_on_this_kind_of_gpu_is_read(tuned, monkeypatch):
    write_tuned("8.0", {"mass": {4: dict(ELEMENTS=1024, num_warps=8)}}, tuned)
    write_tuned("9.0", {"cosines": {2: TUNED}}, tuned)
    assert options("cosines", 2) == TUNED
    assert options("cosines", 4) == DEFAULTS["cosines"][4] and options("mass", 4) == DEFAULTS["mass"][4]
    monkeypatch.setattr(kernel_options, "capability", lambda: "8.0")
    kernel_options.forget()
    assert options("cosines", 2) == DEFAULTS["cosines"][2] and options("mass", 4)["num_warps"] == 8


def test_writing_replaces_all_that_was_tuned_on_this_kind_of_gpu(tuned):
    write_tuned("9.0", {"cosines": {2: TUNED}}, tuned)
    assert options("cosines", 2) == TUNED
    write_tuned("9.0", {}, tuned)
    assert options("cosines", 2) == DEFAULTS["cosines"][2]
    assert json.loads(tuned.read_text()) == {"9.0": {}}


def test_the_interpreter_keeps_the_defaults(tuned, monkeypatch):
    monkeypatch.undo()
    if kernel_options.interpreted():
        assert kernel_options.capability() is None


@pytest.mark.parametrize("text", ['{"9.0": {"cosines": {"2": {"BLOCK": 32}}}}', '{"9.0": '])
def test_a_file_that_does_not_fit_is_named_with_the_remedy(tuned, text):
    tuned.write_text(text)
    with pytest.raises(ValueError, match=r"tuned\.json .*delete"):
        options("cosines", 2)


def test_every_launch_reads_the_options():
    """A sweep changes them between launches of the same shapes. Blocks of Triton are powers of two."""
    device = "cpu" if kernel_options.interpreted() else "cuda"
    x_PD, rows_TK = torch.randn(4, 24, device=device), torch.arange(4, dtype=torch.int32, device=device).view(2, 2)
    expected = row_kernels.row_cosines(x_PD, rows_TK)[0]
    with trial("cosines", 4, dict(BLOCK_D=48, num_warps=1, num_stages=3)), pytest.raises(Exception, match="power of 2"):
        row_kernels.row_cosines(x_PD, rows_TK)
    assert torch.equal(row_kernels.row_cosines(x_PD, rows_TK)[0], expected)
