"""Slots on devices at least cost, as many on each, by scipy's linear assignment. No device gets an expert twice."""

import numpy as np
from scipy.optimize import linear_sum_assignment

_SWEEPS = 50


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
    for _ in range(1 + _SWEEPS):
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
