"""Physical slots on devices, and the expert in each."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cluster:
    """The slots for experts that each MoE layer has: as many on every device, as many devices on every node.

    Raises:
        ValueError: the numbers do not divide; the message names the flags and values that would do.
    """

    num_experts: int
    num_devices: int
    num_nodes: int = 1
    num_redundant: int = 0

    def __post_init__(self) -> None:
        devices, redundant, slots = self.num_devices, self.num_redundant, self.num_slots
        most = self.num_experts * (devices - 1)
        if devices % self.num_nodes:
            others = _divisors_beside(self.num_nodes, devices)
            raise ValueError(f"--nodes {self.num_nodes} does not divide --devices {devices}: use --nodes {others}")
        if redundant > most:
            raise ValueError(f"--redundant {redundant}: use {most} at most, which is each expert on all devices")
        if slots % devices:
            below = redundant - slots % devices
            usable = " or ".join(f"--redundant {other}" for other in (below, below + devices) if 0 <= other <= most)
            raise ValueError(
                f"--devices {devices} does not divide the {slots} slots of {self.num_experts} experts and --redundant "
                f"{redundant}: use {usable}, or --devices {_divisors_beside(devices, slots)}"
            )

    @property
    def num_slots(self) -> int:
        return self.num_experts + self.num_redundant

    @property
    def slots_per_device(self) -> int:
        return self.num_slots // self.num_devices


@dataclass(frozen=True)
class Placement:
    """The expert in each slot of each MoE layer.

    Token t that chooses an expert of r replicas goes to replica t modulo r, in the order of slots.
    """

    logical_MS: Tensor  # int64, index of the expert in each slot; the slots of a device are neighbours
    layers: tuple[int, ...]  # indices of the MoE layers in the whole model, ascending
    cluster: Cluster

    def __post_init__(self) -> None:
        assert self.logical_MS.shape == (len(self.layers), self.cluster.num_slots)
        assert (self.replicas() > 0).all(), "each expert has a slot"

    def replicas(self) -> Tensor:
        """[M, E] int64: slots that each expert has."""
        counts_ME = torch.zeros(len(self.layers), self.cluster.num_experts, dtype=torch.int64)
        return counts_ME.scatter_add_(1, self.logical_MS, torch.ones_like(self.logical_MS))

    def devices(self) -> Tensor:
        """[M, E, R] int64: devices of each expert's replicas, in the order of slots; beyond the last one, -1."""
        counts_ME = self.replicas()
        experts_MS, slots_MS = self.logical_MS.sort(dim=1, stable=True)
        first_ME = counts_ME.cumsum(dim=1) - counts_ME
        replica_MS = torch.arange(experts_MS.shape[1]) - first_ME.gather(1, experts_MS)
        devices_MER = torch.full((*counts_ME.shape, int(counts_ME.max())), -1)
        layers_M1 = torch.arange(len(self.layers))[:, None]
        devices_MER[layers_M1, experts_MS, replica_MS] = slots_MS // self.cluster.slots_per_device
        return devices_MER


def contiguous(cluster: Cluster, layers: tuple[int, ...]) -> Placement:
    """Experts in ascending order, from expert 0 again for the redundant ones: what engines do untold."""
    logical_S = torch.arange(cluster.num_slots) % cluster.num_experts
    return Placement(logical_S.repeat(len(layers), 1), layers, cluster)


def random(cluster: Cluster, layers: tuple[int, ...], seed: int = 0) -> Placement:
    """The slots of ``contiguous`` in random order, another one in each layer."""
    generator = torch.Generator().manual_seed(seed)
    order_MS = torch.rand(len(layers), cluster.num_slots, generator=generator).argsort(dim=1)
    return Placement(order_MS % cluster.num_experts, layers, cluster)


def _divisors_beside(number: int, total: int) -> str:
    """The divisors of ``total`` next below and above ``number``."""
    divisors = [divisor for divisor in range(1, total + 1) if total % divisor == 0]
    below, above = [d for d in divisors if d < number], [d for d in divisors if d > number]
    return " or ".join(map(str, below[-1:] + above[:1]))
