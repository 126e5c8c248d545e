"""The places in Megatron that losses read, one file each. A tap serves every loss that reads what it has."""

from collections.abc import Iterator, Sequence

from megatron_moe_spec.integration.taps.activations import ActivationsTap
from megatron_moe_spec.integration.taps.base import Tap
from megatron_moe_spec.integration.taps.expert_weights import ExpertWeightsTap
from megatron_moe_spec.integration.taps.outputs import OutputsTap
from megatron_moe_spec.integration.taps.pairs import PairsTap
from megatron_moe_spec.integration.taps.router_weight import RouterWeightTap
from megatron_moe_spec.integration.taps.scores import ScoresTap
from megatron_moe_spec.losses import Loss
from megatron_moe_spec.losses.base import ACTIVATIONS, EXPERT_WEIGHTS, OUTPUTS, PAIRS, ROUTER_WEIGHT, SCORES

TAPS: dict[str, type[Tap]] = {
    PAIRS: PairsTap,
    SCORES: ScoresTap,
    ACTIVATIONS: ActivationsTap,
    OUTPUTS: OutputsTap,
    ROUTER_WEIGHT: RouterWeightTap,
    EXPERT_WEIGHTS: ExpertWeightsTap,
}


def by_tap(losses: Sequence[Loss]) -> Iterator[tuple[type[Tap], list[Loss]]]:
    """The taps that losses need, each with those it serves together: of rows, those that move the same ones alike."""
    for reads, tap in TAPS.items():
        alike: dict[tuple, list[Loss]] = {}
        for loss in losses:
            if loss.reads == reads:
                moved = getattr(loss, "token_stride", 1), getattr(loss, "a2a_dtype", "same")
                alike.setdefault(moved, []).append(loss)
        for together in alike.values():
            yield tap, together
