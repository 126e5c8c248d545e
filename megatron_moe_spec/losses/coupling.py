"""Cross-layer coupling loss (arXiv 2602.14159, Eq. 7): routing of adjacent MoE layers, jointly confident."""

from typing import Optional

import torch
from torch import Tensor

from megatron_moe_spec.losses.scores import accumulation_dtype

COUPLING_TYPES = ("mass", "pathway")


def coupling_loss(
    scores: Tensor,
    scores_next: Tensor,
    map: Optional[Tensor] = None,
    map_next: Optional[Tensor] = None,
    kind: str = "mass",
    top_k: Optional[int] = None,
) -> Tensor:
    """One minus the joint routing probability of two consecutive MoE layers, in [0, 1].

    mass:     L = 1 - (1/T) sum_t m(t) m_next(t),  m(t) = sum of the token's scores over its dispatched experts.
    pathway:  L = 1 - sum_e sum_{v in top-k of row P[e, :]} P[e, v],  P = (1/T) sum_t scores(t, e) scores_next(t, v).

    Args:
        scores: [T, E] the layer's router scores, normalised over all experts (see ``normalized_scores``).
        scores_next: [T, E'] those of the next MoE layer, for the same tokens.
        map: [T, E] bool, the experts each token was dispatched to (mass). Default: its ``top_k`` highest scores.
        map_next: [T, E'] bool, likewise.
        kind: mass or pathway.
        top_k: experts per token; needed by pathway, and by mass where a map is missing.

    Returns:
        Scalar in fp32 (fp64 for fp64 input).

    Raises:
        ValueError: a shape, dtype or option does not fit; the message names the argument.
    """
    for name, value in (("scores", scores), ("scores_next", scores_next)):
        if value.dim() != 2 or not value.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor [T, E]; got {value.dtype} {list(value.shape)}")
    if scores.shape[0] != scores_next.shape[0]:
        raise ValueError(
            f"scores_next must hold the same tokens as scores: {scores.shape[0]} tokens; got {scores_next.shape[0]}"
        )
    scores, scores_next = scores.to(accumulation_dtype(scores)), scores_next.to(accumulation_dtype(scores_next))
    num_tokens = max(scores.shape[0], 1)
    if kind == "mass":
        mass = routed_mass(scores, _dispatched("map", map, scores, top_k))
        mass_next = routed_mass(scores_next, _dispatched("map_next", map_next, scores_next, top_k))
        return 1.0 - (mass * mass_next).sum() / num_tokens
    if kind == "pathway":
        if map is not None or map_next is not None:
            raise ValueError("map and map_next are for kind='mass'; kind='pathway' takes top_k alone")
        joint = joint_scores(scores, scores_next, num_tokens)
        return 1.0 - (joint * strongest_successors(joint, _checked(top_k, joint))).sum()
    raise ValueError(f"kind must be one of {', '.join(COUPLING_TYPES)}; got {kind!r}")


def routed_mass(scores: Tensor, map: Tensor) -> Tensor:
    """[T] m(t) = sum over the dispatched experts of the scores [T, E], map [T, E] bool."""
    return (scores * map).sum(dim=-1)


def joint_scores(scores: Tensor, scores_next: Tensor, num_tokens) -> Tensor:
    """[E, E'] mean over tokens of the outer product of the two layers' scores; sums to 1."""
    return scores.T @ scores_next / num_tokens


def strongest_successors(joint: Tensor, top_k: int) -> Tensor:
    """[E, E'] bool: the top-k entries of each row of the joint matrix. Carries no gradient."""
    chosen = joint.detach().topk(top_k, dim=-1).indices
    return torch.zeros_like(joint, dtype=torch.bool).scatter_(1, chosen, True)


def _checked(top_k: Optional[int], scores: Tensor) -> int:
    if top_k is None or not 1 <= top_k <= scores.shape[-1]:
        raise ValueError(f"top_k must be between 1 and the number of experts, {scores.shape[-1]}; got {top_k}")
    return top_k


def _dispatched(name: str, map: Optional[Tensor], scores: Tensor, top_k: Optional[int]) -> Tensor:
    if map is None:
        if top_k is None:
            raise ValueError(f"kind='mass' needs {name}, or top_k to take each token's highest scores")
        return strongest_successors(scores, _checked(top_k, scores))
    if map.shape != scores.shape or map.dtype != torch.bool:
        raise ValueError(f"{name} must be bool {list(scores.shape)}; got {map.dtype} {list(map.shape)}")
    return map
