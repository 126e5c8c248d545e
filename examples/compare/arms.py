"""The arms of the experiments: what each adds to the load-balancing loss."""

from dataclasses import dataclass
from typing import Optional

BASELINE = "baseline"
CONTROL = "control"

SPECIALIZATION = "--moe-specialization-loss-coeff"
COUPLING = "--moe-coupling-loss-coeff"
PATHWAY = "--moe-coupling-type=pathway"

# Name -> title, flag -> the coefficient that the loss's paper gives, further flags.
LOSSES = {
    "specialization": ("specialization", {SPECIALIZATION: 2e-3}, ()),
    "mass": ("coupling (mass)", {COUPLING: 1e-3}, ()),
    "pathway": ("coupling (pathway)", {COUPLING: 1e-3}, (PATHWAY,)),
    "both": ("specialization and coupling (mass)", {SPECIALIZATION: 2e-3, COUPLING: 1e-3}, ()),
    "z-loss": ("router z-loss", {"--moe-z-loss-coeff": 1e-3}, ()),
    "orthogonality-variance": (
        "orthogonality and score variance",
        {"--moe-orthogonality-loss-coeff": 1e-4, "--moe-score-variance-loss-coeff": 1e-3},
        (),
    ),
    "erc": ("expert-router coupling (ERC)", {"--moe-erc-loss-coeff": 1.0}, ()),
    "router-orthogonality": ("router orthogonality", {"--moe-router-orthogonality-loss-coeff": 1e-2}, ()),
}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: of its folders and in tables of results.
        title: what it adds, for readers.
        flags: of the command line.
        start: arm of the same seed whose weights it starts from; None: from new ones.
    """

    name: str
    title: str
    flags: tuple = ()
    start: Optional[str] = None


baseline = Arm(BASELINE, "load balancing alone")
# What two runs differ by when nothing but rounding does.
control = Arm(CONTROL, "specialization with a weight of 1e-7 (control)", (f"{SPECIALIZATION}=1e-07",))


def arm(loss: str, scale: int) -> Arm:
    """A loss at a multiple of its paper's coefficients."""
    title, coefficients, options = LOSSES[loss]
    return Arm(f"{loss}-{scale}x", f"{title}, {scale} x", (*weights(coefficients, scale), *options))


def summed(scale: int, top_k: int) -> Arm:
    """Both losses, where the paper's coefficient is of a sum over the k (k - 1) ordered pairs of a token's experts."""
    _, coefficients, _ = LOSSES["both"]
    coefficients = coefficients | {SPECIALIZATION: coefficients[SPECIALIZATION] * top_k * (top_k - 1)}
    title = f"specialization, summed over pairs, and coupling (mass), {scale} x"
    return Arm(f"both-summed-{scale}x", title, weights(coefficients, scale))


def weights(coefficients: dict, scale: int) -> tuple:
    """Flags of multiples of coefficients."""
    return tuple(f"{flag}={scale * value:g}" for flag, value in coefficients.items())
