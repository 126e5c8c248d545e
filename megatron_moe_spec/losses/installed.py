"""Losses of other installed packages, by the entry-point group ``megatron_moe_spec.losses``."""

from functools import lru_cache
from importlib.metadata import entry_points

from megatron_moe_spec.losses import LOSSES, Loss
from megatron_moe_spec.losses.base import THIRD_PARTY, options_of

GROUP = "megatron_moe_spec.losses"


@lru_cache
def installed_losses() -> tuple[type[Loss], ...]:
    """Their classes, derived from ``RowsLoss``, ``ScoresLoss`` or ``RouterWeightLoss``, by name of the entry point.

    Raises:
        ValueError: one cannot be imported, is no loss, or has a name or a flag that is taken; the message names it.
    """
    found: list[type[Loss]] = []
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        which = f"the loss {point.name} = {point.value} of an installed package (entry-point group {GROUP})"
        try:
            loss = point.load()
        except Exception as error:
            raise ValueError(f"{which} cannot be imported: {type(error).__name__}: {error}") from error
        _check(which, loss, [*LOSSES, *found])
        found.append(loss)
    return tuple(found)


def _check(which: str, loss: object, others: list[type[Loss]]) -> None:
    if not (isinstance(loss, type) and issubclass(loss, THIRD_PARTY)):
        raise ValueError(f"{which} is not derived from {', '.join(base.__name__ for base in THIRD_PARTY)}")
    if not any(one.name == "coeff" for one in options_of(loss)):
        raise ValueError(f"{which} has no flag: make its coeff by megatron_moe_spec.losses.option")
    if any(loss.name == other.name for other in others):
        raise ValueError(f"{which} has the name of another loss, {loss.name}")
    taken = {one.metadata["flag"] for other in others for one in options_of(other)}
    for one in options_of(loss):
        if one.metadata["flag"] in taken:
            raise ValueError(f"{which} has the flag of another loss, {one.metadata['flag']}")
