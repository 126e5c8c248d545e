"""Orthogonality loss of one MoE layer, on the experts' outputs as they lie before they are combined.

The rows are y = p x: Megatron weights what enters the down projection, and its bias, by the router's probability p.
Suffixes: T tokens, E experts, K experts per token, P rows, H hidden size.
"""

from functools import partial
from typing import Callable, Optional

import torch
from torch import Tensor, nn

from megatron_moe_spec.integration.compat import column_group
from megatron_moe_spec.integration.coupling import LayerRouting
from megatron_moe_spec.integration.dispatch import exchanges_rows, row_exchange
from megatron_moe_spec.integration.hooks import Hook
from megatron_moe_spec.integration.injection import add_gradient
from megatron_moe_spec.integration.recorder import Recorder
from megatron_moe_spec.integration.scaling import gradient_factor
from megatron_moe_spec.integration.specialization import ExpertRows, token_experts
from megatron_moe_spec.losses.orthogonality import squared_projection_gradient, squared_projection_sum
from megatron_moe_spec.losses.scores import accumulation_dtype


class OutputRows(ExpertRows):
    """The rows y of a layer's local experts in one micro-batch, by reference, and the loss on x = y / p.

    Args:
        dispatched_TE, live_TE, top_k, column_group, come_home: see ``ExpertRows``.
        probs_TE: p, the weight that the router gave each token's experts.
    """

    def __init__(
        self,
        dispatched_TE: Tensor,
        live_TE: Tensor,
        probs_TE: Tensor,
        top_k: int,
        column_group,
        come_home: bool,
    ):
        super().__init__(dispatched_TE, live_TE, top_k, slice(0, None, 1), 1, column_group, come_home, fused=False)
        experts_TK, valid_TK = token_experts(live_TE, top_k)
        probs_TK = probs_TE.gather(1, experts_TK).to(accumulation_dtype(probs_TE))
        self._probs_TK = probs_TK.masked_fill(~valid_TK, 1.0)

    def loss_sum(self) -> Tensor:
        """``squared_projection_sum`` of x over this rank's tokens, once the rows have been compared."""
        return squared_projection_sum(self._inverse_lengths_TK * self._weights_TK, self._cosines_TKK)

    @property
    def _weights_TK(self) -> Tensor:
        """p in the rows' precision: a router may have a higher one."""
        return self._probs_TK.to(self._inverse_lengths_TK.dtype)

    def _loss_gradient(self, units_TKH: Tensor) -> Tensor:
        inverse_TK = self._inverse_lengths_TK * self._weights_TK
        gradient_TKH = squared_projection_gradient(units_TKH, inverse_TK, self._cosines_TKK)
        return gradient_TKH / self._weights_TK.unsqueeze(-1)


class OutputTap:
    """Adds the orthogonality loss's gradient to the outputs of one layer's experts.

    The loss depends on x alone, but a gradient for y = p x reaches p as well: p gets the opposite of it, so that
    nothing of the loss reaches the router.
    """

    def __init__(self, moe_layer: nn.Module, recorder: Recorder):
        self._config = moe_layer.config
        self._dispatcher = moe_layer.token_dispatcher
        self._recorder = recorder
        self._hooks = [
            moe_layer.experts.register_forward_pre_hook(Hook(partial(_tap_probs, self))),
            moe_layer.experts.register_forward_hook(Hook(partial(_tap_outputs, self))),
        ]
        self.forget()

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def forget(self) -> None:
        """Leaves the next run of the experts alone."""
        self._rows: Optional[OutputRows] = None
        self._routing: Optional[LayerRouting] = None
        self._probs_gradients: list[Tensor] = []

    def expect(self, probs_TE: Tensor, dispatched_TE: Tensor, routing: LayerRouting) -> None:
        """Takes what the router decided for the next run of the experts."""
        self._rows = OutputRows(
            dispatched_TE,
            routing.live_TE,
            probs_TE,
            self._config.moe_router_topk,
            column_group(self._dispatcher),
            come_home=exchanges_rows(self._dispatcher),
        )
        self._routing = routing
        self._probs_gradients = []

    def tap_probs(self, probs_P: Tensor) -> Tensor:
        if self._rows is None:
            return probs_P
        gradients = self._probs_gradients
        return add_gradient(probs_P, lambda incoming: incoming + gradients.pop().to(incoming.dtype))

    def tap_outputs(self, probs_P: Tensor, y_PH: Tensor) -> Tensor:
        rows, self._rows = self._rows, None
        if rows is None:
            return y_PH
        k, routing = self._config.moe_router_topk, self._routing
        mean = 1.0 / (routing.divisor * k * (k - 1))
        with torch.no_grad():
            rows.add(y_PH)
            rows.compare(row_exchange(self._dispatcher, rows.dispatched_TE, rows.num_rows))
            self._recorder.record_loss("orthogonality_loss", rows.loss_sum() * mean, routing.counts)
        values = y_PH.detach(), probs_P.detach()
        weight = partial(self._weight, mean, routing.num_tokens)
        return add_gradient(y_PH, partial(_add_output_gradient, rows, *values, weight, self._probs_gradients))

    def _weight(self, mean, num_tokens):
        return self._recorder.config.orthogonality_loss_coeff * mean * gradient_factor(self._config, num_tokens)


def _add_output_gradient(
    rows: OutputRows, y_PH: Tensor, probs_P: Tensor, weight: Callable, probs_gradients: list, incoming: Tensor
) -> Tensor:
    gradient_PH = rows.add_gradient(0, weight(), torch.zeros_like(incoming))
    reaches_P = (gradient_PH.to(accumulation_dtype(y_PH)) * y_PH).sum(dim=-1)
    probs_gradients.append(-(reaches_P / probs_P).masked_fill(probs_P == 0, 0.0))
    return incoming + gradient_PH


def _tap_probs(tap: OutputTap, module: nn.Module, args):
    """Forward pre-hook of the experts, called with (permuted rows, rows per expert, permuted probabilities)."""
    rows, splits, probs, *others = args
    return (rows, splits, tap.tap_probs(probs), *others)


def _tap_outputs(tap: OutputTap, module: nn.Module, args, outputs):
    """Forward hook of the experts, which return (p * x, no bias)."""
    return (tap.tap_outputs(args[2], outputs[0]), *outputs[1:])
