"""Reorders the experts of a Megatron checkpoint: the same model, with other experts on the same rank.

The checkpoint is one of ``--ckpt-format torch_dist``. Tensors and bytes are copied as they are; no object of it is
unpickled but torch's own index of the checkpoint.
"""

import io
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem, WriteItem, WriteItemType

LATEST = "latest_checkpointed_iteration.txt"

# decoder.layers.mlp.router.weight holds all layers, decoder.layers.3.mlp.router.weight one.
_LAYER = re.compile(r"(?:^|\.)decoder\.layers\.(?:(?P<layer>\d+)\.)?mlp\.(?P<part>router|experts)\.(?P<rest>.+)")
_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")
_ONE_EXPERT = re.compile(r"(\.mlp\.experts\.experts\.)(\d+)\.")
_OF_EXPERTS = ("weight", "bias", "expert_bias", "local_tokens_per_expert", "global_tokens_per_expert")  # of a router
_SHARD = re.compile(r"/shard_([\d.]+)_([\d.]+)$")


def reorder_experts(checkpoint: Path, order: Mapping[int, Sequence[int]], out: Path) -> list[str]:
    """Writes the checkpoint with its experts in another order, less the optimizer's state; returns what was reordered.

    Args:
        checkpoint: the folder of Megatron's ``--save``, of which the latest iteration is taken, or one iteration's.
        order: for each MoE layer, by its index in the model, the present indices of its experts in their new order.
        out: a new folder, for Megatron's ``--load``.

    Raises:
        ValueError: it is not such a checkpoint, or not of the model that the order is for.
        FileExistsError: ``out`` exists.
    """
    source = _iteration_folder(checkpoint)
    if out.exists():
        raise FileExistsError(f"{out} exists: name a new folder with --out")
    state, index = _load(source)
    entries = {name: entry for name in state if (entry := _Entry.of(name, state[name]))}
    _check(entries, order, checkpoint)
    reordered = dict(
        entries[name].reorder(name, value, order) if name in entries else (name, value) for name, value in state.items()
    )
    target = out / source.name
    target.mkdir(parents=True)
    writer = dcp.FileSystemWriter(target)
    dcp.save(reordered, storage_writer=writer, planner=_RawSave(flatten_state_dict=False), no_dist=True)
    for file in source.iterdir():  # what Megatron keeps beside the tensors
        if file.name not in index and not (target / file.name).exists():
            shutil.copy(file, target)
    (out / LATEST).write_text(source.name.removeprefix("iter_").lstrip("0") or "0")
    return sorted(entries)


@dataclass(frozen=True)
class _Entry:
    """The layers and the experts that a name in the checkpoint belongs to."""

    layers: Sequence[int]
    expert: Optional[int]  # None: experts are a dimension of the tensor
    num_experts: Optional[int]  # of a layer; None: not known
    stacked: bool = False  # whether layers are the tensor's first dimension

    @staticmethod
    def of(name: str, value: Any) -> "Optional[_Entry]":
        """None for what has no experts."""
        found = _LAYER.search(name)
        if not found:
            return None
        layer = int(found["layer"]) if found["layer"] else None
        if layer is not None and (one := _ONE_EXPERT.search(name)):
            return _Entry([layer], int(one[2]), None)
        if shard := _SHARD.search(name):
            places, sizes = ([int(number) for number in part.split(".")] for part in shard.groups())
            if found["part"] == "router":
                return None
            return _Entry([places[0] if layer is None else layer], places[-1], sizes[-1])
        if found["part"] == "router" and found["rest"] not in _OF_EXPERTS:
            raise ValueError(f"{name} belongs to a router in a way that is not known: this model cannot be reordered")
        stacked = layer is None
        if not isinstance(value, torch.Tensor) or value.dim() <= stacked:
            return None
        return _Entry(range(len(value)) if layer is None else [layer], None, value.shape[stacked], stacked)

    def reorder(self, name: str, value: Any, order: Mapping[int, Sequence[int]]) -> tuple[str, Any]:
        if self.stacked:
            return name, torch.stack([value[layer][list(order[layer])] for layer in self.layers])
        experts = list(order[self.layers[0]])
        if self.expert is None:
            return name, value[experts]
        new = experts.index(self.expert)
        if _ONE_EXPERT.search(name):
            return _ONE_EXPERT.sub(rf"\g<1>{new}.", name), value
        return re.sub(r"(/shard_(?:\d+\.)?)\d+_", rf"\g<1>{new}_", name), value


def _check(entries: Mapping[str, _Entry], order: Mapping[int, Sequence[int]], checkpoint: Path) -> None:
    if not entries:
        raise ValueError(f"{checkpoint} has no experts: name the checkpoint of the model that was traced")
    layers = {layer for entry in entries.values() for layer in entry.layers}
    for name, entry in entries.items():
        for layer, experts in order.items():
            if entry.num_experts is not None and entry.num_experts != len(experts):
                raise ValueError(
                    f"{name} of {checkpoint} has {entry.num_experts} experts, the trace {len(experts)} in layer "
                    f"{layer}: the trace is of another model"
                )
    if layers != set(order):
        raise ValueError(
            f"{checkpoint} has experts in the layers {sorted(layers)}, the trace in {sorted(order)}: the trace is of "
            "another model, or numbers layers within a pipeline stage"
        )


def _iteration_folder(checkpoint: Path) -> Path:
    latest = checkpoint / LATEST
    folder = checkpoint / f"iter_{int(latest.read_text()):07d}" if latest.exists() else checkpoint
    if not (folder / ".metadata").exists():
        raise ValueError(
            f"{folder} is no checkpoint of --ckpt-format torch_dist: convert it by Megatron's --ckpt-convert-format "
            "torch_dist, or name the folder that --save was given"
        )
    return folder


def _load(folder: Path) -> tuple[dict, set[str]]:
    """Everything but the optimizer's state, and the names of the files that held it."""
    reader = dcp.FileSystemReader(folder)
    metadata = reader.read_metadata()
    state: dict = {}
    for name, stored in metadata.state_dict_metadata.items():
        if not _OPTIMIZER.match(name):
            tensor = isinstance(stored, TensorStorageMetadata)
            state[name] = torch.empty(stored.size, dtype=stored.properties.dtype) if tensor else b""
    dcp.load(state, storage_reader=reader, planner=_RawLoad(flatten_state_dict=False), no_dist=True)
    return state, {entry.relative_path for entry in metadata.storage_data.values()} | {".metadata"}


class _RawLoad(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.original_state_dict[read_item.dest_index.fqn] = value.getvalue()


class _RawSave(DefaultSavePlanner):
    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        return io.BytesIO(object) if write_item.type == WriteItemType.BYTE_IO else object
