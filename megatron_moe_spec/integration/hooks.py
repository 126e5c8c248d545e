"""Hooks and replaced methods of a module that its copies do not inherit.

A deep copy of a model (an average of its weights, a frozen reference) is a model without losses.
"""

import copy
from collections.abc import Callable
from types import MethodType

from torch import nn


class Hook:
    """A forward hook, or pre-hook, that does nothing in a deep copy of its module."""

    def __init__(self, function: Callable):
        self._function = function

    def __call__(self, *args):
        return self._function(*args)

    def __deepcopy__(self, memo):
        return _no_hook


def _no_hook(*args) -> None:
    pass


class MethodReplacement:
    """Stands in for a method of one module, until ``restore``; a deep copy of the module has the method it had.

    Args:
        function: called with the method that is replaced, and its arguments.
    """

    def __init__(self, module: nn.Module, name: str, function: Callable):
        self._module, self._name, self._function = module, name, function
        self._had_own = name in vars(module)
        self._original = getattr(module, name)
        setattr(module, name, self)

    def __call__(self, *args, **kwargs):
        return self._function(self._original, *args, **kwargs)

    def restore(self) -> None:
        """The module has its method again, or, where another package has replaced it since, calls it through here."""
        self._function = _call
        if vars(self._module).get(self._name) is not self:
            return
        if self._had_own:
            setattr(self._module, self._name, self._original)
        else:
            delattr(self._module, self._name)

    def __deepcopy__(self, memo):
        copied = memo.get(id(self._module))
        if copied is not None and getattr(self._original, "__self__", None) is self._module:
            return MethodType(self._original.__func__, copied)
        return copy.deepcopy(self._original, memo)


def _call(original: Callable, *args, **kwargs):
    return original(*args, **kwargs)
