"""Cross-layer coupling loss (arXiv 2602.14159, Eq. 7): routing of adjacent MoE layers, jointly confident."""

from dataclasses import dataclass
from typing import ClassVar, Optional, Union

import torch
from torch import Tensor

from megatron_moe_spec.losses.base import PAIRS, Loss, option
from megatron_moe_spec.losses.scores import accumulation_dtype, check_floating, normalized_scores_gradient

COUPLING_TYPES = ("mass", "pathway")


@dataclass(frozen=True)
class Coupling(Loss):
    """See ``coupling_loss``. Its arithmetic across layers and ranks is that of its tap."""

    name: ClassVar[str] = "coupling_loss"
    reads: ClassVar[str] = PAIRS
    measured: ClassVar[bool] = True

    coeff: float = option(
        0.0,
        "--moe-coupling-loss-coeff",
        "Weight of the cross-layer coupling loss: one minus the joint routing probability of the top-k "
        "experts of adjacent MoE layers, summed over pairs of layers.",
        paper="1e-3, Eq. 7",
    )
    kind: str = option(
        "mass",
        "--moe-coupling-type",
        "mass, the paper's: per token, the joint probability of the two layers' top-k sets. pathway, not the paper's "
        "but this package's own: over the micro-batch, the probability of each expert's top-k successors.",
        choices=COUPLING_TYPES,
    )
    across_stages: str = option(
        "auto",
        "--moe-coupling-across-stages",
        "Pairs of adjacent MoE layers in different pipeline stages. exact: their loss counts; what it needs travels "
        "with the hidden states and their gradient. drop: their loss is left out. auto: exact where the pipeline "
        "schedule can carry it, else drop.",
        choices=("auto", "exact", "drop"),
    )

    @property
    def carries_messages(self) -> bool:
        """Whether routing travels between pipeline stages; ``attach`` resolves auto before it asks."""
        return self.is_trained and self.across_stages == "exact"


def coupling_loss(
    scores: Tensor,
    scores_next: Tensor,
    routing_map: Optional[Tensor] = None,
    routing_map_next: Optional[Tensor] = None,
    kind: str = "mass",
    top_k: Optional[int] = None,
) -> Tensor:
    """One minus the joint routing probability of two consecutive MoE layers, in [0, 1].

    mass:     L = 1 - (1/T) sum_t m(t) m_next(t),  m(t) = sum of the token's scores over its dispatched experts.
    pathway:  L = 1 - sum_e sum_{v in top-k of row P[e, :]} P[e, v],  P = (1/T) sum_t scores(t, e) scores_next(t, v).

    Args:
        scores: [T, E] the layer's router scores, normalised over all experts (see ``normalized_scores``).
        scores_next: [T, E'] those of the next MoE layer, for the same tokens.
        routing_map: [T, E] bool, the experts each token was dispatched to (mass). Default: its ``top_k`` highest.
        routing_map_next: [T, E'] bool, likewise.
        kind: mass, the paper's, or pathway, this package's own.
        top_k: experts per token; needed by pathway, and by mass where a routing map is missing.

    Returns:
        Scalar in fp32 (fp64 for fp64 input).

    Raises:
        ValueError: a shape, dtype or option does not fit; the message names the argument.
    """
    check_floating("scores", scores, "[T, E]")
    check_floating("scores_next", scores_next, "[T, E]")
    if scores.shape[0] != scores_next.shape[0]:
        raise ValueError(
            f"scores_next must hold the same tokens as scores: {scores.shape[0]} tokens; got {scores_next.shape[0]}"
        )
    scores, scores_next = scores.to(accumulation_dtype(scores)), scores_next.to(accumulation_dtype(scores_next))
    num_tokens = max(scores.shape[0], 1)
    if kind == "mass":
        mass = routed_mass(scores, _dispatched("routing_map", routing_map, scores, top_k))
        mass_next = routed_mass(scores_next, _dispatched("routing_map_next", routing_map_next, scores_next, top_k))
        return 1.0 - (mass * mass_next).sum() / num_tokens
    if kind == "pathway":
        if routing_map is not None or routing_map_next is not None:
            raise ValueError("routing_map and routing_map_next are for kind='mass'; kind='pathway' takes top_k alone")
        joint = joint_scores(scores, scores_next, num_tokens)
        return 1.0 - (joint * strongest_successors(joint, _checked(top_k, joint))).sum()
    raise ValueError(f"kind must be one of {', '.join(COUPLING_TYPES)}; got {kind!r}")


def routed_mass(scores: Tensor, routing_map: Tensor) -> Tensor:
    """[T] m(t) = sum over the dispatched experts, bool [T, E], of the scores [T, E]."""
    return (scores * routing_map).sum(dim=-1)


def joint_scores(scores: Tensor, scores_next: Tensor, num_tokens: Union[Tensor, int]) -> Tensor:
    """[E, E'] mean over tokens of the outer product of the two layers' scores; sums to 1."""
    return scores.T @ scores_next / num_tokens


def strongest_successors(joint: Tensor, top_k: int) -> Tensor:
    """[E, E'] bool: the top-k entries of each row of the joint matrix. Carries no gradient."""
    chosen = joint.detach().topk(top_k, dim=-1).indices
    return torch.zeros_like(joint, dtype=torch.bool).scatter_(1, chosen, True)


def neighbor_grad_of_previous(kind: str, message: Tensor, successors_EE: Optional[Tensor]) -> Tensor:
    """-T times the gradient of the loss of a pair with respect to the scores of its second layer.

    Args:
        message: of the first layer: m [T] (mass), or scores [T, E] (pathway).
        successors_EE: the strongest successors of its experts (pathway).

    Returns:
        [T], the same for every dispatched expert (mass), or [T, E] (pathway).
    """
    if kind == "mass":
        return message
    assert successors_EE is not None
    return message @ successors_EE.to(message.dtype)


def neighbor_grad_of_following(kind: str, message: Tensor, successors_EE: Optional[Tensor]) -> Tensor:
    """The same with respect to the first layer's scores, from the ``message`` of the second."""
    if kind == "mass":
        return message
    assert successors_EE is not None
    return message @ successors_EE.T.to(message.dtype)


def logits_grad(
    kind: str,
    logits_TE: Tensor,
    active_TE: Tensor,
    score_function: str,
    neighbor_grads: list[Tensor],
    weight: Union[Tensor, float],
) -> Tensor:
    """[T, E] weight * gradient of -T times the (at most two) pair losses of a layer with respect to its logits."""
    neighbor_grad = sum(neighbor_grads)
    grad_scores_TE = active_TE * neighbor_grad.unsqueeze(-1) if kind == "mass" else neighbor_grad
    return normalized_scores_gradient(logits_TE, score_function, grad_scores_TE * weight)


def _checked(top_k: Optional[int], scores: Tensor) -> int:
    if top_k is None or not 1 <= top_k <= scores.shape[-1]:
        raise ValueError(f"top_k must be between 1 and the number of experts, {scores.shape[-1]}; got {top_k}")
    return top_k


def _dispatched(name: str, routing_map: Optional[Tensor], scores: Tensor, top_k: Optional[int]) -> Tensor:
    if routing_map is None:
        if top_k is None:
            raise ValueError(f"kind='mass' needs {name}, or top_k to take each token's highest scores")
        return strongest_successors(scores, _checked(top_k, scores))
    if routing_map.shape != scores.shape or routing_map.dtype != torch.bool:
        raise ValueError(f"{name} must be bool {list(scores.shape)}; got {routing_map.dtype} {list(routing_map.shape)}")
    return routing_map
