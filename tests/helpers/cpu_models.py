"""One training step of small MoE models on the CPU backend, in an interpreter of its own.

The forms are those of Megatron's experts; recomputed activations have to give the gradients of kept ones.
"""

import sys

import torch

from megatron_moe_spec.cpu import enable

if __name__ == "__main__":
    enable()
    import megatron_models
    from grouped_linear import TorchGroupedLinear, use_torch_grouped_linear

    use_torch_grouped_linear()
    megatron_models.initialize_one_rank(sys.argv[1])
    enable()
    batches = megatron_models.micro_batches(2)

    def train(**settings):
        model = megatron_models.build_model(**settings)
        return model.decoder.layers[0].mlp.experts, megatron_models.train_step(model, batches, main_loss_weight=1.0)

    experts, gradients = train()
    assert type(experts).__name__ == "SequentialMLP"
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients.values())

    experts, kept = train(moe_grouped_gemm=True)
    assert type(experts).__name__ == "TEGroupedMLP" and isinstance(experts.linear_fc2, TorchGroupedLinear)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in kept.values())

    selective = {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}
    experts, recomputed = train(moe_grouped_gemm=True, **selective)
    assert experts.activation_recompute
    torch.testing.assert_close(recomputed, kept, rtol=1e-6, atol=1e-6)

    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    _, recomputed = train(**full)
    torch.testing.assert_close(recomputed, gradients, rtol=1e-6, atol=1e-6)
