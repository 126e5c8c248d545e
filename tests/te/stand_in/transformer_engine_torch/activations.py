"""SwiGLU of [gate, linear] halves of the last dimension, or of blocks of both in turn."""

import torch
from torch.nn.functional import silu

from .quantization import result
from .registry import bound


def _swiglu(x):
    gate, linear = x.float().chunk(2, dim=-1)
    return silu(gate) * linear


def _swiglu_gradient(gradient, x):
    gate, linear = x.float().chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    of_gate = gradient * linear * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([of_gate, gradient * gate * sigmoid], dim=-1)


def _halves(x, block):
    if not block:
        return x
    return x.reshape(*x.shape[:-1], -1, 2, block).transpose(-3, -2).reshape(x.shape)


def _in_turn(x, block):
    if not block:
        return x
    return x.reshape(*x.shape[:-1], 2, -1, block).transpose(-3, -2).reshape(x.shape)


@bound
def swiglu(input, quantizer):
    return result(_swiglu(input), input.dtype, quantizer)


@bound
def dswiglu(grad, fwd_input, quantizer):
    return result(_swiglu_gradient(grad.float(), fwd_input), fwd_input.dtype, quantizer)


@bound
def scaled_swiglu(input, act_scales, quantizer, glu_interleave_size=0):
    value = _swiglu(_halves(input, glu_interleave_size)) * act_scales.float().unsqueeze(-1)
    return result(value, input.dtype, quantizer)


@bound
def scaled_dswiglu(grad, fwd_input, act_scales, quantizer, glu_interleave_size=0, compute_scale_grad=True):
    x, gradient = _halves(fwd_input, glu_interleave_size), grad.float()
    dx = _swiglu_gradient(gradient * act_scales.float().unsqueeze(-1), x)
    of_scales = (gradient * _swiglu(x)).sum(dim=-1).to(act_scales.dtype) if compute_scale_grad else None
    return [result(_in_turn(dx, glu_interleave_size), fwd_input.dtype, quantizer), of_scales]
