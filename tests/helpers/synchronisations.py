"""Counting where the host would wait for a GPU, on CPU."""

import torch
from torch.overrides import TorchFunctionMode

WAIT = {
    "tolist", "item", "numpy", "cpu", "nonzero", "argwhere", "masked_select", "unique", "equal", "allclose",
    "__bool__", "__int__", "__float__", "__index__", "__iter__", "__contains__",
}  # fmt: skip


class Synchronisations(TorchFunctionMode):
    """What waits, were all tensors on a GPU, among the calls made inside; ``names`` has one entry for each.

    Copies count unless they say ``non_blocking``: what comes to the host so is waited for by ``tolist``.
    """

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", str(function))
        if name in WAIT or self._waits(name, args, kwargs):
            self.names.append(name)
        return function(*args, **kwargs)

    @staticmethod
    def _waits(name: str, args, kwargs) -> bool:
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            return any(isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in index)
        if name == "repeat_interleave":
            return "output_size" not in kwargs
        if name == "to":
            devices = [x for x in (*args[1:], kwargs.get("device")) if isinstance(x, (str, torch.device))]
            return bool(devices) and "non_blocking" not in kwargs
        return name == "tensor" and kwargs.get("device") not in (None, "cpu")
