"""Functions of lists of tensors: scaling and norms of gradients, Adam."""

import torch

from .registry import bound


@bound
def multi_tensor_scale(chunk_size, noop_flag, tensor_lists, scale):
    for source, target in zip(*tensor_lists):
        value = source.float() * float(scale)
        if not bool(value.isfinite().all()):
            noop_flag.fill_(1)
        target.copy_(value)


@bound
def multi_tensor_scale_tensor(chunk_size, is_infinite, tensor_lists, scale):
    multi_tensor_scale(chunk_size, is_infinite, tensor_lists, scale)


@bound
def multi_tensor_l2norm(chunk_size, noop_flag, tensor_lists, per_tensor_python=False):
    norms = torch.stack([tensor.float().norm() for tensor in tensor_lists[0]])
    return norms.norm().reshape(1), norms if per_tensor_python else torch.empty(0)


@bound
def multi_tensor_unscale_l2norm(chunk_size, noop_flag, tensor_lists, inv_scale, per_tensor_python=False):
    norms = torch.stack([(tensor.float() * inv_scale).norm() for tensor in tensor_lists[0]])
    return norms.norm().reshape(1), norms if per_tensor_python else torch.empty(0)


@bound
def multi_tensor_adam(
    chunk_size, noop_flag, tensor_lists, lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay
):
    """Mode 0 is Adam with L2 regularization, 1 AdamW."""
    first, second = (1 - beta**step if bias_correction else 1.0 for beta in (beta1, beta2))
    for gradient, weight, m, v, *main in zip(*tensor_lists):
        w, g = (main[0] if main else weight).float(), gradient.float()
        if mode == 0:
            g = g + weight_decay * w
        m.copy_(beta1 * m.float() + (1 - beta1) * g)
        v.copy_(beta2 * v.float() + (1 - beta2) * g * g)
        update = (m.float() / first) / ((v.float() / second).sqrt() + epsilon)
        if mode == 1:
            update = update + weight_decay * w
        w = w - lr * update
        weight.copy_(w)
        if main:
            main[0].copy_(w)
