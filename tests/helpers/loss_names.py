"""Log names of this package's losses, by what the tests do with them."""

from megatron_moe_spec.losses import LOSSES
from megatron_moe_spec.losses.base import OUTPUTS

LOSS_NAMES = tuple(loss.name for loss in LOSSES)
# Those of the package's own paper, which are measured beside whatever is trained on; and their peers.
BOTH = tuple(loss.name for loss in LOSSES if loss.measured)
PEERS = tuple(loss.name for loss in LOSSES if not loss.measured)
# What expert tensor parallelism leaves of them.
PEERS_WITHOUT_OUTPUTS = tuple(loss.name for loss in LOSSES if not loss.measured and loss.reads != OUTPUTS)


def coefficients(names, value: float = 1.0) -> dict[str, float]:
    """Fields of SpecConfig."""
    return {f"{name}_coeff": value for name in names}
