"""Products of matrices: op(B) op(A) of row-major tensors, as cuBLAS computes them of column-major ones."""

import torch

from .quantization import quantized, torch_dtype, value_of
from .registry import bound, refuse


def _operands(a, b):
    a, b = value_of(a), value_of(b)
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def _product(a, transposes_a, b, transposes_b):
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    return (b.T if transposes_b else b) @ (a.T if transposes_a else a)


def _store(value, output, accumulate):
    return output.add_(value) if accumulate else output.copy_(value)


@bound
def generic_gemm(
    A, transA, B, transB, D, quantizer, output_dtype, bias, bias_type, gelu, gelu_in, grad, workspace, workspace_size,
    accumulate, use_split_accumulator, comm_overlap=None, comm_type=None, extra_output=None, bulk_overlap=False,
    alpha=1.0, beta=None,
):  # fmt: skip
    refuse((comm_overlap is not None, "overlapped communication"), (gelu, "fused GELU"))
    dtype = D.dtype if D is not None else torch_dtype(output_dtype, value_of(A).dtype)
    A, B = _operands(A, B)
    value = _product(A, transA, B, transB) * alpha
    bias_gradient = None
    if bias is not None and grad:
        bias_gradient = B.reshape(-1, B.shape[-1]).sum(dim=0).to(dtype)
    elif bias is not None:
        value = value + bias
    rows = B.shape[-1:] if transB else B.shape[:-1]
    value = value.view(*rows, value.shape[-1]).to(dtype)
    if quantizer is not None:
        D = quantized(value, quantizer, D)
    else:
        D = value if D is None else _store(value, D, accumulate)
    return [D, bias_gradient, None, extra_output]


@bound
def te_general_grouped_gemm(
    A, transa, B, transb, D, D_type, m_splits, bias, bias_type, single_output, pre_gelu_out, grad, workspace,
    workspaceSize, accumulate, use_split_accumulator, math_sm_count,
):  # fmt: skip
    start = 0
    for i, (a, b) in enumerate(zip(A, B)):
        a, b = _operands(a, b)
        value = _product(a, transa, b, transb)
        if len(bias[i]) and grad:
            bias[i].copy_(b.reshape(-1, b.shape[-1]).sum(dim=0))
        elif len(bias[i]):
            value = value + bias[i]
        _store(value, D[0][start : start + len(value)] if single_output else D[i], accumulate)
        start += len(value)
    return bias
