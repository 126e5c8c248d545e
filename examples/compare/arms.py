"""The arms of the comparison: the losses that each adds to the load-balancing loss, and their coefficients."""

from dataclasses import dataclass

BASELINE = "baseline"
CONTROL = "control"


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: of its folders.
        title: in the report.
        coefficients: flag -> the coefficient that the loss's paper gives.
        scales: multiples of these that the sweep tries; empty where there is nothing to choose.
        options: further flags.
        parts: arms whose losses it joins, each at the scale chosen for it.
    """

    name: str
    title: str
    coefficients: tuple = ()
    scales: tuple = ()
    options: tuple = ()
    parts: tuple = ()


# The papers' coefficients are meant for billions of tokens; a run of a few million may need larger ones to show any
# effect. ERC's is not small in its paper.
ARMS = (
    Arm(BASELINE, "load balancing alone"),
    # What two runs differ by when nothing but rounding does.
    Arm(CONTROL, "+ specialization without weight (control)", (("--moe-specialization-loss-coeff", 1e-6),)),
    Arm("z-loss", "+ router z-loss", (("--moe-z-loss-coeff", 1e-3),), (1, 10)),
    Arm("specialization", "+ specialization", (("--moe-specialization-loss-coeff", 2e-3),), (1, 10, 100)),
    Arm("coupling-mass", "+ coupling (mass)", (("--moe-coupling-loss-coeff", 1e-3),), (1, 10, 100)),
    Arm(
        "coupling-pathway",
        "+ coupling (pathway)",
        (("--moe-coupling-loss-coeff", 1e-3),),
        (1, 10, 100),
        ("--moe-coupling-type=pathway",),
    ),
    Arm("both", "+ specialization and coupling (mass)", parts=("specialization", "coupling-mass")),
    Arm(
        "orthogonality-variance",
        "+ orthogonality and score variance",
        (("--moe-orthogonality-loss-coeff", 1e-4), ("--moe-score-variance-loss-coeff", 1e-3)),
        (1, 10, 100),
    ),
    Arm("erc", "+ expert-router coupling (ERC)", (("--moe-erc-loss-coeff", 1.0),), (0.1, 1)),
)
BY_NAME = {arm.name: arm for arm in ARMS}


def selected(names) -> list:
    """The arms of these names and the baseline, in the order of ``ARMS``."""
    return [arm for arm in ARMS if arm.name == BASELINE or arm.name in names]


def coefficients(arm: Arm, scales: dict) -> dict:
    """Flag -> coefficient of an arm, given the scale of each arm by name; 1 where none is given."""
    found = {flag: value * scales.get(arm.name, 1) for flag, value in arm.coefficients}
    for part in arm.parts:
        found.update(coefficients(BY_NAME[part], scales))
    return found


def flags(arm: Arm, scales: dict) -> list:
    """The command-line flags of an arm."""
    losses = [f"{flag}={value:g}" for flag, value in coefficients(arm, scales).items()]
    return [*losses, *arm.options]
