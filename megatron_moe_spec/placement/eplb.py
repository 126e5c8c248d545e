"""DeepSeek's expert parallelism load balancer, https://github.com/deepseek-ai/EPLB, written anew.

Suffixes beside the folder's: X rows, each balanced by itself; I items of a row.
"""

from typing import Optional

import torch
from torch import Tensor


def rebalance_experts(weight: Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> Tensor:
    """[M, S] int64: the expert in each physical slot; DeepSeek's first result.

    Where ``num_nodes`` divides ``num_groups``, groups of experts are packed onto nodes first, and experts replicated
    within each node. Otherwise groups and nodes do not count. ``weight`` [M, E]: loads; ``num_replicas``: slots.
    """
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    weight_ME = weight.float()
    num_layers, num_experts = weight_ME.shape
    # Experts in the order of nodes.
    group_size = num_experts // num_groups
    groups_XI = _pack(weight_ME.unflatten(1, (num_groups, group_size)).sum(dim=2), num_nodes)
    experts_ME = (groups_XI[:, :, None] * group_size + torch.arange(group_size)).flatten(1)
    # From here on, a row is a node of a layer.
    per_node = num_experts // num_nodes
    weight_XI = weight_ME.gather(1, experts_ME).view(-1, per_node)
    replicas_XI, counts_XI = replicate(weight_XI, num_replicas // num_nodes)
    slots_XI = _pack((weight_XI / counts_XI).gather(1, replicas_XI), num_gpus // num_nodes)
    in_node_XI = replicas_XI.gather(1, slots_XI).view(num_layers, num_nodes, -1)
    places_MS = (in_node_XI + per_node * torch.arange(num_nodes)[:, None]).flatten(1)
    return experts_ME.gather(1, places_MS)


def replicate(weight_XI: Tensor, num_slots: int, most: Optional[int] = None) -> tuple[Tensor, Tensor]:
    """Replicas for the items whose replicas bear most, at most ``most`` of an item (None: any number).

    Returns:
        Items in the slots, [X, num_slots] int64, each item first once; replicas of each item, [X, I] int64.
    """
    num_rows, num_items = weight_XI.shape
    slots_XS = torch.arange(num_slots).repeat(num_rows, 1)
    counts_XI = torch.ones(num_rows, num_items, dtype=torch.int64)
    for slot in range(num_items, num_slots):
        borne_XI = weight_XI / counts_XI
        if most is not None:
            borne_XI[counts_XI >= most] = -1
        hottest_X = borne_XI.max(dim=1).indices
        slots_XS[:, slot] = hottest_X
        counts_XI[torch.arange(num_rows), hottest_X] += 1
    return slots_XS, counts_XI


def _pack(weight_XI: Tensor, num_packs: int) -> Tensor:
    """Items in the order of packs, [X, I] int64: heaviest first, each into the lightest pack that has room."""
    num_rows, num_items = weight_XI.shape
    per_pack = num_items // num_packs
    if per_pack == 1:
        return torch.arange(num_items).repeat(num_rows, 1)
    rows_X = torch.arange(num_rows)
    packed_XI = torch.empty(num_rows, num_items, dtype=torch.int64)
    loads_XP = torch.zeros(num_rows, num_packs)
    sizes_XP = torch.zeros(num_rows, num_packs, dtype=torch.int64)
    for item_X in weight_XI.sort(dim=1, descending=True).indices.unbind(dim=1):
        pack_X = loads_XP.masked_fill(sizes_XP == per_pack, torch.inf).argmin(dim=1)
        packed_XI[rows_X, pack_X * per_pack + sizes_XP[rows_X, pack_X]] = item_X
        loads_XP[rows_X, pack_X] += weight_XI[rows_X, item_X]
        sizes_XP[rows_X, pack_X] += 1
    return packed_XI
