"""Decisions of an MoE layer's router for the tokens of a micro-batch. Suffixes: T tokens of this rank, E experts."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Optional, Union

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_moe_spec.losses.scores import normalized_scores
from megatron_moe_spec.parallel.collectives import all_reduce_sum


@dataclass(frozen=True)
class TokenCount:
    """Number of a micro-batch's tokens that are not padding: known on the host, or a scalar on the device."""

    local: Union[Tensor, int]  # this rank's
    total: Union[Tensor, int]  # those of all ranks that share the micro-batch; 0 in one of padding alone
    # See ``scaling.gradient_weight``: weight, and the scale in it, which must live as long as it is known by its id.
    weights: dict[tuple, tuple] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def divisor(self) -> Union[Tensor, int]:
        """Number of tokens by which a sum over the micro-batch becomes a mean; at least 1. In fp32 on the device."""
        return self.total.clamp_min(1).float() if isinstance(self.total, Tensor) else max(self.total, 1)

    @cached_property
    def counts(self) -> Union[Tensor, bool]:
        """Whether the micro-batch has tokens. One without adds nothing to a loss, nor to a mean over micro-batches."""
        return self.total > 0


@dataclass
class LayerRouting:
    """Routing of a micro-batch's tokens in one MoE layer."""

    # bool, the experts each token was dispatched to; none for padding tokens, and none that only fills an expert up to
    # its capacity. Of a layer in another stage, known where routing is measured.
    active_TE: Tensor
    tokens: TokenCount
    message: Optional[Tensor] = None  # what the neighbours' gradients need: m [T] (mass) or scores [T, E] (pathway)
    successors_EE: Optional[Tensor] = None  # bool, strongest pathways to the next layer (pathway), once it has run
    # By the name of a loss of the scores, means over the micro-batch's tokens and their gradient.
    means: dict[str, tuple[Optional[Tensor], Optional[Tensor]]] = field(default_factory=dict)
    padding_mask: Optional[Tensor] = None  # bool, True for padding, in any shape; None: no padding

    def of_tokens(self, x_T: Tensor) -> Tensor:
        """[T, ...] with 0 for padding tokens, whatever x has there."""
        if self.padding_mask is None:
            return x_T
        return torch.where(self.padding_mask.reshape(-1, *(1 for _ in x_T.shape[1:])), 0.0, x_T)

    def scores(self, logits_TE: Tensor, score_function: str) -> Tensor:
        """[T, E] of the router's detached logits, normalised; 0 for padding tokens."""
        return self.of_tokens(normalized_scores(logits_TE, score_function))


def read_routing(
    probs_TE: Tensor,
    routing_map_TE: Tensor,
    padding_mask: Optional[Tensor],
    known: Optional[LayerRouting],
    group: ProcessGroup,
) -> LayerRouting:
    """Reads the decision of ``TopKRouter.routing``.

    Args:
        padding_mask: True for padding, in any shape of T elements; None: no padding.
        known: another layer's routing of the same micro-batch, whose numbers of tokens hold here as well.
        group: the ranks that share the micro-batch, tensor x context parallel. One all-reduce of one number, for the
            first layer; also where this rank has no mask, for another may have one.

    Raises:
        RuntimeError: the mask is not that of this rank's tokens.
    """
    active_TE = torch.logical_and(routing_map_TE, probs_TE)  # of NaN, too: its losses are NaN, not those of no expert
    if padding_mask is not None:
        if padding_mask.numel() != len(active_TE):
            raise RuntimeError(
                f"a router of {len(active_TE)} tokens got a padding mask of {padding_mask.numel()}: in pipeline stages "
                "after the first, Megatron does not divide the mask among sequence-parallel ranks (pass each its part)"
            )
        active_TE &= ~padding_mask.reshape(-1, 1)
    tokens = _count(active_TE, padding_mask, group) if known is None else known.tokens
    return LayerRouting(active_TE, tokens, padding_mask=padding_mask)


def _count(active_TE: Tensor, padding_mask: Optional[Tensor], group: ProcessGroup) -> TokenCount:
    if padding_mask is not None:
        local = (~padding_mask).sum()
    elif group.size() == 1:
        return TokenCount(len(active_TE), len(active_TE))
    else:
        local = torch.full((), len(active_TE), device=active_TE.device)
    return TokenCount(local, all_reduce_sum(local, group))
