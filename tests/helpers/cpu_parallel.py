"""Two ranks: local attention under context, local norm under sequence parallelism."""

from dataclasses import replace

import torch

from megatron_moe_spec.cpu import enable

SEQUENCE, BATCH, HEADS, WIDTH = 8, 2, 2, 4

if __name__ == "__main__":
    enable()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(context_parallel_size=2)
    model_parallel_cuda_manual_seed(1)
    rank = torch.distributed.get_rank()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
    )

    def attend(config, query, key, value, weight):
        """Output of causal attention, and the gradients of its sum weighted by ``weight``."""
        inputs = [x.clone().requires_grad_() for x in (query, key, value)]
        attention = DotProductAttention(config, 1, AttnMaskType.causal, "self")
        output = attention(*inputs, None)
        return output, *torch.autograd.grad((output * weight).sum(), inputs)

    torch.manual_seed(1)
    tensors = [torch.randn(SEQUENCE, BATCH, HEADS, WIDTH) for _ in range(3)]
    tensors.append(torch.randn(SEQUENCE, BATCH, HEADS * WIDTH))
    whole = attend(config, *tensors)
    chunks = torch.arange(SEQUENCE).view(4, -1)
    mine = torch.cat([chunks[rank], chunks[3 - rank]])
    part = attend(replace(config, context_parallel_size=2), *(tensor[mine] for tensor in tensors))
    for expected, actual in zip(whole, part):
        torch.testing.assert_close(actual, expected[mine], rtol=1e-6, atol=1e-6)

    sequence_parallel = replace(config, tensor_model_parallel_size=2, sequence_parallel=True)
    norm = WrappedTorchNorm(sequence_parallel, 4)
    assert all(weight.sequence_parallel for weight in norm.parameters())
    assert sequence_parallel.sequence_parallel
    torch.testing.assert_close(norm(torch.arange(4.0)), torch.nn.functional.layer_norm(torch.arange(4.0), (4,)))
    torch.distributed.destroy_process_group()
