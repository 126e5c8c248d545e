"""How a placement serves the tokens of a trace."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe_spec.placement.placement import Placement
from megatron_moe_spec.traces.schema import Trace

_PART = 2**14  # tokens whose counts on all devices are in memory at once


@dataclass(frozen=True)
class Measures:
    """Means over tokens in each MoE layer, [M] float64; ``hops`` [M - 1].

    A token's own device is the number of its sequence modulo the number of devices; one row serves all its experts on a
    device.
    """

    load: Tensor  # of the device that bears most, over the mean of devices
    batch_load: Tensor  # the same in each batch; the mean of batches
    devices: Tensor  # that a token goes to
    nodes: Tensor  # that a token goes to
    rows: Tensor  # that a token sends to devices other than its own and gets back
    hops: Tensor  # share on one device, of the pairs of a token's expert and its expert in the next layer


def measure(placement: Placement, trace: Trace) -> Measures:
    """Measures a placement on a trace of the same layers."""
    num_tokens, num_layers = trace.experts_TMK.shape[:2]
    num_devices, devices_MER = placement.cluster.num_devices, placement.devices()
    numbers, batch_T = trace.batch_T.unique(return_inverse=True)
    home_T1 = (trace.sequence_T % num_devices).long()[:, None]
    loads_M, batch_loads_M = torch.zeros(2, num_layers, dtype=torch.float64)
    devices_M, nodes_M, rows_M, hops_M, pairs_M = torch.zeros(5, num_layers, dtype=torch.int64)
    before: list[Tensor] = []
    for layer in range(num_layers):
        counts = counts_on_devices(trace.experts_TMK[:, layer], devices_MER[layer], num_devices)
        loads_BD = torch.zeros(len(numbers), num_devices, dtype=torch.int64)
        for token_T, counts_TD in zip(torch.arange(num_tokens).split(_PART), counts):
            loads_BD.index_add_(0, batch_T[token_T], counts_TD.long())
            touched_TD = counts_TD > 0
            devices_M[layer] += touched_TD.sum()
            nodes_M[layer] += touched_TD.unflatten(1, (placement.cluster.num_nodes, -1)).any(dim=2).sum()
            rows_M[layer] += 2 * (touched_TD.sum() - touched_TD.gather(1, home_T1[token_T]).sum())
        for before_TD, counts_TD in zip(before, counts):
            hops_M[layer] += (before_TD * counts_TD).sum()
            pairs_M[layer] += (before_TD.sum(dim=1) * counts_TD.sum(dim=1)).sum()
        loads_M[layer] = imbalance(loads_BD.sum(dim=0))
        batch_loads_M[layer] = imbalance(loads_BD).nanmean()
        before = counts
    devices, nodes, rows = (sums_M.double() / num_tokens for sums_M in (devices_M, nodes_M, rows_M))
    return Measures(loads_M, batch_loads_M, devices, nodes, rows, (hops_M.double() / pairs_M)[1:])


def imbalance(loads_D: Tensor) -> Tensor:
    """Greatest over mean of the last dimension; nan where all are 0."""
    return loads_D.amax(dim=-1) / loads_D.double().mean(dim=-1)


def counts_on_devices(experts_TK: Tensor, devices_ER: Tensor, num_devices: int) -> list[Tensor]:
    """[T, D] int16, in parts of ``_PART`` tokens: a token's experts (negative: none) on each device.

    ``devices_ER``: of the experts' replicas, as ``Placement.devices`` returns them.
    """
    # Dropped ones, -1, get a last row, and so a last column, which is cut off.
    devices_ER = torch.cat([devices_ER, torch.full_like(devices_ER[:1], num_devices)])
    replicas_E = (devices_ER >= 0).sum(dim=1)
    replicas_E[-1] = 1
    parts = []
    for token_T in torch.arange(len(experts_TK)).split(_PART):
        part_TK = experts_TK[token_T].long()
        replica_TK = token_T[:, None] % replicas_E[part_TK] if devices_ER.shape[1] > 1 else 0
        devices_TK = devices_ER[part_TK, replica_TK]
        counts_TD = torch.zeros(len(part_TK), num_devices + 1, dtype=torch.int16)
        counts_TD.scatter_add_(1, devices_TK, torch.ones((), dtype=torch.int16).expand(devices_TK.shape))
        parts.append(counts_TD[:, :-1])
    return parts
