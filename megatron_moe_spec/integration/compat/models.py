"""Megatron's models, their MoE layers and routers, and what is put around them."""

from dataclasses import dataclass
from typing import Any, Optional

from torch import Tensor, nn

from megatron_moe_spec.integration.compat.protocols import MoELayer, Router, TransformerConfig


@dataclass(frozen=True)
class FoundLayers:
    """MoE layers below a model chunk, by name, in the order in which the model runs them."""

    included: dict[str, nn.Module]  # those that the chunk's own decoder runs
    skipped: dict[str, str]  # the others, and why; also modules that look like MoE layers and are none of Megatron's


def moe_layers(chunk: nn.Module) -> FoundLayers:
    """The MoE layers that a chunk trains, and those that only lie in it: of MTP, of a teacher, of an average, ...

    A Megatron model has a ``decoder``. Where the chunk is no such model itself, it is the one model in it that is not
    frozen. A chunk without any such model is taken for a decoder as it is.

    Raises:
        ValueError: it cannot be told which of several models in the chunk is trained, or none is; or what looks like
            MoE layers is none of Megatron's.
    """
    from megatron.core.transformer.moe.moe_layer import MoELayer

    stage = stage_module(chunk)
    modules = dict(chunk.named_modules())
    names = {name: layer for name, layer in modules.items() if isinstance(layer, MoELayer)}
    skipped = {
        name: f"a {_path(type(one))}, not Megatron's MoELayer"
        for name, one in modules.items()
        # A router and experts of their own, as forks have them.
        if name not in names and {"router", "experts"} <= one._modules.keys()
    }
    if skipped and not names:
        found = ", ".join(f"{name} ({reason})" for name, reason in skipped.items())
        raise ValueError(
            f"the losses know Megatron's MoE layers alone, and this model has others: {found} (build the model with "
            f"{_path(MoELayer)}, or derive the class from it)"
        )
    model = _trained_model(stage, set(names.values()))
    own = set(model._modules.get("decoder", model).modules())
    included = {}
    for name, layer in names.items():
        if "mtp" in name.split("."):
            skipped[name] = "it belongs to multi-token prediction"
        elif layer not in own:
            skipped[name] = "it is not in the decoder of the trained model"
        elif getattr(router_of(layer), "is_hash_layer", False):
            skipped[name] = "a table decides in its router's place (--moe-n-hash-layers)"
        else:
            included[name] = layer
    return FoundLayers(included, skipped)


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def is_model(chunk: nn.Module) -> bool:
    """Whether a chunk is a Megatron model itself, in wrappers of Megatron's, and not a module that has one."""
    return "decoder" in stage_module(chunk)._modules


def submodule(chunk: nn.Module, name: str) -> Optional[nn.Module]:
    """The module of that name in a chunk now; None where there is none."""
    try:
        return chunk.get_submodule(name)
    except AttributeError:
        return None


def runs(found: Any, module: nn.Module) -> bool:
    """Whether what is found in a module's place is that module, or has it inside, as an adapter does."""
    return found is module or (isinstance(found, nn.Module) and any(one is module for one in found.modules()))


def _trained_model(stage: nn.Module, layers: set[nn.Module]) -> nn.Module:
    if is_model(stage):
        return stage
    models, inside = {}, set()
    for name, module in stage.named_modules():
        if module not in inside and "decoder" in module._modules and layers & set(module.modules()):
            models[name] = module
            inside |= set(module.modules())
    if not models:
        return stage
    trained = {name: model for name, model in models.items() if any(p.requires_grad for p in model.parameters())}
    if not trained and len(models) == 1:  # what comes before it may be trained through it
        trained = models
    if len(trained) != 1:
        found = "no model that is trained" if not trained else f"several models: {', '.join(trained)}"
        raise ValueError(
            f"a module given to attach() holds {found} (of {', '.join(models)}): give it the trained one itself, or "
            "freeze the others by requires_grad_(False)"
        )
    return next(iter(trained.values()))


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside adapters (LoRA); the module itself where there is none."""
    while (inner := next(filter(None, (getattr(module, name, None) for name in _WRAPPED)), None)) is not None:
        module = inner
    return module


_WRAPPED = ("to_wrap", "base_layer")  # Megatron-Bridge and NeMo; PEFT and ms-swift


def router_of(moe_layer: MoELayer) -> Router:
    return unwrapped(moe_layer.router)


def follows_scores(router: Router, logits_TE: Tensor, active_TE: Tensor) -> Optional[Tensor]:
    """Share of tokens whose experts are among the best by the router's own scores; None where others may be, too.

    What no number says anything of (NaN) counts as following.
    """
    transformer_config = router.config
    others = ("moe_router_num_groups", "moe_router_topk_limited_devices")
    balancing = transformer_config.moe_router_load_balancing_type
    if any(getattr(transformer_config, name, None) for name in others) or "sinkhorn" in balancing:
        return None
    scores_TE = logits_TE.float()
    bias_E = getattr(router, "expert_bias", None)
    if bias_E is not None:
        if transformer_config.moe_router_score_function != "sigmoid":
            return None
        scores_TE = scores_TE.sigmoid() + bias_E
    worst_T1 = scores_TE.topk(transformer_config.moe_router_topk, dim=1).values[:, -1:]
    return 1.0 - (active_TE & (scores_TE < worst_T1)).any(dim=1).float().mean()


def layer_index(moe_layer: MoELayer) -> Optional[int]:
    """Index of the layer among all layers of the whole model, from 0; None where it was built without one."""
    number = moe_layer.layer_number
    return None if number is None else number - 1


def whole_weight(router: Router) -> Optional[Tensor]:
    """[E, H], without gradients; None where FSDP leaves a rank a part of it."""
    weight = router.weight.detach()
    return weight if weight.untyped_storage().size() and not hasattr(router.weight, "device_mesh") else None


def model_config(chunks: list[nn.Module]) -> Optional[TransformerConfig]:
    """The TransformerConfig of a model; None where nothing in it has one."""
    stage = stage_module(chunks[0])
    if hasattr(stage, "config"):
        return stage.config
    return next((layer.config for chunk in chunks for layer in moe_layers(chunk).included.values()), None)


def stage_module(chunk: nn.Module) -> nn.Module:
    """The model inside the wrappers (Float16Module, DDP) of a model chunk: what gets a pipeline stage's input."""
    while not hasattr(chunk, "pre_process") and isinstance(getattr(chunk, "module", None), nn.Module):
        chunk = chunk.module
    return chunk


def called_module(chunk: nn.Module) -> nn.Module:
    """What is called for each micro-batch, with hooks: ``stage_module``, as a rule.

    Up to 0.18, Megatron-FSDP runs the forward of the model in it past the model's hooks.
    """
    stage = stage_module(chunk)
    while chunk is not stage:
        if type(chunk).__name__ == "MegatronFSDP":
            return chunk
        chunk = chunk.module
    return stage


def layer_pattern(owner: Any) -> tuple[str, str]:
    """(flag, value) of the layer pattern that a model is built of; two empty strings where it is built without one.

    Args:
        owner: the model inside the wrappers of a chunk, or the arguments of Megatron's training program.
    """
    # Newer releases still take the older flag, and not both.
    for name in ("hybrid_override_pattern", "hybrid_layer_pattern"):
        if pattern := getattr(owner, name, None):
            return f"--{name.replace('_', '-')}", pattern
    return "", ""


def main_part(pattern: str) -> str:
    """The decoder's layers in a layer pattern; those of MTP follow it."""
    return pattern.split("/")[0]


def shards_weights(chunk: nn.Module) -> bool:
    """Whether each rank holds a shard of each weight (FSDP), and whole weights come and go."""
    names = ("FullyShardedDataParallel", "TorchFullyShardedDataParallel", "FSDPModule")
    wrappers = [chunk]
    while isinstance(getattr(wrappers[-1], "module", None), nn.Module):
        wrappers.append(wrappers[-1].module)
    named = any(base.__name__ in names for module in wrappers for base in type(module).__mro__)
    # Module.parameters() would compare each weight, of which experts have thousands, with all others.
    weights = (weight for module in chunk.modules() for weight in module._parameters.values())
    return named or any(hasattr(weight, "device_mesh") for weight in weights)
