"""Process groups for many tests in one process: gloo's, and reused."""

import datetime

import torch.distributed as dist
from torch.distributed import distributed_c10d

# After this time a collective whose other ranks have failed raises.
TIMEOUT = datetime.timedelta(seconds=60)

_init_process_group, _new_group = dist.init_process_group, dist.new_group
_destroy_process_group, _barrier = dist.destroy_process_group, dist.barrier
_groups, _numbers = {}, {}


def replace() -> None:
    """Puts the functions below in the place of the CPU back end's. Call it before Megatron is imported."""
    for module in (dist, distributed_c10d):
        module.init_process_group = init_process_group
        module.new_group = new_group
        module.destroy_process_group = destroy_process_group
        module.barrier = barrier


def forget_with_model_parallelism(parallel_state) -> None:
    """Reuses groups from the first on after each ``destroy_model_parallel``, which forgets them without ending them.

    Each group of gloo holds threads: thousands would pile up.
    """
    destroy = parallel_state.destroy_model_parallel

    def destroy_model_parallel(*args, **kwargs):
        _numbers.clear()
        return destroy(*args, **kwargs)

    parallel_state.destroy_model_parallel = destroy_model_parallel


def init_process_group(backend=None, *args, **kwargs):
    return _init_process_group(backend, *args, **{**kwargs, "timeout": TIMEOUT})


def new_group(ranks=None, timeout=None, backend=None, pg_options=None, **kwargs):
    """The n-th group of these ranks since the last ``destroy_model_parallel``: made once."""
    members = tuple(range(dist.get_world_size()) if ranks is None else ranks)
    number = _numbers[members] = _numbers.get(members, 0) + 1
    if (members, number) not in _groups:
        _groups[members, number] = _new_group(ranks, TIMEOUT, backend, **kwargs)
    return _groups[members, number]


def destroy_process_group(group=None):
    # A single group stays, to be reused.
    if group is None or group is dist.group.WORLD:
        _groups.clear()
        _numbers.clear()
        _destroy_process_group(group)


def barrier(group=None, async_op=False, device_ids=None):
    """Gloo's takes no devices."""
    return _barrier(group, async_op)
