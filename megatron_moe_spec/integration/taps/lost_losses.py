"""Warnings of layers that train without their losses, or with losses that cannot serve them; each once."""

import warnings
from collections.abc import Sequence

from megatron_moe_spec.config import SpecConfig
from megatron_moe_spec.integration.taps.layer import LayerTaps


class LostLosses:
    """Compares what the taps of a model record in a step, see ``StepLosses``, with what they are there to record."""

    def __init__(self, config: SpecConfig, taps: Sequence[LayerTaps]):
        self._trained, self._taps = set(config.trained_losses), taps
        self._expected: set[tuple[str, int]] = set().union(*(one.records() for one in taps))
        self._warned: set = set()

    def names(self, recorded: set[tuple[str, int]]) -> set[str]:
        """Losses that no layer of this rank has recorded."""
        return {name for name, _ in self._expected} - {name for name, _ in recorded}

    def warn(self, recorded: set[tuple[str, int]]) -> None:
        """Says once of each layer and loss that it was to be computed in this step, and was not."""
        expected = {(name, layer) for name, layer in self._expected if name in self._trained}
        missing = expected - recorded
        missed = {taps.name: taps.missed for taps in self._taps if taps.missed}
        found = missing | missed.keys()
        if not found - self._warned:
            return
        self._warned |= found
        names = ", ".join(sorted({name for name, _ in missing}))
        if expected and missing == expected:
            text = (
                f"a training step ended without {names}: no forward of the attached model ran its MoE layers in "
                "training mode and with gradients, and had a backward pass. Nothing is logged for such steps."
            )
        elif missed:
            text = (
                f"in a training step, MoE layers had no losses, nor had the pairs that they belong to: "
                f"{with_reasons(missed)}. What is logged is of the others."
            )
        else:
            of = ", ".join(sorted({taps.name for taps in self._taps if missing & taps.records()}))
            text = (
                f"a training step ended without {names} of MoE layers that ran: {of}. What is logged is of the others."
            )
        warnings.warn(text, stacklevel=4)


def warn_of_decisions(model_taps: Sequence[LayerTaps]) -> None:
    """Says once that something else than a router's scores decides, of which losses of decisions know nothing."""
    shares = {taps.name: taps.follows_scores for taps in model_taps if taps.follows_scores is not None}
    for taps in model_taps:
        taps.follows_scores = None
    if names := [name for name, share in shares.items() if share < 0.5]:
        warnings.warn(
            f"in MoE layers {', '.join(names)}, most tokens go to other experts than their router scores highest, "
            "as with routing by a table, or replayed. Coupling, score variance and ERC train such a router towards "
            "decisions that it does not make (set their coefficients to 0, unless it is to learn them).",
            stacklevel=4,
        )


def with_reasons(layers: dict[str, str]) -> str:
    """Names of layers, each with its reason."""
    return ", ".join(f"{name} ({reason})" for name, reason in layers.items())
