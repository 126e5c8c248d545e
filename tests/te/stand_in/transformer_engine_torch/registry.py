"""The functions that the extension binds, and how often each was called."""

from collections import Counter
from functools import wraps

import torch

calls: Counter = Counter()
functions: dict = {}


def bound(function):
    """Makes it one of the extension's functions: they know no autograd."""

    @wraps(function)
    def counted(*args, **kwargs):
        calls[function.__name__] += 1
        with torch.no_grad():
            return function(*args, **kwargs)

    functions[function.__name__] = counted
    return counted


def missing(name: str):
    def function(*args, **kwargs):
        raise NotImplementedError(f"transformer_engine_torch.{name} has no stand-in on CPU")

    function.__name__ = name
    return function


def refuse(*reasons) -> None:
    """Raises for the first (condition, what is not stood for) that holds."""
    for condition, what in reasons:
        if condition:
            raise NotImplementedError(f"the stand-in of transformer_engine_torch has no {what}")
