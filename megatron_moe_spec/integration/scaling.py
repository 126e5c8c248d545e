"""How much of an auxiliary loss's gradient to inject so that any layout trains as one process would."""

from typing import Union

from torch import Tensor

from megatron_moe_spec.integration.compat import backward_loss_scale


def gradient_factor(config, num_tokens: Union[Tensor, int]) -> Union[Tensor, float]:
    """Factor on the gradient of a loss L that is a mean over the micro-batch's tokens. Call it in backward.

    Megatron divides gradients by the number of micro-batches through its auxiliary-loss scale and averages
    them over data-parallel ranks. With ``--calculate-per-token-loss`` it sums them and divides by the global
    number of tokens instead, so L is weighted by its micro-batch's own number of tokens.

    Args:
        config: the layer's TransformerConfig.
        num_tokens: non-padding tokens of the micro-batch.
    """
    scale = backward_loss_scale()
    return scale * num_tokens if config.calculate_per_token_loss else scale
