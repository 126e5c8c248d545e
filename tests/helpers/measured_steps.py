"""The ranks of a job: what the end of a measured step waits for.

measured_steps.py OUTPUT SETTINGS.json
"""

import json
import sys
from collections import Counter
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_moe_spec.cpu import enable

enable()  # before Megatron is imported


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def cost(num_layers: int, micro_batches: int = 2, **settings) -> dict:
    """All-reduces by operation and group, what would wait for a GPU by name, reads of a number, calls of eigvalsh."""
    import megatron_models as mm
    from loss_names import LOSS_NAMES, coefficients
    from synchronisations import Synchronisations

    from megatron_moe_spec import SpecConfig, attach

    model = mm.build_model(num_layers=num_layers, **settings)
    handle = attach(model, SpecConfig(metrics_interval=1, **coefficients(LOSS_NAMES)))
    for batch in mm.micro_batches(micro_batches):
        mm.run_model(model, batch).mean().backward()
    collectives, all_reduce = Counter(), dist.all_reduce

    def counted(tensor, op, group):
        collectives[op.name if hasattr(op, "name") else str(op), group.group_name] += 1
        return all_reduce(tensor, op=op, group=group)

    with mock.patch.object(dist, "all_reduce", counted), Synchronisations() as waits, _Operations() as operations:
        values = handle.end_step()
    handle.detach()
    layers = values["diagnostics"]["layers"]
    assert len(layers) == num_layers and all(layer["router_singular_values"] for layer in layers)
    assert all(layer["max_violation_micro_batch"] is not None for layer in layers)
    names = operations.names
    return {
        "all-reduces": collectives,
        "waits": Counter(waits.names),
        "reads": names["_local_scalar_dense"],
        "eigvalsh": names["_linalg_eigh"],
    }


def main(output: str, job: str) -> None:
    import megatron_models

    sizes, layers = json.loads(job)
    megatron_models.initialize_ranks(sizes)
    torch.save([cost(num_layers, **sizes) for num_layers in layers], f"{output}.{dist.get_rank()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
