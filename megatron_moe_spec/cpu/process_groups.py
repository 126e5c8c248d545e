"""Process groups on gloo where a script asks for NCCL, which needs GPUs."""

import functools
import inspect
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

_warned = False


def replace() -> None:
    """Makes ``init_process_group`` and ``new_group`` of ``torch.distributed`` use gloo for NCCL."""
    for name in ("init_process_group", "new_group"):
        function = _on_gloo(getattr(distributed_c10d, name))
        for module in (dist, distributed_c10d):
            setattr(module, name, function)


def _on_gloo(function: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def on_gloo(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        backend = str(call.arguments.get("backend")).lower()
        if "nccl" in backend:
            _warn(backend)
            call.arguments["backend"] = "gloo"
            # They are NCCL's.
            call.arguments.pop("pg_options", None)
            call.arguments.pop("device_id", None)
        return function(*call.args, **call.kwargs)

    return on_gloo


def _warn(backend: str) -> None:
    global _warned
    if not _warned and os.environ.get("RANK", "0") == "0":
        warnings.warn(f"on CPU, process groups use gloo where the script asks for {backend}", stacklevel=3)
    _warned = True
