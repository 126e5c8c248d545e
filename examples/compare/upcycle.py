"""Starts an MoE model from a dense one: every expert is a copy of the dense layer's MLP, with noise."""

import re

import torch


@torch.no_grad()
def start(model, file, noise: float, seed: int) -> None:
    """Fills a model of fp32 weights with those of a dense model; routers, and what the dense one lacks, stay.

    Args:
        model: without wrappers.
        file: of the dense model's state dict, with experts' shapes in its MLPs.
        noise: normal, added to experts' weights, in standard deviations of the dense weight. 0: identical experts.
        seed: of the noise.
    """
    dense = torch.load(file, weights_only=True)
    generator = torch.Generator().manual_seed(seed)
    copies = 0
    for name, weight in model.named_parameters():
        source = re.sub(r"\.mlp\.experts\.local_experts\.\d+\.", ".mlp.", name)
        if source not in dense:
            continue
        assert weight.dtype == torch.float32, "optimizers keep a copy of other weights"
        value = dense[source]
        if source != name:
            copies += 1
            value = value + noise * value.std() * torch.randn(value.shape, generator=generator)
        weight.copy_(value)
    assert copies, "no expert of a SequentialMLP"
