"""Small Megatron-Core MoE models in one process, and the gradients of the auxiliary losses on them alone.

Import only after the CPU backend is enabled.
"""

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from processes import HAS_TRANSFORMER_ENGINE

VOCABULARY, SEQUENCE, MICRO_BATCH = 64, 12, 2


def build_model(seed: int = 0, **settings) -> GPTModel:
    """A GPT with MoE layers; ``settings`` override TransformerConfig's fields."""
    return _build_gpt(transformer_config(**settings), seed)


def build_chunks(build=None, **settings) -> list:
    """The same as this rank's chunks of a pipeline of one or more stages, without and with virtual stages.

    Args:
        build: (TransformerConfig, seed, what is special to the stage) -> one chunk; by default of a GPT.
    """
    build = build or _build_gpt
    stages = settings.get("pipeline_model_parallel_size", 1)
    chunks = settings.get("virtual_pipeline_model_parallel_size")
    # On gloo, messages of interleaved schedules are told apart only without batching.
    interleaved = dict(overlap_p2p_comm=True, batch_p2p_comm=False) if chunks else {}
    dtype = settings.get("params_dtype", torch.float32)
    config = transformer_config(pipeline_dtype=dtype, **interleaved, **settings)
    rank = parallel_state.get_pipeline_model_parallel_rank()
    return [
        build(
            config,
            0,
            pre_process=rank == 0 and chunk == 0,
            post_process=rank == stages - 1 and chunk == (chunks or 1) - 1,
            **(dict(vp_stage=chunk) if chunks else {}),
        )
        for chunk in range(chunks or 1)
    ]


def transformer_config(**settings) -> TransformerConfig:
    fields = dict(
        num_layers=3,
        hidden_size=16,
        num_attention_heads=2,
        ffn_hidden_size=32,
        moe_ffn_hidden_size=24,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        moe_router_dtype="fp32",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        normalization="RMSNorm",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        attention_softmax_in_fp32=True,
    )
    kind = MLATransformerConfig if settings.get("multi_latent_attention") else TransformerConfig
    return kind(**{**fields, **settings})


def _uses_engine(config: TransformerConfig) -> bool:
    return HAS_TRANSFORMER_ENGINE and config.transformer_impl == "transformer_engine"


def _decoder_spec(config: TransformerConfig, vp_stage):
    if getattr(config, "experimental_attention_variant", None):
        from megatron.core.models.gpt import experimental_attention_variant_module_specs as specs

        return specs.get_transformer_block_with_experimental_attention_variant_spec(config, vp_stage)
    engine = _uses_engine(config)
    spec = get_gpt_decoder_block_spec(config, engine, normalization=config.normalization, vp_stage=vp_stage)
    if engine and config.context_parallel_size > 1:
        for layer in spec.layer_specs:  # whose attention over ranks is fused kernels alone
            layer.submodules.self_attention.submodules.core_attention = DotProductAttention
    return spec


def _build_gpt(config: TransformerConfig, seed: int, **stage) -> GPTModel:
    spec = _decoder_spec(config, stage.get("vp_stage"))
    if config.mtp_num_layers:
        stage["mtp_block_spec"] = get_gpt_mtp_block_spec(config, spec, _uses_engine(config))
    model = GPTModel(
        config,
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        **stage,
    )
    return set_weights(model, seed)


def set_weights(model, seed: int):
    """Draws a model's weights; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.dim() > 1:
                # Routers far from uniform, so that scores, masses and drops vary.
                scale = 1.0 if "router" in name else 0.2
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
            elif name.split(".")[-1].startswith(("bias", "A_log", "dt_bias")):
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
        for name, bias in model.named_buffers():
            if name.endswith("expert_bias"):
                bias.copy_(torch.randn(bias.shape, generator=generator))
    model.model_type = None
    return model


def micro_batches(number: int, padding: bool = False, seed: int = 1) -> list[dict]:
    """Tokens (and a padding mask, True for padding, of another length in each micro-batch)."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for i in range(number):
        batch = {"tokens": torch.randint(0, VOCABULARY, (MICRO_BATCH, SEQUENCE), generator=generator)}
        if padding:
            batch["padding_mask"] = torch.arange(SEQUENCE).expand(MICRO_BATCH, -1) >= SEQUENCE - 2 - 3 * i
        batches.append(batch)
    return batches


def run_model(model, batch):
    """Per-token loss [b, s] of next-byte prediction, on labels made from the tokens; s of this context-parallel rank.

    Args:
        model: the model, or its ``build_schedule_plan``.
    """
    tokens = batch["tokens"]
    positions = torch.arange(SEQUENCE).expand_as(tokens)
    inputs = [on_this_rank(x) for x in (tokens, positions, tokens.roll(-1, 1))]
    extra = {"padding_mask": on_this_rank(batch["padding_mask"])} if "padding_mask" in batch else {}
    return model(*inputs[:2], None, labels=inputs[2], **extra)


def on_this_rank(x: torch.Tensor) -> torch.Tensor:
    """The part of [b, SEQUENCE] that this context-parallel rank holds: chunks r and 2n - 1 - r of 2n."""
    rank, size = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    if size == 1:
        return x
    chunks = x.chunk(2 * size, dim=1)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim=1)


def train_step(model: GPTModel, batches: list[dict], main_loss_weight: float = 0.0, scale=None) -> dict:
    """``train_chunks`` of a model in one piece."""
    return train_chunks([model], batches, main_loss_weight, scale)[0]


def train_chunks(chunks: list[GPTModel], batches: list[dict], main_loss_weight: float = 0.0, scale=None) -> list[dict]:
    """One forward and backward of all micro-batches by Megatron's schedule, under Megatron's DDP.

    Args:
        main_loss_weight: 0 leaves nothing but the auxiliary losses' gradients.
        scale: factor of a mixed-precision gradient scaler, divided out of the result.

    Returns:
        For each chunk, the gradient of every parameter that has one, by name.
    """
    config = chunks[0].config
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False)
    wrapped = [DistributedDataParallel(config, settings, chunk) for chunk in chunks]
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = (lambda loss: loss * scale) if scale else None

    def forward_step(iterator, module, return_schedule_plan=False):
        batch = next(iterator)
        output = run_model(module.build_schedule_plan if return_schedule_plan else module, batch)

        def loss(losses):
            mask = torch.ones_like(losses, dtype=torch.bool)
            if "padding_mask" in batch:
                mask = ~on_this_rank(batch["padding_mask"])
            num_tokens = mask.sum().int()
            total = (losses * mask).sum() * main_loss_weight
            return total, num_tokens, {"lm": torch.stack([total.detach(), num_tokens.float()])}

        return output, loss

    for chunk in wrapped:
        chunk.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in chunks] if len(chunks) > 1 else iter(batches),
        model=wrapped if len(chunks) > 1 else wrapped[0],
        num_microbatches=len(batches),
        seq_length=SEQUENCE,
        micro_batch_size=len(batches[0]["tokens"]),
        forward_only=False,
    )
    return [
        {
            name: weight.main_grad.detach().clone() / (scale or 1.0)
            for name, weight in chunk.named_parameters()
            if weight.requires_grad
        }
        for chunk in chunks
    ]


def initialize_ranks(sizes: dict) -> None:
    """Process groups and random states of a rank that torchrun, or ``forks.py``, has started.

    Args:
        sizes: of the parallel groups.
    """
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(**sizes)
    model_parallel_cuda_manual_seed(1)


def initialize_one_rank(store: str) -> None:
    """Process groups and random states of a one-process Megatron job."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
