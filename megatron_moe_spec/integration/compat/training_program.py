"""Megatron's training program: its arguments, the model that its flags describe, its writers."""

import math
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, Optional

from megatron_moe_spec.integration.compat.models import layer_pattern, main_part
from megatron_moe_spec.integration.compat.protocols import Arguments, TransformerConfig


def global_arguments() -> Optional[Arguments]:
    """The arguments of Megatron's training program; None where it does not run."""
    return getattr(sys.modules.get("megatron.training.global_vars"), "_GLOBAL_ARGS", None)


def graphs_inference_alone(args: Optional[Arguments]) -> bool:
    """Whether CUDA graphs are off in training, as in Megatron-RL; ``args``: of its training program, or None.

    Padding of experts for graphs is of inference: with it, graphs are meant for inference.
    """
    meant = any(getattr(args, name, False) for name in ("perform_rl_step", "moe_pad_experts_for_cuda_graph_inference"))
    return meant and not getattr(args, "rl_training_cuda_graphs", False)


def will_shard_weights(args: Arguments) -> bool:
    """Whether FSDP will leave each rank a shard of each weight, see ``compat.models.shards_weights``."""
    return any(getattr(args, name, False) for name in ("use_megatron_fsdp", "use_custom_fsdp", "use_torch_fsdp2"))


def training_modules() -> tuple[ModuleType, ModuleType]:
    """megatron.training.arguments and megatron.training.training.

    Raises:
        ImportError: Megatron's training program is not there, as with the megatron-core wheel 0.16, or lacks a package
            that it needs, as 0.17 and 0.18 do without PyYAML.
    """
    try:
        from megatron.training import arguments, training
    except ImportError as error:
        remedy = "run a script inside a Megatron-LM checkout, or install megatron-core >= 0.17"
        if error.name and error.name.split(".")[0] != "megatron":
            remedy = f"it needs a package that is not installed: {error.name}"
        raise ImportError(f"megatron.training cannot be imported ({error}): {remedy}") from error
    return arguments, training


def settings_of_flags(flags: list[str], add_arguments: Callable) -> tuple[Arguments, TransformerConfig]:
    """Megatron's validated arguments and its TransformerConfig for a command line; no process group is needed.

    Where torchrun has not set WORLD_SIZE, the job is as small as the layout allows.

    Raises:
        ImportError: see ``training_modules``.
        SystemExit: the parser does not know a flag or its value; it has written why to standard error.
        AssertionError, ValueError and others: Megatron does not accept the combination.
    """
    arguments, _ = training_modules()
    argv, sys.argv = sys.argv, [sys.argv[0], *flags]
    try:
        args = arguments.parse_args(add_arguments)
    finally:
        sys.argv = argv
    if "WORLD_SIZE" not in os.environ:
        columns = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
        dense = _shards(args, "tensor_parallel", args.tensor_model_parallel_size) * args.context_parallel_size
        experts = args.expert_model_parallel_size * _shards(args, "expert_tensor_parallel", columns)
        args.world_size = math.lcm(dense, experts) * args.pipeline_model_parallel_size
    if not will_shard_weights(args):  # with FSDP, Megatron refuses it
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    arguments.validate_args(args)
    return args, arguments.core_transformer_config_from_args(args)


def _shards(args: Arguments, what: str, columns: int) -> int:
    """Ranks that have parts of a weight; newer releases divide it over more than the tensor-parallel ones."""
    return max(getattr(args, f"{what}_num_weight_shards", None) or 1, columns)


def moe_layers_of_stages(args: Arguments, transformer_config: TransformerConfig) -> list[int]:
    """Number of MoE layers in each (virtual) pipeline stage, MTP layers left out, as Megatron will divide them."""
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    if not transformer_config.num_moe_experts:
        return [0]
    pattern = main_part(layer_pattern(args)[1])
    if "|" in pattern:
        return [stage.count("E") for stage in pattern.split("|")]
    frequency = transformer_config.moe_layer_freq
    if pattern:
        has_experts = [layer == "E" for layer in pattern]
    elif isinstance(frequency, int):
        if frequency < 1:
            raise ValueError(f"--moe-layer-freq is {frequency} (set it to 1 or more, or to a list of 0 and 1)")
        has_experts = [layer % frequency == 0 for layer in range(transformer_config.num_layers)]
    else:
        has_experts = list(map(bool, frequency))
    ranks = transformer_config.pipeline_model_parallel_size
    chunks = transformer_config.virtual_pipeline_model_parallel_size
    layout = transformer_config.pipeline_model_parallel_layout
    counts, end = [], 0
    for chunk in range(chunks or 1):
        for rank in range(ranks):
            if layout is not None:
                layers = layout.layout[rank][chunk].count(LayerType.decoder)
            else:
                layers = get_num_layers_to_build(transformer_config, chunk if chunks else None, rank)
            counts.append(sum(has_experts[end : end + layers]))
            end += layers
    return counts


def training_writers() -> tuple[Any, Any]:
    """Megatron's TensorBoard and W&B writers; None where there is none, as on all ranks but the last."""
    from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

    return get_tensorboard_writer(), get_wandb_writer()
