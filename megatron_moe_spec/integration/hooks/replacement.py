"""Hooks and replaced methods of a module that its copies do not inherit.

A deep copy of a model (an average of its weights, a frozen reference) is a model without losses.
"""

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch.utils.hooks import RemovableHandle

from megatron_moe_spec.integration.hooks.modes import is_any_autocast_enabled, without_autocast


class Hook:
    """A forward hook, or pre-hook, that does nothing in a deep copy of its module."""

    def __init__(self, function: Callable):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return without_autocast(self._function, *args) if is_any_autocast_enabled() else self._function(*args)

    def __deepcopy__(self, memo: dict) -> Callable:
        return _no_hook


def _no_hook(*args: Any) -> None:
    pass


def keep_last(handle: RemovableHandle) -> None:
    """Has a hook run after all others of its module's: what these leave is what the module works with, or returns."""
    hooks = handle.hooks_dict_ref()
    if hooks is not None and handle.id in hooks and next(reversed(hooks)) != handle.id:
        hooks.move_to_end(handle.id)


class MethodReplacement:
    """Stands in for a method of one object, until ``restore``; a deep copy of the object has the method it had.

    Where the method is the class's, it is that which the class has when it is called: other packages replace methods
    of classes, as for routing replay, before or after.

    Args:
        function: called with the method that is replaced, and its arguments.
    """

    def __init__(self, owner: Any, name: str, function: Callable):
        self._owner, self._name, self._function = owner, name, function
        self._own = vars(owner).get(name)
        setattr(owner, name, self)

    @property
    def is_gone(self) -> bool:
        """Whether the object has another method now."""
        return vars(self._owner).get(self._name) is not self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self._method_of(self._owner), *args, **kwargs)

    def _method_of(self, owner: Any) -> Callable:
        return MethodType(getattr(type(owner), self._name), owner) if self._own is None else self._own

    def restore(self) -> None:
        """The object has its method again, or, where another package has replaced it since, calls it through here."""
        self._function = _call
        if self.is_gone:
            return
        if self._own is not None:
            setattr(self._owner, self._name, self._own)
        else:
            delattr(self._owner, self._name)

    def __deepcopy__(self, memo: dict) -> Callable:
        copied = memo.get(id(self._owner))
        if self._own is None and copied is not None:
            return self._method_of(copied)
        return copy.deepcopy(self._method_of(self._owner), memo)


def _call(original: Callable, *args: Any, **kwargs: Any) -> Any:
    return original(*args, **kwargs)
