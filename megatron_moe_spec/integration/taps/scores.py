"""Tap of a router's scores, normalised over all experts. Suffixes: T tokens of this rank, E experts."""

from functools import partial
from typing import Optional

import torch
from torch import Tensor

from megatron_moe_spec.integration.hooks.injection import add_gradient, separate_graph
from megatron_moe_spec.integration.hooks.routing import LayerRouting
from megatron_moe_spec.integration.hooks.scaling import gradient_weight
from megatron_moe_spec.integration.taps.base import RouterCall, Tap
from megatron_moe_spec.losses import ScoresLoss
from megatron_moe_spec.losses.base import one_per_token
from megatron_moe_spec.losses.scores import normalized_scores, normalized_scores_gradient
from megatron_moe_spec.parallel.collectives import all_reduce_sum


class ScoresTap(Tap[ScoresLoss]):
    """One node on the logits, and one normalisation each way, for all losses of the scores.

    A loss that needs means over the tokens of the micro-batch costs two all-reduces of their size in forward; none in
    backward.
    """

    def tap_logits(self, logits: Tensor, call: RouterCall) -> Tensor:
        return add_gradient(logits, partial(self._add_gradient, call)) if self.trained else logits

    def observe(self, call: RouterCall) -> None:
        computed = self.computed_losses()
        if not computed:
            return
        scores_TE = normalized_scores(call.logits_TE, self.layer.score_function)
        for loss in computed:
            value = self._observe(loss, scores_TE, call.routing)
            what = loss.name, self.layer.moe_layer_index, value.detach(), call.routing.tokens
            call.micro_batch.notes.add(self.layer.losses.record_mean, *what)

    def _observe(self, loss: ScoresLoss, scores_TE: Tensor, routing: LayerRouting) -> Tensor:
        """This rank's sum over its tokens; keeps the means that it needs, and the gradient with respect to them."""
        statistics = loss.token_statistics(scores_TE, routing.active_TE)
        if statistics is None:
            return _sum(loss, scores_TE, routing, None)
        group = self.layer.tp_cp_group
        mean = all_reduce_sum(routing.of_tokens(statistics).sum(dim=0), group) / routing.tokens.divisor
        with separate_graph():
            mean.requires_grad_()
            total = _sum(loss, scores_TE, routing, mean)
            (grad_mean,) = torch.autograd.grad(total, mean, allow_unused=True, materialize_grads=True)
        grad_mean = all_reduce_sum(grad_mean, group) / routing.tokens.divisor
        routing.means[loss.name] = mean.detach(), grad_mean
        return total.detach()

    def _add_gradient(self, call: RouterCall, incoming: Tensor) -> Tensor:
        # A recomputation has the means of the first pass.
        routing = call.micro_batch.routing[self.layer.index_in_chunk]
        assert routing is not None
        with separate_graph():
            scores_TE = normalized_scores(call.logits_TE, self.layer.score_function).requires_grad_()
            total = sum(_weighted(loss, scores_TE, routing) for loss in self.trained)
            (scores_gradient_TE,) = torch.autograd.grad(total, scores_TE)
        weight, factor = gradient_weight(self.layer.transformer_config, 1.0, routing.tokens)
        scores_gradient_TE = scores_gradient_TE * (weight * factor)
        gradient_TE = normalized_scores_gradient(call.logits_TE, self.layer.score_function, scores_gradient_TE)
        return incoming + gradient_TE.view(incoming.shape).to(incoming.dtype)


def _weighted(loss: ScoresLoss, scores_TE: Tensor, routing: LayerRouting) -> Tensor:
    mean, grad_mean = routing.means.get(loss.name, (None, None))
    total = _sum(loss, scores_TE, routing, mean)
    if grad_mean is not None:
        statistics = routing.of_tokens(loss.token_statistics(scores_TE, routing.active_TE))
        total = total + (statistics * grad_mean).sum()
    return loss.coeff * total


def _sum(loss: ScoresLoss, scores_TE: Tensor, routing: LayerRouting, mean: Optional[Tensor]) -> Tensor:
    """Over this rank's tokens."""
    losses_T = one_per_token(loss, loss.token_losses(scores_TE, routing.active_TE, mean), len(scores_TE))
    return routing.of_tokens(losses_T).sum()
