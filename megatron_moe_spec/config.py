"""Settings: one field per command-line flag, made from the options of the losses."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from megatron_moe_spec.losses import LOSSES, Loss, option
from megatron_moe_spec.losses.base import THIRD_PARTY, check_options, config_field, options_of

if TYPE_CHECKING:
    _LossOptions: Any = object
else:
    _LossOptions = dataclasses.make_dataclass(
        "_LossOptions",
        [
            (config_field(one), one.type, dataclasses.field(default=one.default, metadata=one.metadata))
            for loss in LOSSES
            for one in options_of(loss)
        ],
        frozen=True,
    )


@dataclass(frozen=True)
class SpecConfig(_LossOptions):
    """The auxiliary losses to add to a model, and their weights.

    Its first fields are the options of the losses in ``megatron_moe_spec.losses.LOSSES``: a coefficient for each, and
    what else it may be told. Every coefficient is 0 by default; with all of them 0 and no metrics, nothing is hooked.

    Attributes:
        extra_losses: losses of one's own, instances of classes derived from ``RowsLoss``, ``ScoresLoss`` or
            ``RouterWeightLoss``.

    Raises:
        ValueError: a field is out of range; the message names the field and its flag.
    """

    kernels: str = option(
        "auto",
        "--moe-spec-kernels",
        "Implementation of the losses: eager PyTorch (torch), Triton kernels (triton), or the fastest "
        "that can run (auto).",
        choices=("auto", "triton", "torch"),
    )
    metrics_interval: int = option(
        0,
        "--moe-spec-metrics-interval",
        "Every N iterations, measure expert overlap and routing in every MoE layer and write them to the "
        "logs and to moe_spec_metrics.jsonl. Works with all coefficients 0. 0: never.",
    )
    wandb_metrics: str = option(
        "brief",
        "--moe-spec-wandb-metrics",
        "What of the metrics goes to W&B: means over the layers (brief), or every layer (full).",
        choices=("brief", "full"),
        hidden_by_default=True,
    )
    trace_path: str = option(
        "",
        "--moe-spec-trace-path",
        "Folder for routing traces: which experts each token goes to, in every MoE layer, in the schema of Megatron's "
        "--moe-routing-trace-path. Works with all coefficients 0. Empty: none.",
    )
    trace_interval: int = option(
        100, "--moe-spec-trace-interval", "Trace every N-th iteration, if there is a path.", minimum=1
    )
    extra_losses: tuple[Loss, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "extra_losses", tuple(self.extra_losses))
        check_options(self)
        names_in_use = {loss.name for loss in LOSSES}
        for loss in self.extra_losses:
            if not isinstance(loss, THIRD_PARTY):
                names = ", ".join(base.__name__ for base in THIRD_PARTY)
                raise ValueError(f"extra_losses must be instances of classes derived from {names}; got {loss!r}")
            if loss.name in names_in_use:
                raise ValueError(f"extra_losses has another loss of the name {loss.name}: give {loss!r} another one")
            names_in_use.add(loss.name)

    @cached_property
    def losses(self) -> tuple[Loss, ...]:
        """All losses with their options, those without a coefficient too."""
        own = [
            loss(**{one.name: getattr(self, config_field(one)) for one in options_of(loss)})  # type: ignore[call-arg]
            for loss in LOSSES
        ]
        return (*own, *self.extra_losses)

    @property
    def computed_losses(self) -> tuple[Loss, ...]:
        """Those that are trained on, and those that are measured."""
        return tuple(loss for loss in self.losses if loss.coeff > 0 or (loss.measured and self.metrics_interval))

    @property
    def trained_losses(self) -> tuple[str, ...]:
        """Log names of the losses with a coefficient."""
        return tuple(loss.name for loss in self.losses if loss.coeff > 0)

    @property
    def enabled(self) -> bool:
        """Whether there is anything to hook."""
        return bool(self.trained_losses or self.metrics_interval or self.trace_path)

    @property
    def carries_messages(self) -> bool:
        """Whether routing travels between pipeline stages."""
        return any(loss.carries_messages for loss in self.losses)
