"""Rotary embeddings of [s, b, h, d] and [b, s, h, d], and the softmaxes of attention in parts."""

import torch

from .enums import NVTE_QKV_Format
from .registry import bound, refuse


def _rotated(x, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, sign):
    dense = qkv_format in (NVTE_QKV_Format.NVTE_SBHD, NVTE_QKV_Format.NVTE_BSHD)
    refuse(
        (not dense or cu_seqlens is not None, "rotary embedding of packed sequences"),
        (cp_size != 1, "rotary embedding over context-parallel ranks"),
        (start_positions is not None, "rotary embedding that starts elsewhere"),
    )
    along = 0 if qkv_format == NVTE_QKV_Format.NVTE_SBHD else 1
    angles = freqs[: x.shape[along]].float().reshape(-1, freqs.shape[-1])
    shape = [1] * x.dim()
    shape[along], shape[-1] = angles.shape
    angles, size = angles.view(shape), angles.shape[-1]
    turned, rest = x[..., :size].float(), x[..., size:]
    if interleaved:
        other = torch.stack([-turned[..., 1::2], turned[..., ::2]], dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        other = torch.cat([-second, first], dim=-1)
    turned = turned * angles.cos() + sign * other * angles.sin()
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


@bound
def fused_rope_forward(input, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank):
    return _rotated(input, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, 1)


@bound
def fused_rope_backward(output_grads, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank):
    return _rotated(output_grads, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, -1)


def _softmax(x, scale, hidden=None):
    scores = x.float() * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, -10000.0)
    return scores.softmax(dim=-1).to(x.dtype)


def _softmax_gradient(gradient, softmax, scale):
    g, y = gradient.float(), softmax.float()
    return ((g - (g * y).sum(dim=-1, keepdim=True)) * y * scale).to(gradient.dtype)


def _future(x):
    rows, columns = x.shape[-2:]
    return torch.ones(rows, columns, dtype=torch.bool).triu(columns - rows + 1)


@bound
def scaled_softmax_forward(input, scale_factor):
    return _softmax(input, scale_factor)


@bound
def scaled_softmax_backward(output_grad_, softmax_results_, scale_factor):
    return _softmax_gradient(output_grad_, softmax_results_, scale_factor)


@bound
def scaled_masked_softmax_forward(input, mask, scale_factor):
    return _softmax(input, scale_factor, mask.bool())


@bound
def scaled_masked_softmax_backward(output_grad_, softmax_results_, scale_factor):
    return _softmax_gradient(output_grad_, softmax_results_, scale_factor)


@bound
def scaled_upper_triang_masked_softmax_forward(input, scale_factor):
    return _softmax(input, scale_factor, _future(input))


@bound
def scaled_upper_triang_masked_softmax_backward(output_grads_, softmax_results_, scale_factor):
    return _softmax_gradient(output_grads_, softmax_results_, scale_factor)


@bound
def scaled_aligned_causal_masked_softmax_forward(input, scale_factor):
    return _softmax(input, scale_factor, _future(input))


@bound
def scaled_aligned_causal_masked_softmax_backward(output_grads_, softmax_results_, scale_factor):
    return _softmax_gradient(output_grads_, softmax_results_, scale_factor)


def _places(cu_seqlens, max_seq_len):
    """For each token of [t], its place among [b * max_seq_len]."""
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens[1:].long() - starts
    sequence = torch.arange(len(lengths)).repeat_interleave(lengths)
    return torch.arange(int(cu_seqlens[-1])) - starts[sequence] + sequence * max_seq_len


@bound
def convert_thd_to_bshd(tensor, cu_seqlens, b, max_seq_len):
    dense = tensor.new_zeros(b * max_seq_len, *tensor.shape[1:])
    dense[_places(cu_seqlens, max_seq_len)] = tensor[: int(cu_seqlens[-1])]
    return dense.view(b, max_seq_len, *tensor.shape[1:])


@bound
def convert_bshd_to_thd(tensor, cu_seqlens, t):
    packed = tensor.new_zeros(t, *tensor.shape[2:])
    packed[: int(cu_seqlens[-1])] = tensor.flatten(0, 1)[_places(cu_seqlens, tensor.shape[1])]
    return packed
