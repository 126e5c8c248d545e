"""Factors on the gradient of an auxiliary loss by which any layout trains as one process would."""

from typing import Union

from torch import Tensor

from megatron_moe_spec.integration.compat.protocols import TransformerConfig
from megatron_moe_spec.integration.compat.schedules import backward_loss_scale
from megatron_moe_spec.integration.hooks.routing import TokenCount


def gradient_weight(
    transformer_config: TransformerConfig, factor: float, tokens: TokenCount
) -> tuple[Union[Tensor, float], float]:
    """Two factors, a number or tensor and a number, of the gradient of this rank's part of a loss. Call it in backward.

    Their product is ``factor / tokens.divisor`` times that by which the parts count. The parts sum, over the ranks that
    share a micro-batch, to a mean over the micro-batch's tokens. Megatron sums router gradients over tensor-parallel
    ranks and expert gradients over the ranks that tokens come from. It averages over data x context parallel ranks, and
    its auxiliary-loss scale holds the context-parallel size and one over the number of micro-batches. With
    ``--calculate-per-token-loss`` it sums gradients over all these ranks and divides them by the global number of
    tokens instead, so a micro-batch's loss is weighted by its own number.

    There are two so that nothing is computed on the device where the second can have it all: kernels take both. Where
    the number of tokens is on the device, the product is computed once a micro-batch for all layers.

    Args:
        transformer_config: the layer's TransformerConfig.
        tokens: of the micro-batch.
    """
    scale = backward_loss_scale()
    per_token, total = transformer_config.calculate_per_token_loss, tokens.total
    if not isinstance(total, Tensor):
        factor = factor / tokens.divisor
        return scale, factor * total if per_token else factor
    # Megatron may set the scale anew, or change it in place.
    key = factor, per_token, (id(scale), scale._version) if isinstance(scale, Tensor) else scale
    if key not in tokens.weights:
        share = factor / tokens.divisor
        tokens.weights[key] = scale * (share * total if per_token else share), scale
    return tokens.weights[key][0], 1.0


def micro_batch_count(transformer_config: TransformerConfig, num_tokens: Union[Tensor, int]) -> Union[Tensor, int]:
    """Weight of a rank's micro-batch in a loss of the weights: its tokens with per-token loss, else one if it has any.

    Args:
        transformer_config: see ``gradient_weight``.
        num_tokens: of the micro-batch, those that are no padding, over all ranks that share it.
    """
    if transformer_config.calculate_per_token_loss:
        return num_tokens
    return (num_tokens > 0).float() if isinstance(num_tokens, Tensor) else num_tokens > 0


def weight_gradient_factor(
    transformer_config: TransformerConfig, group_count: Union[Tensor, int], num_shares: int
) -> Union[Tensor, float]:
    """The same for a loss of the weights alone, where a rank adds what its own experts' part of the weights gives.

    Each of the ``num_shares`` ranks that share a micro-batch counts as holding an equal part of the loss, so that
    what is said of a loss of tokens holds of it. An expert's gradient would then come from the parts of all ranks of
    the group that holds one set of experts (expert x expert tensor parallel): a rank adds it for all of them at once.
    The router's gradient is a sum over experts, hence over this group's ranks, which add up to it when Megatron reduces
    router gradients over all ranks.

    Args:
        transformer_config: the layer's TransformerConfig.
        group_count: sum over that group's ranks of ``micro_batch_count``.
        num_shares: ranks that share a micro-batch (tensor x context parallel).
    """
    return backward_loss_scale() * group_count / num_shares
