"""Tensors in fp8 with one scale each, of the last steps (delayed) or their own (current).

Their values are those of torch's e4m3 and e5m2; products of them are computed in fp32.
"""

import torch

from .enums import DType
from .registry import bound, refuse

FP8 = {DType.kFloat8E4M3: torch.float8_e4m3fn, DType.kFloat8E5M2: torch.float8_e5m2}
_TORCH = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
}


def torch_dtype(dtype, default: torch.dtype) -> torch.dtype:
    """Of a number that the extension gives a dtype, of torch's, or of None."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype or default
    return _TORCH[DType(int(dtype))]


def value_of(tensor) -> torch.Tensor:
    """A tensor, or in fp32 what a quantized one stands for."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return tensor
    refuse((not hasattr(tensor, "_fp8_dtype") or not hasattr(tensor, "_scale_inv"), type(tensor).__name__))
    dtype = FP8[DType(int(tensor._fp8_dtype))]
    if tensor._data is not None:
        return tensor._data.view(dtype).float() * tensor._scale_inv
    return (tensor._transpose.view(dtype).float() * tensor._scale_inv).movedim(0, -1)


def _scale(quantizer, x: torch.Tensor, largest: float) -> torch.Tensor:
    amax = x.abs().amax() if x.numel() else x.new_zeros(())
    if hasattr(quantizer, "scale"):  # delayed
        quantizer.amax.copy_(torch.maximum(quantizer.amax.view(()), amax).view_as(quantizer.amax))
        return quantizer.scale.reshape(1).clone()
    if quantizer.with_amax_reduction:
        torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, quantizer.amax_reduction_group)
    amax = amax.clamp(min=quantizer.amax_epsilon)
    scale = torch.where(amax > 0, largest / amax, 1.0)
    return (2.0 ** scale.log2().floor() if quantizer.force_pow_2_scales else scale).reshape(1)


def quantized(tensor: torch.Tensor, quantizer, output=None):
    """By a quantizer of Transformer Engine, into a tensor of its class."""
    from transformer_engine.pytorch.tensor.float8_tensor import (
        Float8CurrentScalingQuantizer,
        Float8Quantizer,
        Float8Tensor,
    )
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    known = isinstance(quantizer, (Float8Quantizer, Float8CurrentScalingQuantizer))
    refuse((not known, type(quantizer).__name__))
    dtype, x = FP8[DType(int(quantizer.dtype))], tensor.detach().float()
    largest = torch.finfo(dtype).max
    scale = _scale(quantizer, x, largest)
    data = (x * scale).clamp(-largest, largest).to(dtype).view(torch.uint8)
    # As on Hopper: "columns" are the rows of a transposed copy.
    transpose = data.movedim(-1, 0).contiguous() if quantizer.columnwise_usage else None
    rows = data if quantizer.rowwise_usage or transpose is None else None
    if output is None:
        fields = dict(
            data=rows,
            fp8_scale_inv=1 / scale,
            fp8_dtype=quantizer.dtype,
            data_transpose=transpose,
            quantizer=quantizer,
        )
        if quantizer.internal:
            return Float8TensorStorage(**fields, fake_dtype=tensor.dtype)
        return Float8Tensor(shape=tensor.shape, dtype=tensor.dtype, device=tensor.device, **fields)
    for name, new in (("_data", rows), ("_transpose", transpose)):
        if new is not None:
            old = getattr(output, name)
            setattr(output, name, new if old is None else old.copy_(new.view_as(old)))
    output._transpose_invalid = transpose is None
    output._scale_inv.copy_(1 / scale)
    return output


def result(value: torch.Tensor, dtype: torch.dtype, quantizer=None, output=None):
    """A function's result, in ``output`` where one is given, quantized where a quantizer is."""
    if quantizer is not None:
        return quantized(value.to(dtype), quantizer, output)
    return value.to(dtype) if output is None else output.copy_(value)


@bound
def quantize(tensor, quantizer, output=None, noop=None):
    if noop is not None and bool(noop.any()):
        return output
    return quantized(tensor, quantizer, output)


@bound
def dequantize(input, otype):
    return value_of(input).to(torch_dtype(otype, torch.float32))


@bound
def split_quantize(tensor, split_sections, quantizer_list, disable_bulk_allocation=False):
    return [quantized(part, q) for part, q in zip(tensor.split([int(n) for n in split_sections]), quantizer_list)]


@bound
def multi_tensor_quantize(tensor_list, quantizer_list):
    return [quantized(tensor, quantizer) for tensor, quantizer in zip(tensor_list, quantizer_list)]


@bound
def bgrad_quantize(input, quantizer):
    return [input.reshape(-1, input.shape[-1]).sum(dim=0), quantized(input, quantizer)]


@bound
def fp8_transpose(input, dtype, *, out=None):
    transpose = input.movedim(-1, 0).contiguous()
    return transpose if out is None else out.copy_(transpose)


@bound
def compute_amax(input, amax):
    amax.copy_(input.abs().amax().view_as(amax))


@bound
def fused_amax_and_scale_update_after_reduction(
    amax_reduction_buffer, amax_histories, scales, amax_compute_algo, fp8_dtype, margin
):
    largest, start = torch.finfo(FP8[DType(int(fp8_dtype))]).max, 0
    for history, scale in zip(amax_histories, scales):
        history[0] = amax_reduction_buffer[start : start + scale.numel()]
        start += scale.numel()
        amax = history.amax(dim=0) if amax_compute_algo == "max" else history[0].clone()
        scale.copy_(torch.where((amax > 0) & amax.isfinite(), largest / amax / 2.0**margin, scale))
        history.copy_(history.roll(-1, 0))
        history[0] = 0
