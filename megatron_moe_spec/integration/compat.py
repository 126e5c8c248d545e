"""Everything that is known of Megatron's symbols and of how they differ between releases."""

import contextlib
import functools
import importlib.util
import math
import os
import re
import sys
import weakref
from dataclasses import dataclass
from typing import Callable, Union

import torch
from torch import Tensor, nn

OLDEST_SUPPORTED = (0, 16, 1)


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


def _release(version: str) -> tuple[int, ...]:
    """(0, 16, 1) of "0.16.1", "0.16.1rc0" and "0.16.1+local"."""
    return tuple(int(re.match(r"\d*", part)[0] or 0) for part in version.split(".")[:3])


@dataclass(frozen=True)
class FoundLayers:
    """MoE layers below a model chunk, by name, in the order in which the model runs them.

    Attributes:
        taken: those that the chunk's own decoder runs.
        left_out: the others, and why.
    """

    taken: dict[str, nn.Module]
    left_out: dict[str, str]


def moe_layers(chunk: nn.Module) -> FoundLayers:
    """The MoE layers that a chunk trains, and those that only lie in it: of MTP, of a teacher, of an average, ...

    A Megatron model has a ``decoder``. Where the chunk is no such model itself, it is the one model in it that is not
    frozen. A chunk without any such model is taken for a decoder as it is.

    Raises:
        ValueError: it cannot be told which of several models in the chunk is trained, or none is.
    """
    from megatron.core.transformer.moe.moe_layer import MoELayer

    stage = stage_module(chunk)
    names = {name: layer for name, layer in chunk.named_modules() if isinstance(layer, MoELayer)}
    model = _trained_model(stage, set(names.values()))
    own = set(model._modules.get("decoder", model).modules())
    taken, left_out = {}, {}
    for name, layer in names.items():
        if "mtp" in name.split("."):
            left_out[name] = "it belongs to multi-token prediction"
        elif layer not in own:
            left_out[name] = "it is not in the decoder of the trained model"
        else:
            taken[name] = layer
    return FoundLayers(taken, left_out)


def _trained_model(stage: nn.Module, layers: set[nn.Module]) -> nn.Module:
    if "decoder" in stage._modules:
        return stage
    models, inside = {}, set()
    for name, module in stage.named_modules():
        if module not in inside and "decoder" in module._modules and layers & set(module.modules()):
            models[name] = module
            inside |= set(module.modules())
    if not models:
        return stage
    trained = {name: model for name, model in models.items() if any(p.requires_grad for p in model.parameters())}
    if len(trained) != 1:
        found = "no model that is trained" if not trained else f"several models: {', '.join(trained)}"
        raise ValueError(
            f"a module given to attach() holds {found} (of {', '.join(models)}): give it the trained one itself, or "
            "freeze the others by requires_grad_(False)"
        )
    return next(iter(trained.values()))


def unwrapped(module: nn.Module) -> nn.Module:
    """What adapters (LoRA) were put around."""
    while (inner := next(filter(None, (getattr(module, name, None) for name in _WRAPPED)), None)) is not None:
        module = inner
    return module


_WRAPPED = ("to_wrap", "base_layer")  # Megatron-Bridge and NeMo; PEFT and ms-swift


def router_of(moe_layer: nn.Module) -> nn.Module:
    return unwrapped(moe_layer.router)


def model_config(chunks: list[nn.Module]):
    """The TransformerConfig of a model; None where nothing in it has one."""
    stage = stage_module(chunks[0])
    if hasattr(stage, "config"):
        return stage.config
    return next((layer.config for chunk in chunks for layer in moe_layers(chunk).taken.values()), None)


def stage_module(chunk: nn.Module) -> nn.Module:
    """The model inside the wrappers (Float16Module, DDP) of a model chunk: what gets a pipeline stage's input."""
    while not hasattr(chunk, "pre_process") and isinstance(getattr(chunk, "module", None), nn.Module):
        chunk = chunk.module
    return chunk


def pipeline_group(chunk: nn.Module):
    """The ranks of the pipeline stages."""
    return process_groups(chunk).pp


def follow_checkpoints(first_pass: Callable, recomputation: Callable) -> None:
    """Tells what runs in a reentrant checkpoint: Megatron's, Transformer Engine's and torch's own.

    Each is an autograd Function; its forward is the first pass, its backward recomputes it. A second call does nothing
    but to look for checkpoints that were imported since. There is no way back, and no need for one: without
    trackers, nothing happens.

    Args:
        first_pass: whether the checkpoint was made with gradients -> context manager around the first pass, which gives
            a value for the recomputation.
        recomputation: that value -> context manager around the backward.
    """
    for module_name, name in _CHECKPOINTS:
        function = getattr(sys.modules.get(module_name), name, None)
        if function is not None and not hasattr(function, "megatron_moe_spec"):
            _follow(function, first_pass, recomputation)
            function.megatron_moe_spec = True


_CHECKPOINTS = (
    ("megatron.core.tensor_parallel.random", "CheckpointFunction"),
    ("torch.utils.checkpoint", "CheckpointFunction"),
    ("transformer_engine.pytorch.distributed", "_CheckpointFunction"),
)


def _follow(function: type, first_pass: Callable, recomputation: Callable) -> None:
    forward, backward = function.forward, function.backward
    has_gradients = [False]  # forward itself always runs without

    def followed_apply(cls, *args, **kwargs):
        has_gradients.append(torch.is_grad_enabled())
        try:
            return super(function, cls).apply(*args, **kwargs)
        finally:
            has_gradients.pop()

    @functools.wraps(forward)
    def followed_forward(ctx, *args, **kwargs):
        with first_pass(has_gradients[-1]) as ctx.megatron_moe_spec:
            return forward(ctx, *args, **kwargs)

    @functools.wraps(backward)
    def followed_backward(ctx, *gradients):
        with recomputation(getattr(ctx, "megatron_moe_spec", [])):
            return backward(ctx, *gradients)

    function.apply = classmethod(followed_apply)
    function.forward, function.backward = staticmethod(followed_forward), staticmethod(followed_backward)


def around_schedules(owner, enter: Callable) -> None:
    """Has a context manager around every run of Megatron's schedules, whichever model they run, while ``owner`` lives.

    They are looked up in their module by ``get_forward_backward_func`` at each call.

    Args:
        enter: owner, the schedule's name, its keyword arguments -> context manager, which gives them as they are to be.
    """
    from megatron.core.pipeline_parallel import schedules

    for name in _SCHEDULES:
        schedule = getattr(schedules, name)
        if not hasattr(schedule, "megatron_moe_spec_around"):
            setattr(schedules, name, _surrounded(schedule))
    _around_schedules[owner] = enter


def leave_schedules(owner) -> None:
    """Undoes ``around_schedules``."""
    _around_schedules.pop(owner, None)


_SCHEDULES = (
    "forward_backward_no_pipelining",
    "forward_backward_pipelining_with_interleaving",
    "forward_backward_pipelining_without_interleaving",
)
_around_schedules: "weakref.WeakKeyDictionary[object, Callable]" = weakref.WeakKeyDictionary()


def _surrounded(schedule: Callable) -> Callable:
    @functools.wraps(schedule)
    def run(**arguments):
        with contextlib.ExitStack() as stack:
            for owner, enter in list(_around_schedules.items()):
                arguments = stack.enter_context(enter(owner, schedule.__name__, arguments))
            return schedule(**arguments)

    run.megatron_moe_spec_around = True
    return run


def with_received_shapes(name: str, arguments: dict, config, num_ranks: int, change: Callable) -> dict:
    """A schedule's keyword arguments, by which stages receive tensors of another shape from each other.

    Nothing changes where shapes travel with the tensors (``variable_seq_lengths``).

    Args:
        name, arguments: of the schedule, see ``around_schedules``.
        config: the model's TransformerConfig.
        num_ranks: that a sequence is divided over.
        change: shape [sequence, batch, hidden] of this rank, dtype -> shape.
    """
    if config.variable_seq_lengths:
        return arguments
    if name != "forward_backward_pipelining_with_interleaving":
        adjust = arguments.get("adjust_tensor_shapes_fn")

        def adjust_tensor_shapes(receive, send):
            if adjust is not None:
                receive, send = adjust(receive, send)
            return tuple([change(shape, config.pipeline_dtype) for shape in shapes] for shapes in (receive, send))

        return {**arguments, "adjust_tensor_shapes_fn": adjust_tensor_shapes}
    # This schedule takes no such function. All that it does with the length is to compute the shape.
    shape = arguments["seq_length"] // num_ranks, arguments["micro_batch_size"], config.hidden_size
    return {**arguments, "seq_length": change(shape, config.pipeline_dtype)[0] * num_ranks}


def process_groups(chunk: nn.Module):
    """A model's own ProcessGroupCollection, or that of the job."""
    groups = getattr(stage_module(chunk), "pg_collection", None)
    if groups is None:
        from megatron.core.process_groups_config import ProcessGroupCollection

        groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp", "pp", "tp_dp_cp"])
    return groups


def model_ranks(chunk: nn.Module) -> list:
    """Groups by which a sum over one, then over the next, is a sum over all ranks that hold the model."""
    groups = process_groups(chunk)
    found = [getattr(groups, name, None) for name in ("tp_dp_cp", "pp")]
    if found[0] is None:
        found[:1] = [getattr(groups, name, None) for name in ("tp", "dp_cp")]
    return [group for group in found if group is not None]


def sequence_ranks(chunk: nn.Module) -> int:
    """Number of ranks that a sequence is divided over between layers."""
    groups = process_groups(chunk)
    return groups.cp.size() * (groups.tp.size() if stage_module(chunk).config.sequence_parallel else 1)


def token_group(moe_layer: nn.Module):
    """The ranks among which a micro-batch's tokens are divided: tensor (sequence) x context parallel."""
    return router_of(moe_layer).tp_cp_group


def column_group(dispatcher):
    """The ranks over which the columns of an expert's activations are divided: expert tensor parallel."""
    return dispatcher.tp_group


def expert_down_projections(moe_layer: nn.Module) -> list[nn.Module]:
    """The modules whose input is z: one ``linear_fc2`` for all local experts, or one for each.

    Empty for the legacy GroupedMLP, which has no such module.
    """
    experts = unwrapped(moe_layer.experts)
    if hasattr(experts, "local_experts"):
        return [expert.linear_fc2 for expert in experts.local_experts]
    return [experts.linear_fc2] if hasattr(experts, "linear_fc2") else []


def expert_group(dispatcher):
    """The ranks that hold the parts of one set of experts: expert x expert tensor parallel."""
    return dispatcher.tp_ep_group


def expert_first_weights(moe_layer: nn.Module) -> list[Tensor]:
    """``linear_fc1``'s weight [2 F, H] of every local expert; empty where there is no such weight for each."""
    experts = unwrapped(moe_layer.experts)
    if hasattr(experts, "local_experts"):
        weights = [getattr(unwrapped(expert.linear_fc1), "weight", None) for expert in experts.local_experts]
    else:
        linear = unwrapped(experts.linear_fc1) if hasattr(experts, "linear_fc1") else None
        weights = [getattr(linear, f"weight{i}", None) for i in range(moe_layer.num_local_experts)]
    return [] if any(weight is None for weight in weights) else weights


def has_adapted_weights(moe_layer: nn.Module) -> bool:
    """Whether adapters were put around the router, or around what reads the experts' first weights."""
    experts = unwrapped(moe_layer.experts)
    owners = getattr(experts, "local_experts", [experts])
    modules = [moe_layer.router, *(getattr(owner, "linear_fc1", None) for owner in owners)]
    return any(module is not None and has_adapter(module) for module in modules)


def has_adapter(module: nn.Module) -> bool:
    """Whether an adapter was put around a module."""
    return unwrapped(module) is not module


def has_grouped_experts(transformer_config) -> bool:
    """Whether a layer's local experts are one module, by the flags; transformer-engine has it."""
    wanted = transformer_config.moe_grouped_gemm and transformer_config.transformer_impl != "local"
    return wanted and importlib.util.find_spec("transformer_engine") is not None


def describe_down_projections(transformer_config) -> str:
    """Whose input z is."""
    if has_grouped_experts(transformer_config):
        return "input of linear_fc2 of all local experts (TEGroupedMLP)"
    wanted = transformer_config.moe_grouped_gemm and transformer_config.transformer_impl != "local"
    why = " for want of transformer-engine" if wanted else ""
    return f"input of each local expert's linear_fc2 (SequentialMLP{why})"


def describe_dispatch(transformer_config) -> str:
    """Where rows are, and what of them is on other ranks."""
    ranks = transformer_config.expert_model_parallel_size
    columns = transformer_config.expert_tensor_parallel_size or transformer_config.tensor_model_parallel_size
    where = f"rows are returned from {ranks} expert-parallel ranks" if ranks > 1 else "every rank has all experts"
    summed = f"; products are summed over {columns} expert-tensor-parallel ranks" if columns > 1 else ""
    return f"{transformer_config.moe_token_dispatcher_type}; {where}{summed}"


def shards_weights(chunk: nn.Module) -> bool:
    """Whether each rank holds a shard of each weight (FSDP), and whole weights come and go."""
    names = ("FullyShardedDataParallel", "TorchFullyShardedDataParallel", "FSDPModule")
    wrappers = [chunk]
    while isinstance(getattr(wrappers[-1], "module", None), nn.Module):
        wrappers.append(wrappers[-1].module)
    named = any(base.__name__ in names for module in wrappers for base in type(module).__mro__)
    return named or any(hasattr(weight, "device_mesh") for weight in chunk.parameters())


def gate_rows(moe_layer: nn.Module, weight: Tensor) -> Tensor:
    """The rows of an expert's ``linear_fc1`` weight [2 F, H] that make its gate, as a view [..., H] of F rows.

    They are its first half, or every other block of rows where TEGroupedMLP interleaves gate and linear units.
    """
    size = getattr(moe_layer.config, "moe_mlp_glu_interleave_size", None)
    if size is None or hasattr(unwrapped(moe_layer.experts), "local_experts"):
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


def backward_loss_scale() -> Union[Tensor, float]:
    """The factor that Megatron applies to auxiliary losses in this backward pass.

    Loss scaling may be dynamic and the schedules set it after each forward: read it in backward.
    """
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    scale = MoEAuxLossAutoScaler.main_loss_backward_scale
    return 1.0 if scale is None else scale


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
