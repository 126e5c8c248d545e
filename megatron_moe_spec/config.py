"""Settings: one field per command-line flag. Standard library only."""

from dataclasses import dataclass, field, fields
from math import isfinite

LOSS_NAMES = ("specialization_loss", "coupling_loss", "orthogonality_loss", "score_variance_loss", "erc_loss")


def _setting(default, flag, help, choices=None):
    return field(default=default, metadata={"flag": flag, "help": help, "choices": choices})


@dataclass(frozen=True)
class SpecConfig:
    """Which auxiliary losses to add to a model, and how strongly.

    Every coefficient is 0 by default; with all of them 0 and no metrics, nothing is hooked.

    Raises:
        ValueError: a field is out of range; the message names the field and its flag.
    """

    specialization_loss_coeff: float = _setting(
        0.0,
        "--moe-specialization-loss-coeff",
        "Weight of the intra-layer specialization loss: the mean squared cosine similarity between the "
        "activations of the experts that process the same token, summed over MoE layers. Paper: 2e-3.",
    )
    specialization_token_stride: int = _setting(
        1,
        "--moe-specialization-token-stride",
        "Compute the specialization loss on every N-th token of each rank only, starting at another token each "
        "micro-batch and step. Unbiased; cuts its cost, and its traffic under expert parallelism, N-fold.",
    )
    coupling_loss_coeff: float = _setting(
        0.0,
        "--moe-coupling-loss-coeff",
        "Weight of the cross-layer coupling loss: one minus the joint routing probability of the top-k "
        "experts of adjacent MoE layers, summed over pairs of layers. Paper: 1e-3.",
    )
    coupling_type: str = _setting(
        "mass",
        "--moe-coupling-type",
        "mass: per token, the joint probability of the two layers' top-k sets. pathway: over the "
        "micro-batch, the probability of each expert's top-k successors.",
        choices=("mass", "pathway"),
    )
    coupling_across_stages: str = _setting(
        "exact",
        "--moe-coupling-across-stages",
        "Pairs of adjacent MoE layers in different pipeline stages. exact: their loss counts; what it needs travels "
        "with the hidden states and their gradient. drop: their loss is left out.",
        choices=("exact", "drop"),
    )
    orthogonality_loss_coeff: float = _setting(
        0.0,
        "--moe-orthogonality-loss-coeff",
        "Weight of the orthogonality loss (arXiv 2505.22323): the mean squared projection of the outputs of the "
        "experts that process the same token on each other, summed over MoE layers. Paper: 1e-4.",
    )
    score_variance_loss_coeff: float = _setting(
        0.0,
        "--moe-score-variance-loss-coeff",
        "Weight of the score variance loss (arXiv 2505.22323): minus the variance of the experts' scores over "
        "the tokens of a micro-batch, summed over MoE layers. Paper: 1e-3.",
    )
    erc_loss_coeff: float = _setting(
        0.0,
        "--moe-erc-loss-coeff",
        "Weight of the expert-router coupling loss, ERC (arXiv 2512.23447): by how much a router row, taken as a "
        "token, excites other experts more than its own, summed over MoE layers. Paper: 1.",
    )
    erc_alpha: float = _setting(
        1.0,
        "--moe-erc-alpha",
        "ERC: the share of a router row's norm in its own expert that its norm in another expert may reach.",
    )
    kernels: str = _setting(
        "auto",
        "--moe-spec-kernels",
        "Implementation of the losses: eager PyTorch (torch), Triton kernels (triton), or the fastest "
        "that can run (auto).",
        choices=("auto", "triton", "torch"),
    )
    metrics_interval: int = _setting(
        0,
        "--moe-spec-metrics-interval",
        "Every N iterations, measure expert overlap and routing in every MoE layer and write them to the "
        "logs and to moe_spec_metrics.jsonl. Works with all coefficients 0. 0: never.",
    )

    def __post_init__(self):
        for setting in fields(self):
            value = getattr(self, setting.name)
            name = f"{setting.name} ({setting.metadata['flag']})"
            choices = setting.metadata["choices"]
            if choices:
                if value not in choices:
                    raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
            elif isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{name} must be a number; got {value!r}")
            elif isinstance(setting.default, int) and not isinstance(value, int):
                raise ValueError(f"{name} must be a whole number; got {value!r}")
            elif not isfinite(value) or value < 0:
                raise ValueError(f"{name} must be finite and not negative; got {value!r}")
        if self.specialization_token_stride < 1:
            raise ValueError(
                "specialization_token_stride (--moe-specialization-token-stride) must be at least 1; got 0"
            )

    @property
    def enabled(self) -> bool:
        """Whether there is anything to hook."""
        return bool(self.trained_losses or self.metrics_interval)

    @property
    def wants_activations(self) -> bool:
        """Whether the experts' activations are read."""
        return self.specialization_loss_coeff > 0 or self.metrics_interval > 0

    @property
    def carries_messages(self) -> bool:
        """Whether routing travels between pipeline stages."""
        return self.coupling_loss_coeff > 0 and self.coupling_across_stages == "exact"

    @property
    def trained_losses(self) -> tuple[str, ...]:
        """Log names of the losses with a coefficient."""
        return tuple(
            name
            for name in LOSS_NAMES
            if getattr(self, f"{name}_coeff") > 0
        )
