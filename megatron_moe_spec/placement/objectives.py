"""Placements fitted to a trace. Each layer gets replicas for the hottest experts, by EPLB's rule."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from megatron_moe_spec.placement.eplb import replicate
from megatron_moe_spec.placement.placement import Cluster, Placement
from megatron_moe_spec.traces.counts import coactivation, loads, recombined, shuffled, transitions
from megatron_moe_spec.traces.schema import Trace

_BINS = 64  # of time
_MARGIN = 1.1  # co-activation counts as such beyond this multiple of what loads explain
_SWEEPS = 20  # over the layers, at most
_SEARCHES = 50  # of devices for the slots of a layer


def place_by_load(trace: Trace, cluster: Cluster) -> Placement:
    """Balances the loads of devices at all times: the least sum of their squares over devices and bins of time.

    Experts that are hot at the same time come onto different devices; total loads do not tell them.
    """
    bin_T1 = (torch.arange(len(trace.experts_TMK)) * _BINS // len(trace.experts_TMK))[:, None]
    columns = cluster.num_experts + 1  # the last one of dropped tokens
    slots = []
    for experts_TK, logical_S, replicas_E in _layers(trace, cluster):
        places_TK = bin_T1 * columns + experts_TK.long() % columns
        loads_BE = torch.bincount(places_TK.flatten(), minlength=_BINS * columns).view(_BINS, columns)[:, :-1]
        loads_SB = (loads_BE.double() / replicas_E).T[logical_S].numpy()
        slots.append((logical_S, assign_pairs(loads_SB @ loads_SB.T, logical_S, cluster.num_devices)))
    return _placement(slots, trace, cluster)


def place_by_fanout(trace: Trace, cluster: Cluster) -> Placement:
    """Experts of the same tokens on the same device, by the modularity of the graph of co-activations.

    What the loads of two experts explain does not count, so hot experts are not drawn together. Devices of the same
    tokens come onto the same node.

    Raises:
        ValueError: tokens have one expert each.
    """
    if trace.experts_TMK.shape[2] == 1:
        raise ValueError("--objective fanout: tokens of this trace have one expert a layer; use --objective load")
    slots = []
    for experts_TK, logical_S, replicas_E in _layers(trace, cluster):
        counts_EE = coactivation(experts_TK, cluster.num_experts).double()
        excess_EE = (counts_EE - _MARGIN * pairs_by_chance(counts_EE)) / (replicas_E[:, None] * replicas_E)
        excess_SS = excess_EE[logical_S][:, logical_S].numpy()
        device_S = assign_pairs(-excess_SS, logical_S, cluster.num_devices)
        on_SD = np.eye(cluster.num_devices)[device_S]
        node_D = assign_pairs(-on_SD.T @ excess_SS @ on_SD, np.arange(cluster.num_devices), cluster.num_nodes)
        rank_D = node_D.argsort(kind="stable").argsort()  # devices of a node are neighbours
        slots.append((logical_S, rank_D[device_S]))
    return _placement(slots, trace, cluster)


def place_by_pathway(trace: Trace, cluster: Cluster) -> Placement:
    """Experts to which the same tokens go in consecutive layers on the same device; what loads explain does not count.

    Layer by layer, the assignment that is best given the layers beside it, until sweeps over the layers gain nothing.
    Experts of the first layer start together if their tokens go on to the same experts. Flows between replicas are
    taken as even.

    Raises:
        ValueError: the trace has one MoE layer.
    """
    num_layers = len(trace.layers)
    if num_layers == 1:
        raise ValueError("--objective pathway: this trace has one MoE layer; use --objective load")
    experts = trace.experts_TMK.unbind(dim=1)
    flows_EE = [_beyond_loads(transitions(*pair, cluster.num_experts)) for pair in zip(experts, experts[1:])]
    layers = [(logical_S, replicas_E.numpy()) for _, logical_S, replicas_E in _layers(trace, cluster)]
    logical_S, replicas_E = layers[0]
    per_replica_EE = flows_EE[0] / replicas_E[:, None]
    alike_SS = (per_replica_EE @ per_replica_EE.T)[logical_S][:, logical_S]
    slots = [(logical_S, assign_pairs(-alike_SS, logical_S, cluster.num_devices))]
    shares_ED = [_shares(*slots[0], replicas_E, cluster)]  # of an expert's tokens, on each device
    shares_ED += [np.zeros_like(shares_ED[0])] * (num_layers - 1)
    slots += [slots[0]] * (num_layers - 1)
    kept, best = 0.0, slots
    for sweep in range(_SWEEPS):
        for layer in range(sweep == 0, num_layers):
            replicas_E = layers[layer][1]
            gain_ED = np.zeros_like(shares_ED[0])
            if layer > 0:
                gain_ED += flows_EE[layer - 1].T @ shares_ED[layer - 1]
            if layer < num_layers - 1:
                gain_ED += flows_EE[layer] @ shares_ED[layer + 1]
            slots[layer] = assign(gain_ED / replicas_E[:, None], replicas_E)
            shares_ED[layer] = _shares(*slots[layer], replicas_E, cluster)
        stay = sum(float((a * (flow @ b)).sum()) for a, flow, b in zip(shares_ED, flows_EE, shares_ED[1:]))
        if stay <= kept:
            break
        kept, best = stay, list(slots)
    return _placement(best, trace, cluster)


def pairs_by_chance(counts_EE: Tensor) -> Tensor:
    """[E, E] float64: x_e x_f, whose sums over the others of each expert are those of the counts."""
    tiny = torch.finfo(counts_EE.dtype).tiny
    degree_E = counts_EE.sum(dim=1)
    x_E = degree_E / degree_E.sum().sqrt().clamp_min(tiny)
    for _ in range(200):
        x_E = (x_E * degree_E / (x_E.sum() - x_E).clamp_min(tiny)).sqrt()
    return x_E[:, None] * x_E


def assign_pairs(cost_SS: np.ndarray, logical_S: np.ndarray, num_devices: int) -> np.ndarray:
    """[S] devices: a small sum of costs over the pairs of slots that share a device.

    A local search by exact steps: one slot of each device at a time is taken out, and these are assigned anew at least
    cost, given where all others are. First they come in, as many as there are devices at a time, in the order given.
    ``cost_SS`` is symmetric; ``logical_S`` is the expert in each slot, replicas of an expert next to each other.
    """
    if num_devices == 1:
        return np.zeros(len(logical_S), dtype=np.int64)
    same_SS = logical_S[:, None] == logical_S
    cost_SS = np.where(same_SS, _prohibitive(cost_SS), cost_SS)
    on_SD = np.zeros((len(logical_S), num_devices))
    generator = np.random.default_rng(0)
    groups = np.arange(len(logical_S)).reshape(-1, num_devices)
    for _ in range(1 + _SEARCHES):
        for group in groups:
            on_SD[group] = 0
            rows, devices = linear_sum_assignment(cost_SS[group] @ on_SD)
            on_SD[group[rows], devices] = 1
        members = [generator.permutation(np.flatnonzero(column)) for column in on_SD.T]
        groups = np.stack(members, axis=1)
    return on_SD.argmax(axis=1)


def assign(gain_ED: np.ndarray, replicas_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Experts in slots, [S], and the slots' devices, [S]: the greatest sum of gains.

    Exact where no expert has a replica. Those that have come first, as many slots as there are devices at a time.
    """
    num_devices = gain_ED.shape[1]
    order_E = np.argsort(-replicas_E, kind="stable")
    logical_S = np.repeat(order_E, replicas_E[order_E])
    num_replicated = replicas_E[replicas_E > 1].sum()
    num_first = -(-num_replicated // num_devices) * num_devices
    gain_ED = gain_ED.copy()
    devices_S = np.empty(len(logical_S), dtype=np.int64)
    prohibitive = _prohibitive(gain_ED)
    for start in range(0, num_first, num_devices):
        group = np.arange(start, start + num_devices)
        rows, devices_S[group] = linear_sum_assignment(gain_ED[logical_S[group]], maximize=True)
        gain_ED[logical_S[group], devices_S[group]] -= prohibitive
    last_S = np.arange(num_first, len(logical_S))
    repeated = np.tile(gain_ED[logical_S[last_S]], len(last_S) // num_devices)
    devices_S[last_S] = linear_sum_assignment(repeated, maximize=True)[1] % num_devices
    return logical_S, devices_S


def _prohibitive(costs: np.ndarray) -> float:
    return 1 + 2 * np.abs(costs).sum()


def _beyond_loads(counts_EE: Tensor) -> np.ndarray:
    """[E, E] float64: the counts, less what their sums of rows and columns explain."""
    counts_EE = counts_EE.double()
    expected_EE = counts_EE.sum(dim=1, keepdim=True) * counts_EE.sum(dim=0) / counts_EE.sum().clamp_min(1)
    return (counts_EE - expected_EE).numpy()


def _layers(trace: Trace, cluster: Cluster) -> Iterator[tuple[Tensor, np.ndarray, Tensor]]:
    """Of each layer: tokens' experts, [T, K]; experts in slots, hottest slots first, [S]; experts' replicas, [E]."""
    loads_ME = loads(trace)
    logical_MS, replicas_ME = replicate(loads_ME, cluster.num_slots, most=cluster.num_devices)
    for layer, experts_TK in enumerate(trace.experts_TMK.unbind(dim=1)):
        logical_S = logical_MS[layer].sort().values
        heat_S = (loads_ME[layer] / replicas_ME[layer])[logical_S]
        yield experts_TK, logical_S[heat_S.sort(descending=True, stable=True).indices].numpy(), replicas_ME[layer]


def _shares(logical_S: np.ndarray, device_S: np.ndarray, replicas_E: np.ndarray, cluster: Cluster) -> np.ndarray:
    shares_ED = np.zeros((cluster.num_experts, cluster.num_devices))
    shares_ED[logical_S, device_S] = 1 / replicas_E[logical_S]
    return shares_ED


def _placement(slots: Sequence[tuple[np.ndarray, np.ndarray]], trace: Trace, cluster: Cluster) -> Placement:
    """Of each layer's experts in slots and their devices: in the order of devices, then of experts."""
    rows = [torch.from_numpy(logical_S[np.lexsort((logical_S, device_S))]) for logical_S, device_S in slots]
    return Placement(torch.stack(rows), trace.layers, cluster)


@dataclass(frozen=True)
class Objective:
    """What a placement can be fitted to."""

    place: Callable[[Trace, Cluster], Placement]
    control: Callable[[Trace], Trace]  # makes the trace of the same loads, without what the objective lives on
    without: str  # what the control does
    judged_by: str  # name of the measure
    most_tokens: int  # that it is fitted to, evenly spaced, so that large traces do not take minutes
    engines: str  # which of them gain


OBJECTIVES = {
    "load": Objective(
        place_by_load,
        shuffled,
        "tokens shuffled",
        "batch_load",
        2**16,
        "SGLang, vLLM and TensorRT-LLM gain with expert parallelism: in each layer, all ranks wait for the one that "
        "bears most. EPLB, which they run themselves, balances totals.",
    ),
    "fanout": Objective(
        place_by_fanout,
        recombined,
        "experts recombined",
        "devices",
        2**15,
        "SGLang, vLLM and TensorRT-LLM gain with expert parallelism where a token's row goes once to each device "
        "(DeepEP and the like): fewer rows travel. Mind the load: the device that bears most sets the time.",
    ),
    "pathway": Objective(
        place_by_pathway,
        shuffled,
        "tokens shuffled",
        "hops",
        2**15,
        "SGLang, vLLM and TensorRT-LLM gain nothing: they return the tokens of each layer to the rank that they came "
        "from. It serves engines that fetch experts from elsewhere (offloading, prefetching) and those that keep "
        "tokens where they are; for these, mind the load: the device that bears most sets the time.",
    ),
}
