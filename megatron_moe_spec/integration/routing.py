"""Decisions of an MoE layer's router for the tokens of a micro-batch. Suffixes: T tokens of this rank, E experts."""

from dataclasses import dataclass, field
from typing import Optional, Union

import torch
from torch import Tensor

from megatron_moe_spec.losses.scores import normalized_scores
from megatron_moe_spec.parallel.collectives import all_reduce_sum


@dataclass
class LayerRouting:
    """Routing of a micro-batch's tokens in one MoE layer.

    Attributes:
        active_TE: bool, the experts each token was dispatched to; none for padding tokens, and none that only
            fills an expert up to its capacity.
        num_local_tokens: this rank's tokens that are not padding.
        num_tokens: those of the micro-batch, over all ranks that share it; 0 in one of padding alone.
        message: what the neighbours' gradients need: m [T] (mass) or scores [T, E] (pathway).
        successors_EE: bool, the strongest pathways to the next layer (pathway), known once that has run.
        means: by the name of a loss of the scores, means over the micro-batch's tokens and their gradient.
    """

    active_TE: Tensor
    num_local_tokens: Union[Tensor, int]
    num_tokens: Union[Tensor, int]
    message: Optional[Tensor] = None
    successors_EE: Optional[Tensor] = None
    means: dict[str, tuple[Optional[Tensor], Optional[Tensor]]] = field(default_factory=dict)

    @property
    def divisor(self) -> Union[Tensor, int]:
        """Number of tokens by which a sum over the micro-batch becomes a mean; at least 1."""
        return self.num_tokens.clamp_min(1) if isinstance(self.num_tokens, Tensor) else max(self.num_tokens, 1)

    @property
    def counts(self) -> Union[Tensor, bool]:
        """Whether the micro-batch has tokens. One without adds nothing to a loss, nor to a mean over micro-batches."""
        return self.num_tokens > 0


def read_routing(
    probs_TE: Tensor, routing_map_TE: Tensor, padding_mask: Optional[Tensor], known: Optional[LayerRouting], group
) -> LayerRouting:
    """Reads the decision of ``TopKRouter.routing``.

    Args:
        padding_mask: True for padding, in any shape of T elements; None: no padding.
        known: another layer's routing of the same micro-batch, whose numbers of tokens hold here as well.
        group: the ranks that share the micro-batch, tensor x context parallel. One all-reduce of one number, for
            the first layer, where there is padding.

    Raises:
        RuntimeError: the mask is not that of this rank's tokens.
    """
    active_TE = routing_map_TE & (probs_TE > 0)
    if padding_mask is not None:
        if padding_mask.numel() != len(active_TE):
            raise RuntimeError(
                f"a router of {len(active_TE)} tokens got a padding mask of {padding_mask.numel()}: in pipeline stages "
                "after the first, Megatron does not divide the mask among sequence-parallel ranks (pass each its part)"
            )
        active_TE &= ~padding_mask.reshape(-1, 1)
    if known is not None:
        return LayerRouting(active_TE, known.num_local_tokens, known.num_tokens)
    if padding_mask is None:
        return LayerRouting(active_TE, len(active_TE), len(active_TE) * group.size())
    num_local_tokens = (~padding_mask).sum()
    return LayerRouting(active_TE, num_local_tokens, all_reduce_sum(num_local_tokens, group))


def token_scores(logits: Tensor, score_function: str, padding_mask: Optional[Tensor]) -> Tensor:
    """[T, E] scores of a router's logits [..., E], 0 for padding tokens."""
    return of_tokens(normalized_scores(logits.detach().reshape(-1, logits.shape[-1]), score_function), padding_mask)


def of_tokens(x_T: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
    """[T, ...] with 0 for padding tokens, whatever x has there."""
    if padding_mask is None:
        return x_T
    return torch.where(padding_mask.reshape(-1, *(1 for _ in x_T.shape[1:])), 0.0, x_T)
