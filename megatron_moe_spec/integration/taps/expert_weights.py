"""Tap of the weights of a layer's router and of its experts' first linear layers.

Suffixes: E experts, L local experts, F gate rows on this rank, H hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Optional

import torch
from torch import Tensor

from megatron_moe_spec.integration.compat.experts import (
    adds_to_main_gradient,
    expert_first_weights,
    gate_rows,
    has_adapted_weights,
)
from megatron_moe_spec.integration.compat.groups import etp_ep_group, etp_group
from megatron_moe_spec.integration.hooks.injection import add_weight_gradients, separate_graph
from megatron_moe_spec.integration.hooks.scaling import micro_batch_count, weight_gradient_factor
from megatron_moe_spec.integration.support.rules_of_losses import ADAPTED_WEIGHTS
from megatron_moe_spec.integration.taps.base import RouterCall, Tap, TappedLayer, TokensPerExpert
from megatron_moe_spec.losses import ExpertRouterCoupling, router_noise
from megatron_moe_spec.losses.expert_router_coupling import excess, proxy_norms, proxy_tokens
from megatron_moe_spec.parallel.collectives import all_gather, all_reduce_sum


@dataclass
class _Run:
    """One run of the experts that the router has announced."""

    call: RouterCall
    gradients: Callable[[], list] = field(init=False)  # of the weights; once the experts have run


class ExpertWeightsTap(Tap[ExpertRouterCoupling]):
    """Adds a loss's gradient to the weights of one layer's router and local experts.

    Every rank computes the loss of all E experts from norms M [E, E], of which it has the columns of its own experts:
    in forward one all-gather of E x E numbers over the expert-parallel group, and one all-reduce of E x L over the
    expert-tensor-parallel group, whose ranks have F rows each of a gate. None in backward: a rank adds what its own
    columns and rows give, for all ranks of the expert group (expert x expert tensor parallel).

    The numbers of the layer and of the training step are the seed of the loss's noise.
    """

    def __init__(self, losses: Sequence[ExpertRouterCoupling], layer: TappedLayer):
        super().__init__(losses, layer)
        (self._loss,) = losses
        self._run: Optional[_Run] = None
        self.hooks = [self.hook_inputs(), self.hook_outputs()]

    def forget(self) -> None:
        self._run = None

    def tap_probs(self, probs: Tensor, call: RouterCall) -> Tensor:
        self._run = _Run(call)
        return probs

    def tap_inputs(self, inputs_PH: Tensor, tokens_per_expert: TokensPerExpert) -> Tensor:
        """In the backward pass of the experts' inputs, adds the loss's gradient for one micro-batch to the weights.

        It comes after that of the experts: with gradient accumulation fusion, Transformer Engine's linear layers
        overwrite ``main_grad`` in what they take for a step's first micro-batch, with all that was added before.
        """
        run = self._run
        if run is None:
            return inputs_PH
        weights = [self.layer.router.weight, *expert_first_weights(self.layer.module)]
        return add_weight_gradients(inputs_PH, weights, lambda: run.gradients())

    def tap_outputs(self, outputs_PH: Tensor) -> Tensor:
        """Records the loss, and leaves what gives its gradients.

        When the experts have run, their weights are those of this step: where parameters are gathered while the model
        runs (``--overlap-param-gather``), each module waits for its own just before it runs.
        """
        run, self._run = self._run, None
        if run is None:
            return outputs_PH
        call, ep_group = run.call, self.layer.dispatcher.ep_group
        if has_adapted_weights(self.layer.module):
            raise RuntimeError(ADAPTED_WEIGHTS.text(loss=self._loss))
        router, experts = self.layer.router.weight, expert_first_weights(self.layer.module)
        with torch.no_grad():
            noise_EH = router_noise(router, seed=(self.layer.clock.step << 16) + self.layer.moe_layer_index)
            gates = [gate_rows(self.layer.module, weight).flatten(0, -2) for weight in experts]
            over_columns = partial(all_reduce_sum, group=etp_group(self.layer.dispatcher))
            norms_EL = proxy_norms(proxy_tokens(router, noise_EH), gates, total=over_columns)
            norms_EE = all_gather(norms_EL.T.contiguous(), ep_group).T
        with separate_graph():
            norms_EE.requires_grad_()
            loss = excess(norms_EE, self._loss.alpha)
            (gradient_EE,) = torch.autograd.grad(loss, norms_EE)
        value = loss.detach() / self.layer.tp_cp_group.size()
        what = self._loss.name, self.layer.moe_layer_index, value, call.routing.tokens.counts
        call.micro_batch.notes.add(self.layer.losses.record_loss, *what)
        slope_EE = (gradient_EE / norms_EE.detach()).masked_fill(norms_EE.detach() == 0, 0.0)
        slope_EL = slope_EE.unflatten(1, (ep_group.size(), -1))[:, ep_group.rank()]
        run.gradients = partial(self._gradients, noise_EH, slope_EL, self._group_count(call))
        return outputs_PH

    def _group_count(self, call: RouterCall) -> Tensor:
        """Weight of the micro-batches of all ranks of the expert group: their tokens, or one for each that has any.

        Ranks may hold different numbers of tokens. One all-reduce of one number, for the first layer that asks.
        """
        micro_batch = call.micro_batch
        if micro_batch.etp_ep_group_count is None:
            own = micro_batch_count(self.layer.transformer_config, call.routing.tokens.total)
            own = torch.as_tensor(own, dtype=torch.float32, device=self.layer.router.weight.device)
            micro_batch.etp_ep_group_count = all_reduce_sum(own, etp_ep_group(self.layer.dispatcher))
        return micro_batch.etp_ep_group_count

    def _gradients(self, noise_EH: Tensor, slope_EL: Tensor, group_count: Tensor) -> list:
        """Of the router's and of each local expert's weight, in closed form.

        With a = R_i * d_i: dM_ij/dW_j = (W_j a) a^T / M_ij and dM_ij/da = W_j^T (W_j a) / M_ij.
        """
        router, experts = self.layer.router.weight, expert_first_weights(self.layer.module)
        factor = weight_gradient_factor(self.layer.transformer_config, group_count, self.layer.tp_cp_group.size())
        slope_EL = slope_EL * (self._loss.coeff * factor)
        proxies_EH = proxy_tokens(router.detach(), noise_EH)
        proxies_gradient_EH = torch.zeros_like(proxies_EH)
        gradients = []
        for slope_E, expert in zip(slope_EL.unbind(dim=1), experts):
            gate_FH = gate_rows(self.layer.module, expert.detach()).flatten(0, -2).to(proxies_EH.dtype)
            response_EF = proxies_EH @ gate_FH.T * slope_E.unsqueeze(-1)
            proxies_gradient_EH += response_EF @ gate_FH
            gradients.append(self._expert_gradient(expert, response_EF.T @ proxies_EH))
        return [(proxies_gradient_EH * noise_EH).to(router.dtype), *gradients]

    def _expert_gradient(self, expert: Tensor, gradient_FH: Tensor) -> Optional[Tensor]:
        """Gradient of the whole weight; None where it has been added to where the linear layer adds its own."""
        fused = adds_to_main_gradient(self.layer.transformer_config) and hasattr(expert, "main_grad")
        whole = expert.main_grad if fused else torch.zeros_like(expert)
        rows = gate_rows(self.layer.module, whole)
        rows += gradient_FH.view(rows.shape)
        return None if fused else whole
