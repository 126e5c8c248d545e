"""What attach() refuses, each by an error that names the flag to change."""

from typing import Iterator, Optional

import torch

from megatron_moe_spec.config import SpecConfig
from megatron_moe_spec.integration.compat import (
    column_group,
    delays_weight_gradients,
    expert_down_projections,
    expert_first_weights,
    graphed_modules,
    has_adapted_weights,
    process_groups,
    router_of,
    shards_weights,
)
from megatron_moe_spec.integration.expert_router_coupling import ADAPTED_WEIGHTS
from megatron_moe_spec.integration.pipeline import Stages
from megatron_moe_spec.kernels import choose


def check_supported(chunks: list, model, moe_layers: list, stages: Stages, config: SpecConfig) -> None:
    """Raises ValueError that lists everything about the model that is not supported, with its remedy.

    Args:
        chunks: the model chunks of this rank.
        model: the model's TransformerConfig.
        moe_layers: every MoE layer of these chunks that is to have the losses.
        stages: those of all pipeline stages.
        config: the losses.
    """
    device = router_of(moe_layers[0]).weight.device if moe_layers else None
    # A layer may have settings of its own.
    settings = {id(one): one for one in (model, *(layer.config for layer in moe_layers))}.values()
    problems = [problem for one in settings for problem in _problems(one, moe_layers, stages, config, device)]
    problems += _parallel_problems(chunks, moe_layers, config)
    if config.erc_loss_coeff > 0 and any(map(shards_weights, chunks)):
        problems.append("ERC reads whole weights, of which FSDP leaves a rank shards (set --moe-erc-loss-coeff to 0)")
    # Of a pipeline, one stage may be frozen.
    whole = len(stages.own) == len(stages.num_layers)
    if whole and moe_layers and not any(p.requires_grad for chunk in chunks for p in chunk.parameters()):
        problems.append("the whole model is frozen: attach to the one that is trained")
    if problems:
        raise ValueError("the MoE specialization losses cannot be attached: " + "; ".join(dict.fromkeys(problems)))


def unsupported_settings(model, stages: Stages, config: SpecConfig, device: torch.device) -> list[str]:
    """What ``check_supported`` will say of a model on a device, as far as it can be told before one is built."""
    parallel = _expert_tensor_problems(
        model.expert_tensor_parallel_size or 1, model.tensor_model_parallel_size, config
    )
    return [*_problems(model, [], stages, config, device), *parallel]


def _problems(
    model, moe_layers: list, stages: Stages, config: SpecConfig, device: Optional[torch.device]
) -> Iterator[str]:
    if not any(stages.num_layers):
        yield "the model has no MoE layer (set --num-experts, or leave the losses' coefficients at 0)"
        return
    wants_activations = config.wants_activations
    if device is not None:
        yield from _kernel_problems(device, model, config)
    if wants_activations and model.moe_router_topk < 2:
        yield (
            "specialization compares the experts of a token and needs at least two "
            f"(--moe-router-topk is {model.moe_router_topk}; set it to 2 or more, "
            "or --moe-specialization-loss-coeff and --moe-spec-metrics-interval to 0)"
        )
    if config.coupling_loss_coeff > 0:
        yield from _coupling_problems(stages, config)
    if config.carries_messages and len(stages.num_layers) > len(stages.own):
        yield from _message_problems(model)
    if getattr(model, "transformer_impl", None) == "inference_optimized":
        yield "inference layers are not for training (set --transformer-impl transformer_engine)"
    graphed = graphed_modules(model)
    if graphed == "everything" or any(name.startswith("moe") for name in graphed):
        yield (
            "CUDA graphs over routers or experts skip the hooks when they are replayed "
            "(remove --cuda-graph-impl, or capture attention alone: --cuda-graph-scope attn)"
        )
    if wants_activations:
        yield from _row_problems("specialization", moe_layers, model)
    if config.orthogonality_loss_coeff > 0:
        yield from _orthogonality_problems(moe_layers, model)
    if config.erc_loss_coeff > 0:
        yield from _erc_problems(moe_layers, model)


def _kernel_problems(device: torch.device, model, config: SpecConfig) -> Iterator[str]:
    try:
        fused = choose(config.kernels, device)
    except ValueError as error:
        yield str(error)
        return
    if fused and config.kernels == "triton" and config.coupling_loss_coeff > 0 and model.moe_router_dtype == "fp64":
        yield (
            "the Triton kernels compute the coupling loss in fp32 "
            "(set --moe-router-dtype fp32, or --moe-spec-kernels to auto or torch)"
        )


def _coupling_problems(stages: Stages, config: SpecConfig) -> Iterator[str]:
    if sum(stages.num_layers) < 2:
        yield "coupling needs two MoE layers, the model has one (set --moe-coupling-loss-coeff to 0)"
    elif config.coupling_across_stages == "drop" and max(stages.num_layers) < 2:
        yield (
            "no pipeline stage has two MoE layers, so no pair of layers is left for coupling "
            "(set --moe-coupling-across-stages exact)"
        )


def _message_problems(model) -> Iterator[str]:
    if getattr(model, "mtp_standalone", False):
        yield (
            "stages with MTP layers of their own send tensors of another shape "
            "(set --moe-coupling-across-stages drop, or leave MTP layers in the last stage)"
        )
    if getattr(model, "overlap_moe_expert_parallel_comm", False):
        yield (
            "the schedule of --overlap-moe-expert-parallel-comm hands gradients past what carries the coupling of "
            "layers in different pipeline stages (set --moe-coupling-across-stages drop)"
        )


def _row_problems(loss: str, moe_layers: list, model) -> Iterator[str]:
    """What stands in the way of a loss on the experts' rows."""
    if getattr(model, "use_transformer_engine_op_fuser", False):
        yield f"{loss} reads rows that the fused experts do not hand out (remove --use-transformer-engine-op-fuser)"
    elif getattr(model, "moe_use_legacy_grouped_gemm", False) or not all(map(expert_down_projections, moe_layers)):
        yield (
            f"{loss} reads rows that the legacy GroupedMLP does not hand out "
            "(remove --moe-use-legacy-grouped-gemm, or --moe-grouped-gemm)"
        )
    if getattr(model, "moe_token_dispatcher_type", "allgather") == "flex":
        yield (
            f"the flex dispatcher does not tell which token a row belongs to, which {loss} needs "
            "(set --moe-token-dispatcher-type alltoall)"
        )
    yield from _quantization_problems(loss, model)


def _quantization_problems(loss: str, model) -> Iterator[str]:
    if getattr(model, "fp8", None) or getattr(model, "fp4", None):
        yield f"{loss} does not support quantized experts yet (remove --fp8-format / --fp4-format)"


def _parallel_problems(chunks: list, moe_layers: list, config: SpecConfig) -> list[str]:
    """Once there are layers their process groups count, whatever the settings say."""
    size = process_groups(chunks[0]).tp.size()
    return [
        problem
        for layer in moe_layers
        for problem in _expert_tensor_problems(column_group(layer.token_dispatcher).size(), size, config)
    ]


def _expert_tensor_problems(expert_tensor_size: int, tensor_size: int, config: SpecConfig) -> Iterator[str]:
    if config.wants_activations and expert_tensor_size > tensor_size:
        yield (
            "specialization needs experts to be split over ranks that share their tokens: "
            f"--expert-tensor-parallel-size {expert_tensor_size} is larger than "
            f"--tensor-model-parallel-size {tensor_size}"
        )
    if config.orthogonality_loss_coeff > 0 and expert_tensor_size > 1:
        yield (
            "orthogonality needs whole expert outputs, of which expert tensor parallelism leaves a rank one summand "
            f"(--expert-tensor-parallel-size is {expert_tensor_size}; set it to 1)"
        )


def _orthogonality_problems(moe_layers: list, model) -> Iterator[str]:
    if model.moe_router_topk < 2:
        yield (
            "orthogonality compares the experts of a token and needs at least two "
            f"(--moe-router-topk is {model.moe_router_topk}; set it to 2 or more, "
            "or --moe-orthogonality-loss-coeff to 0)"
        )
    yield from _row_problems("orthogonality", moe_layers, model)


def _erc_problems(moe_layers: list, model) -> Iterator[str]:
    if model.num_moe_experts < 2:
        yield f"ERC compares experts (--num-experts is {model.num_moe_experts}; set it to 2 or more)"
    if not model.gated_linear_unit:
        yield (
            "ERC is a loss of the experts' gates, which these experts lack "
            "(add --swiglu, or set --moe-erc-loss-coeff to 0)"
        )
    if getattr(model, "moe_latent_size", None):
        yield "ERC feeds router rows to the experts, which read another width here (remove --moe-latent-size)"
    if any(map(has_adapted_weights, moe_layers)):
        yield ADAPTED_WEIGHTS
    if not all(expert_first_weights(layer) for layer in moe_layers):
        yield (
            "ERC needs a weight of its own for every expert (remove --moe-single-grouped-weight and "
            "--moe-use-legacy-grouped-gemm)"
        )
    if getattr(model, "overlap_moe_expert_parallel_comm", False):
        yield (
            "ERC joins a router to its experts in one backward pass, which the schedule of "
            "--overlap-moe-expert-parallel-comm splits (remove it, or set --moe-erc-loss-coeff to 0)"
        )
    if delays_weight_gradients(model):
        yield (
            "ERC cannot add to weight gradients that are computed apart from the backward pass "
            "(remove --delay-wgrad-compute and --overlap-dispatch-backward-with-experts-wgrad)"
        )
    yield from _quantization_problems("ERC", model)
