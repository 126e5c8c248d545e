"""Tap of a router's weight."""

from functools import partial

import torch
from torch import Tensor

from megatron_moe_spec.integration.compat.experts import has_adapter
from megatron_moe_spec.integration.hooks.injection import add_weight_gradients, separate_graph
from megatron_moe_spec.integration.hooks.scaling import micro_batch_count, weight_gradient_factor
from megatron_moe_spec.integration.support.rules_of_losses import ADAPTED_ROUTER
from megatron_moe_spec.integration.taps.base import RouterCall, Tap
from megatron_moe_spec.losses import RouterWeightLoss


class RouterWeightTap(Tap[RouterWeightLoss]):
    """Every rank computes the losses of its copy of the weight, and counts as a share of its micro-batch."""

    def tap_logits(self, logits: Tensor, call: RouterCall) -> Tensor:
        # When the router has its logits its weight is that of this step, also where parameters are gathered while the
        # model runs (--overlap-param-gather).
        if not self.trained:
            return logits
        if has_adapter(self.layer.module.router):
            raise RuntimeError(ADAPTED_ROUTER.text(loss=self.trained[0]))
        return add_weight_gradients(logits, [self.layer.router.weight], partial(self._gradients, call))

    def observe(self, call: RouterCall) -> None:
        for loss in self.computed_losses():
            value = loss.of_weight(self.layer.router.weight.detach()) / self.layer.tp_cp_group.size()
            what = loss.name, self.layer.moe_layer_index, value, call.routing.tokens.counts
            call.micro_batch.notes.add(self.layer.losses.record_loss, *what)

    def _gradients(self, call: RouterCall) -> list[Tensor]:
        weight = self.layer.router.weight.detach().requires_grad_()
        with separate_graph():
            total = sum(loss.coeff * loss.of_weight(weight) for loss in self.trained)
            (gradient,) = torch.autograd.grad(total, weight)
        transformer_config = self.layer.transformer_config
        count = micro_batch_count(transformer_config, call.routing.tokens.total)
        factor = weight_gradient_factor(transformer_config, count, self.layer.tp_cp_group.size())
        return [(gradient * factor).to(weight.dtype)]
