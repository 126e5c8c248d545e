"""Placements as files for inference engines, as the engines' own loaders read them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_moe_spec.placement.checkpoint import reorder_experts
from megatron_moe_spec.placement.placement import Placement
from megatron_moe_spec.traces.counts import loads
from megatron_moe_spec.traces.schema import Trace


@dataclass(frozen=True)
class Format:
    """How an engine reads placements."""

    write: Callable[..., None]  # takes a placement, the trace that it was made from, a path, and a checkpoint if needed
    suffixes: tuple[str, ...]  # that the path may have; none: it is a folder
    usage: str  # what the engine is told, with {path}, {devices} and {redundant}
    all_layers: bool = False  # whether dense layers count, so that the trace has to know the number of layers
    needs_checkpoint: bool = False


def write_sglang(placement: Placement, trace: Trace, path: Path) -> None:
    """``physical_to_logical_map`` of all layers, dense ones with the experts in order; JSON or .pt."""
    assert trace.num_layers is not None, "the command line refuses such a trace"
    num_slots = placement.cluster.num_slots
    trivial_S = torch.arange(num_slots) % placement.cluster.num_experts
    logical_S = dict(zip(placement.layers, placement.logical_MS))
    rows = torch.stack([logical_S.get(layer, trivial_S) for layer in range(trace.num_layers)])
    if path.suffix == ".pt":
        torch.save({"physical_to_logical_map": rows}, path)
    else:
        path.write_text(json.dumps({"physical_to_logical_map": rows.tolist()}))


def write_ktransformers(placement: Placement, trace: Trace, path: Path) -> None:
    """``logical_count``, [1, layers, E] int64, of the whole trace; 0 in dense layers."""
    counts = torch.zeros(1, trace.num_layers, trace.num_experts, dtype=torch.int64)
    counts[0, list(trace.layers)] = loads(trace)
    torch.save({"logical_count": counts}, path)


def write_trtllm(placement: Placement, trace: Trace, path: Path) -> None:
    """YAML for ``MoeLoadBalancerConfig``; layers by their indices in the whole model."""
    lines = [f"num_slots: {placement.cluster.num_slots}", "initial_global_assignments:"]
    lines += [f"  {layer}: {row}" for layer, row in zip(placement.layers, placement.logical_MS.tolist())]
    path.write_text("\n".join([*lines, "layer_updates_per_iter: 0", ""]))


def write_vllm_ascend(placement: Placement, trace: Trace, path: Path) -> None:
    """JSON for ``expert_map_path``; ``layer_id`` counts only MoE layers, from 0."""
    num_devices, layers = placement.cluster.num_devices, []
    for index, devices in enumerate(placement.logical_MS.unflatten(1, (num_devices, -1)).tolist()):
        listed = [{"device_id": device, "device_expert": experts} for device, experts in enumerate(devices)]
        layers.append({"layer_id": index, "device_count": num_devices, "device_list": listed})
    path.write_text(json.dumps({"moe_layer_count": len(layers), "layer_list": layers}))


def write_megatron(placement: Placement, trace: Trace, path: Path, checkpoint: Path) -> None:
    """Megatron's checkpoint with the experts in the order of the slots, without the optimizer's state."""
    reorder_experts(checkpoint, dict(zip(placement.layers, placement.logical_MS.tolist())), path)


FORMATS = {
    "sglang": Format(
        write_sglang,
        (".json", ".pt"),
        "sglang.launch_server --ep-size {devices} --ep-num-redundant-experts {redundant} --init-expert-location {path}",
        all_layers=True,
    ),
    "ktransformers": Format(
        write_ktransformers,
        (".pt",),
        "sglang.launch_server --kt-expert-placement-strategy frequency --init-expert-location {path} "
        "(it takes counts of tokens alone, and keeps the hottest experts on GPUs)",
        all_layers=True,
    ),
    "trtllm": Format(
        write_trtllm, (".yaml", ".yml"), "moe_config: load_balancer: {path}, with moe_expert_parallel_size {devices}"
    ),
    "vllm-ascend": Format(
        write_vllm_ascend,
        (".json",),
        """--enable-expert-parallel --additional-config '{{"eplb_config": {{"expert_map_path": "{path}"}}}}'""",
    ),
    "megatron": Format(
        write_megatron,
        (),
        "--load {path} --no-load-optim --expert-model-parallel-size {devices} (the same model, its experts reordered)",
        needs_checkpoint=True,
    ),
}
