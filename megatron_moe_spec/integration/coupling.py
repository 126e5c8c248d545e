"""Coupling loss between the MoE layers of a micro-batch, from the values that each layer leaves behind.

A layer's gradient needs only its neighbours' values, so no autograd edge joins two layers: checkpointed layers
and overlapped schedules need nothing special. Suffixes: T tokens, E experts.
"""

from dataclasses import dataclass
from typing import Optional, Union

import torch
from torch import Tensor

from megatron_moe_spec.kernels import load
from megatron_moe_spec.losses.coupling import joint_scores, routed_mass, strongest_successors
from megatron_moe_spec.losses.scores import normalized_scores, normalized_scores_gradient
from megatron_moe_spec.parallel.collectives import summed


@dataclass
class LayerRouting:
    """How one MoE layer routed the tokens of a micro-batch.

    Attributes:
        live_TE: bool, the experts each token was dispatched to; none for padding tokens, and none that only
            fills an expert up to its capacity.
        num_local_tokens: this rank's tokens that are not padding.
        num_tokens: those of the micro-batch, over all ranks that share it; 0 in one of padding alone.
        message: what the neighbours' gradients need: m [T] (mass) or scores [T, E] (pathway).
        successors_EE: bool, the strongest pathways to the next layer (pathway), known once that has run.
        mean_scores_E: the experts' mean scores over the micro-batch's tokens, where the score variance loss needs them.
    """

    live_TE: Tensor
    num_local_tokens: Union[Tensor, int]
    num_tokens: Union[Tensor, int]
    message: Optional[Tensor] = None
    successors_EE: Optional[Tensor] = None
    mean_scores_E: Optional[Tensor] = None

    @property
    def divisor(self) -> Union[Tensor, int]:
        """What makes a sum over the micro-batch's tokens their mean, and nothing of nothing."""
        return self.num_tokens.clamp_min(1) if isinstance(self.num_tokens, Tensor) else max(self.num_tokens, 1)

    @property
    def counts(self) -> Union[Tensor, bool]:
        """Whether the micro-batch has tokens. One without adds nothing, to no loss and to no mean over micro-batches."""
        return self.num_tokens > 0


def read_routing(
    probs_TE: Tensor, routing_map_TE: Tensor, padding_mask: Optional[Tensor], known: Optional[LayerRouting], group
) -> LayerRouting:
    """What ``TopKRouter.routing`` decided.

    Args:
        padding_mask: True for padding, in any shape of T elements; None: no padding.
        known: another layer's routing of the same micro-batch, whose numbers of tokens hold here as well.
        group: the ranks that share the micro-batch, tensor x context parallel. One all-reduce of one number, for
            the first layer, where there is padding.

    Raises:
        RuntimeError: the mask is not that of this rank's tokens.
    """
    live_TE = routing_map_TE & (probs_TE > 0)
    if padding_mask is not None:
        if padding_mask.numel() != len(live_TE):
            raise RuntimeError(
                f"a router of {len(live_TE)} tokens got a padding mask of {padding_mask.numel()}: in pipeline stages after "
                "the first, Megatron does not divide the mask among sequence-parallel ranks (pass each rank its part)"
            )
        live_TE &= ~padding_mask.reshape(-1, 1)
    if known is not None:
        return LayerRouting(live_TE, known.num_local_tokens, known.num_tokens)
    if padding_mask is None:
        return LayerRouting(live_TE, len(live_TE), len(live_TE) * group.size())
    num_local_tokens = (~padding_mask).sum()
    return LayerRouting(live_TE, num_local_tokens, summed(num_local_tokens, group))


def token_scores(logits: Tensor, score_function: str, padding_mask: Optional[Tensor]) -> Tensor:
    """[T, E] scores of a router's logits [..., E], 0 for padding tokens."""
    scores_TE = normalized_scores(logits.detach().reshape(-1, logits.shape[-1]), score_function)
    return scores_TE if padding_mask is None else scores_TE * ~padding_mask.reshape(-1, 1)


def coupling_message(
    kind: str, logits: Tensor, score_function: str, padding_mask: Optional[Tensor], live_TE: Tensor, fused: bool
) -> Tensor:
    """What the neighbours of a layer need of it, see ``LayerRouting``; ``fused``: by the Triton kernels."""
    if fused and kind == "mass":
        return load("coupling").routed_mass(logits.reshape(-1, logits.shape[-1]), live_TE, score_function)
    scores_TE = token_scores(logits, score_function, padding_mask)
    return routed_mass(scores_TE, live_TE) if kind == "mass" else scores_TE


def pair_loss(kind: str, this: LayerRouting, following: LayerRouting, top_k: int, group) -> Tensor:
    """This rank's part of the loss of two adjacent layers; the parts of the group's ranks sum to the loss.

    Notes the pathways that the loss rewards in ``this``: one all-reduce of E x E numbers (pathway).
    """
    if kind == "mass":
        return 1.0 / group.size() - (this.message * following.message).sum() / following.divisor
    joint_EE = joint_scores(this.message, following.message, following.divisor)
    this.successors_EE = strongest_successors(summed(joint_EE, group), top_k)
    return 1.0 / group.size() - (joint_EE * this.successors_EE).sum()


def pull_of_previous(kind: str, previous: LayerRouting) -> Tensor:
    """-T times the gradient of the loss of ``previous`` and this layer with respect to this layer's scores.

    [T], the same for every dispatched expert (mass), or [T, E] (pathway).
    """
    if kind == "mass":
        return previous.message
    return previous.message @ previous.successors_EE.to(previous.message.dtype)


def pull_of_following(kind: str, this: LayerRouting, following: LayerRouting) -> Tensor:
    """The same for the loss of this layer and ``following``."""
    if kind == "mass":
        return following.message
    return following.message @ this.successors_EE.T.to(following.message.dtype)


def add_logits_gradient(
    kind: str,
    this: LayerRouting,
    pulls: list[Tensor],
    logits: Tensor,
    score_function: str,
    factor: Union[Tensor, float],
    incoming: Tensor,
    fused: bool,
) -> Tensor:
    """incoming + factor * gradient of the (at most two) pair losses of a layer with respect to its logits.

    Args:
        pulls: of the neighbours, see ``pull_of_previous``.
        incoming: the logits' gradient so far, in their shape.
        fused: by the Triton kernels.
    """
    pull, weight = sum(pulls), -factor / this.divisor
    logits_TE = logits.reshape(-1, logits.shape[-1])
    if fused and kind == "mass":
        incoming_TE = incoming.reshape(logits_TE.shape)
        add = load("coupling").add_mass_gradient
        return add(logits_TE, this.live_TE, score_function, pull, weight, incoming_TE).view(logits.shape)
    scores_gradient_TE = this.live_TE * pull.unsqueeze(-1) if kind == "mass" else pull
    gradient_TE = normalized_scores_gradient(logits_TE, score_function, scores_gradient_TE * weight)
    return incoming + gradient_TE.view(logits.shape).to(incoming.dtype)
