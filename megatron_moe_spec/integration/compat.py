"""Everything that is known of Megatron's symbols and of how they differ between releases."""

import functools
import math
import os
import sys
import weakref
from typing import Callable, Iterator, Union

import torch
from torch import Tensor, nn

OLDEST_SUPPORTED = (0, 14)


def require_megatron() -> None:
    """Raises ImportError where megatron-core is missing or too old, naming the remedy."""
    oldest = ".".join(map(str, OLDEST_SUPPORTED))
    try:
        version = megatron_version()
    except ImportError as error:
        raise ImportError(
            f"megatron-core is needed to attach the losses: pip install 'megatron-core>={oldest}'"
        ) from error
    if _release(version) < OLDEST_SUPPORTED:
        raise ImportError(f"megatron-core {version} is too old: {oldest} or newer is needed")


def megatron_version() -> str:
    """Version of the Megatron-Core that is imported: an installed one, or that of a checkout around the script."""
    from megatron.core import __version__ as version

    return version


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def moe_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every MoE layer, in the order in which the model runs them; MTP layers left out."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    for name, module in model.named_modules():
        if isinstance(module, MoELayer) and "mtp" not in name.split("."):
            yield name, module


def model_config(chunks: list[nn.Module]):
    """The TransformerConfig of a model; None where nothing in it has one."""
    stage = stage_module(chunks[0])
    if hasattr(stage, "config"):
        return stage.config
    return next((layer.config for chunk in chunks for _, layer in moe_layers(chunk)), None)


def stage_module(chunk: nn.Module) -> nn.Module:
    """The model inside the wrappers (Float16Module, DDP) of a model chunk: what gets a pipeline stage's input."""
    while not hasattr(chunk, "pre_process") and isinstance(getattr(chunk, "module", None), nn.Module):
        chunk = chunk.module
    return chunk


def pipeline_group(chunk: nn.Module):
    """The ranks of the pipeline stages."""
    group = getattr(stage_module(chunk), "pp_group", None)
    if group is None:
        from megatron.core.parallel_state import get_pipeline_model_parallel_group

        group = get_pipeline_model_parallel_group()
    return group


def change_received_shapes(config, change: Callable) -> Callable[[], None]:
    """Has the stages of a model receive tensors of another shape from each other.

    ``P2PCommunicator._communicate`` is where every schedule's tensors pass; schedules with variable sequence lengths
    send shapes along and ask for none.

    Args:
        config: the model's; schedules are told by it.
        change: shape and dtype -> shape. It outlives the model where nobody undoes it: it should not hold on to one.

    Returns:
        A function that undoes it.
    """
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    changes = vars(P2PCommunicator._communicate).get("megatron_moe_spec_changes")
    if changes is None:
        original, changes = P2PCommunicator._communicate, {}

        @functools.wraps(original)
        def communicate(self, *, tensor_shape, **others):
            of_config, change = changes.get(id(self.config), (None, None))
            # A config that is gone may have had the same id.
            if tensor_shape and change and of_config() is self.config:
                tensor_shape = change(tensor_shape, self.config.pipeline_dtype)
            return original(self, tensor_shape=tensor_shape, **others)

        communicate.megatron_moe_spec_changes = changes
        P2PCommunicator._communicate = communicate
    changes[id(config)] = (weakref.ref(config), change)
    return lambda: changes.pop(id(config), None)


def token_group(moe_layer: nn.Module):
    """The ranks among which a micro-batch's tokens are divided: tensor (sequence) x context parallel."""
    return moe_layer.router.tp_cp_group


def column_group(dispatcher):
    """The ranks over which the columns of an expert's activations are divided: expert tensor parallel."""
    return dispatcher.tp_group


def expert_down_projections(moe_layer: nn.Module) -> list[nn.Module]:
    """The modules whose input is z: one ``linear_fc2`` for all local experts, or one for each.

    Empty for the legacy GroupedMLP, which has no such module.
    """
    experts = moe_layer.experts
    if hasattr(experts, "local_experts"):
        return [expert.linear_fc2 for expert in experts.local_experts]
    return [experts.linear_fc2] if hasattr(experts, "linear_fc2") else []


def expert_group(dispatcher):
    """The ranks that hold the parts of one set of experts: expert x expert tensor parallel."""
    return dispatcher.tp_ep_group


def expert_first_weights(moe_layer: nn.Module) -> list[Tensor]:
    """``linear_fc1``'s weight [2 F, H] of every local expert; empty where there is no such weight for each."""
    experts = moe_layer.experts
    if hasattr(experts, "local_experts"):
        weights = [getattr(expert.linear_fc1, "weight", None) for expert in experts.local_experts]
    else:
        linear = getattr(experts, "linear_fc1", None)
        weights = [getattr(linear, f"weight{i}", None) for i in range(moe_layer.num_local_experts)]
    return [] if any(weight is None for weight in weights) else weights


def gate_rows(moe_layer: nn.Module, weight: Tensor) -> Tensor:
    """The rows of an expert's ``linear_fc1`` weight [2 F, H] that make its gate, as a view [..., H] of F rows.

    They are its first half, or every other block of rows where TEGroupedMLP interleaves gate and linear units.
    """
    size = getattr(moe_layer.config, "moe_mlp_glu_interleave_size", None)
    if size is None or hasattr(moe_layer.experts, "local_experts"):
        size = len(weight) // 2
    return weight.view(-1, 2, size, weight.shape[-1])[:, 0]


def adds_to_main_gradient(config) -> bool:
    """Whether linear layers write their weight's gradient into ``main_grad``, past ``Tensor.grad``."""
    return config.gradient_accumulation_fusion


def delays_weight_gradients(config) -> bool:
    """Whether some weights' gradients are computed apart from the backward pass."""
    names = ("delay_wgrad_compute", "overlap_dispatch_backward_with_experts_wgrad")
    return any(getattr(config, name, False) for name in names)


def graphed_modules(config) -> Union[list[str], str]:
    """Names of what CUDA graphs capture: a list of module kinds, "everything", or an empty list."""
    implementation = getattr(config, "cuda_graph_impl", "none")
    if getattr(config, "enable_cuda_graph", False) or getattr(config, "external_cuda_graph", False):
        return "everything"
    if implementation in (None, "none"):
        return []
    scope = getattr(config, "cuda_graph_modules", None) or getattr(config, "cuda_graph_scope", None)
    if not scope or scope == "full":
        return "everything"
    names = scope.split(",") if isinstance(scope, str) else [getattr(s, "name", s) for s in scope]
    return "everything" if {"full", "full_iteration"} & set(names) else names


def backward_loss_scale(config) -> Union[Tensor, float]:
    """The factor that Megatron applies to auxiliary losses in this backward pass.

    Loss scaling may be dynamic and the schedules set it after each forward: read it in backward.
    """
    from megatron.core import __version__ as version
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    scale = MoEAuxLossAutoScaler.main_loss_backward_scale
    scale = 1.0 if scale is None else scale
    # Up to 0.15 the schedules leave out the context-parallel size, by which gradients are averaged later.
    lacks_size = not config.calculate_per_token_loss and _release(version) < (0, 16)
    return scale * config.context_parallel_size if lacks_size else scale


def training_modules():
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


def settings_of_flags(flags: list[str], add_arguments: Callable):
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
        dense = args.tensor_model_parallel_size * args.context_parallel_size
        columns = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
        experts = args.expert_model_parallel_size * columns
        args.world_size = math.lcm(dense, experts) * args.pipeline_model_parallel_size
    arguments.validate_args(args)
    return args, arguments.core_transformer_config_from_args(args)


def moe_layers_of_stages(args, config) -> list[int]:
    """Number of MoE layers in each (virtual) pipeline stage, MTP layers left out, as Megatron will divide them.

    Args:
        args, config: from ``settings_of_flags``.
    """
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    if not config.num_moe_experts:
        return [0]
    pattern = getattr(args, "hybrid_layer_pattern", None) or getattr(args, "hybrid_override_pattern", None)
    if pattern and "|" in pattern:
        return [stage.count("E") for stage in pattern.split("/")[0].split("|")]
    frequency = config.moe_layer_freq
    if pattern:
        has_experts = [layer == "E" for layer in pattern.split("/")[0]]
    elif isinstance(frequency, int):
        has_experts = [layer % frequency == 0 for layer in range(config.num_layers)]
    else:
        has_experts = list(map(bool, frequency))
    ranks, chunks = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size
    layout = config.pipeline_model_parallel_layout
    numbers, end = [], 0
    for chunk in range(chunks or 1):
        for rank in range(ranks):
            if layout is not None:
                layers = layout.layout[rank][chunk].count(LayerType.decoder)
            else:
                layers = get_num_layers_to_build(config, chunk if chunks else None, rank)
            numbers.append(sum(has_experts[end : end + layers]))
            end += layers
    return numbers


def training_writers():
    """Megatron's TensorBoard and W&B writers; None where there is none, as on all ranks but the last."""
    from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

    return get_tensorboard_writer(), get_wandb_writer()


def current_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
