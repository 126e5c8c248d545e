"""Autograd through a loss."""

import torch


def value_and_gradient(loss, x):
    x = x.detach().clone().requires_grad_()
    value = loss(x)
    (gradient,) = torch.autograd.grad(value, x)
    return value.detach(), gradient
