"""Log names of this package's losses."""

from megatron_moe_spec.losses import LOSSES

LOSS_NAMES = tuple(loss.name for loss in LOSSES)
