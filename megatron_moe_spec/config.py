"""Settings: one field per command-line flag."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_moe_spec.losses import LOSSES, Loss, option
from megatron_moe_spec.losses.base import THIRD_PARTY, check_options, config_field, options_of

_OPTIONS = {config_field(one): one for loss in LOSSES for one in options_of(loss)}


def _of_a_loss(field: str) -> Any:
    """The option that a loss declares for a field: its default, its flag, its help."""
    one = _OPTIONS[field]
    return dataclasses.field(default=one.default, metadata=one.metadata)


@dataclass(frozen=True)
class SpecConfig:
    """The auxiliary losses to add to a model, and their weights.

    Every coefficient is 0 by default; with all of them 0 and neither metrics nor traces, nothing is hooked. The flags'
    help has more on each field.

    Attributes:
        specialization_loss_coeff: weight of the squared cosines between the activations of a token's experts.
        specialization_token_stride: that loss uses every N-th token only.
        specialization_a2a_dtype: how its rows travel between expert-parallel ranks: "same", in their dtype, or "fp8".
        coupling_loss_coeff: weight of one minus the joint probability of a token's experts in adjacent MoE layers.
        coupling_type: that probability per token, "mass", or of the pathways in a micro-batch, "pathway".
        coupling_across_stages: pairs of layers in different pipeline stages: "exact", "drop", or "auto".
        orthogonality_loss_coeff: weight of the squared projections of the outputs of a token's experts on each other.
        score_variance_loss_coeff: weight of minus the variance of the experts' scores over tokens.
        erc_loss_coeff: weight of how much more a router row, as a token, excites other experts than its own.
        erc_alpha: the share of its norm in its own expert that its norm in another expert may reach.
        router_orthogonality_loss_coeff: weight of how far the rows of a router's weight are from orthogonal.
        router_orthogonality_type: measured by the "squared" cosines of rows, or the "absolute" entries of W W^T - I.
        kernels: implementation of the losses: "torch", "triton", or "auto", the fastest that can run.
        metrics_interval: measure every MoE layer in every N-th step; 0: never.
        wandb_metrics: what of the metrics goes to W&B: "brief", means over layers, or "full".
        trace_path: folder for routing traces; empty: none.
        trace_interval: trace every N-th step, if there is a path.
        extra_losses: custom losses, instances of classes derived from ``RowsLoss``, ``ScoresLoss`` or
            ``RouterWeightLoss``.

    Raises:
        ValueError: a field is out of range; the message names the field and its flag.
    """

    specialization_loss_coeff: float = _of_a_loss("specialization_loss_coeff")
    specialization_token_stride: int = _of_a_loss("specialization_token_stride")
    specialization_a2a_dtype: str = _of_a_loss("specialization_a2a_dtype")
    coupling_loss_coeff: float = _of_a_loss("coupling_loss_coeff")
    coupling_type: str = _of_a_loss("coupling_type")
    coupling_across_stages: str = _of_a_loss("coupling_across_stages")
    orthogonality_loss_coeff: float = _of_a_loss("orthogonality_loss_coeff")
    score_variance_loss_coeff: float = _of_a_loss("score_variance_loss_coeff")
    erc_loss_coeff: float = _of_a_loss("erc_loss_coeff")
    erc_alpha: float = _of_a_loss("erc_alpha")
    router_orthogonality_loss_coeff: float = _of_a_loss("router_orthogonality_loss_coeff")
    router_orthogonality_type: str = _of_a_loss("router_orthogonality_type")
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

    def __post_init__(self) -> None:
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
        own = [loss(**{one.name: getattr(self, config_field(one)) for one in options_of(loss)}) for loss in LOSSES]
        return (*own, *self.extra_losses)

    @property
    def computed_losses(self) -> tuple[Loss, ...]:
        """Those that are trained on, and those that are measured."""
        return tuple(loss for loss in self.losses if loss.is_trained or (loss.measured and self.metrics_interval))

    @property
    def trained_losses(self) -> tuple[str, ...]:
        """Log names of the losses with a coefficient."""
        return tuple(loss.name for loss in self.losses if loss.is_trained)

    @property
    def enabled(self) -> bool:
        """Whether there is anything to hook."""
        return bool(self.trained_losses or self.metrics_interval or self.trace_path)

    @property
    def carries_messages(self) -> bool:
        """Whether routing travels between pipeline stages."""
        return any(loss.carries_messages for loss in self.losses)
