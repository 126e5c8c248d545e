"""Expert-router coupling loss of one MoE layer, from its weights alone.

Suffixes: E experts, L local experts, F gate rows on this rank, H hidden size.
"""

from functools import partial
from typing import Callable

import torch
from torch import Tensor, nn

from megatron_moe_spec.integration.compat import (
    adds_to_main_gradient,
    column_group,
    expert_first_weights,
    expert_group,
    gate_rows,
    has_adapted_weights,
    router_of,
    token_group,
)
from megatron_moe_spec.integration.coupling import LayerRouting
from megatron_moe_spec.integration.hooks import Hook
from megatron_moe_spec.integration.injection import add_weight_gradients
from megatron_moe_spec.integration.microbatch import MicroBatch
from megatron_moe_spec.integration.recorder import Recorder
from megatron_moe_spec.integration.scaling import weight_gradient_factor
from megatron_moe_spec.losses.expert_router_coupling import excess, proxy_norms, proxy_tokens, router_noise
from megatron_moe_spec.parallel.collectives import gathered, summed


ADAPTED_WEIGHTS = (
    "ERC is a loss of the router's and the experts' own weights, which adapters around the router or linear_fc1 leave as "
    "they are (set --moe-erc-loss-coeff to 0, or adapt other modules)"
)


class WeightTap:
    """Adds the loss's gradient to the weights of one layer's router and local experts.

    Every rank computes the loss of all E experts from norms M [E, E], of which it has the columns of its own experts:
    in forward one all-gather of E x E numbers over the expert-parallel group, and one all-reduce of E x L over the
    expert-tensor-parallel group, whose ranks have F rows each of a gate. None in backward: a rank adds what its own
    columns and rows give, for all ranks of the expert group (expert x expert tensor parallel).

    Args:
        number: of the layer in the model; with the training step's number it is the seed of the noise.
        moe_layer: the layer.
    """

    def __init__(self, number: int, moe_layer: nn.Module, recorder: Recorder):
        self._number = number
        self._layer = moe_layer
        self._router = router_of(moe_layer)
        self._dispatcher = moe_layer.token_dispatcher
        self._num_shares = token_group(moe_layer).size()
        self._recorder = recorder
        self._expected = None
        self._hook = moe_layer.experts.register_forward_hook(Hook(partial(_tap_outputs, self)))

    def detach(self) -> None:
        self._hook.remove()

    def forget(self) -> None:
        """Leaves the next run of the experts alone."""
        self._expected = None

    def expect(self, micro_batch: MicroBatch, routing: LayerRouting) -> None:
        """Takes what the router decided for the next run of the experts."""
        self._expected = micro_batch, routing

    def attach_to(self, y: Tensor) -> Tensor:
        """Returns the experts' outputs y; their backward adds the loss's gradient for one micro-batch to the weights.

        When the experts have run, their weights are those of this step: where parameters are gathered while the model
        runs (``--overlap-param-gather``), each module waits for its own just before it runs.
        """
        expected, self._expected = self._expected, None
        if expected is None:
            return y
        if has_adapted_weights(self._layer):
            raise RuntimeError(ADAPTED_WEIGHTS)
        micro_batch, routing = expected
        router, experts = self._router.weight, expert_first_weights(self._layer)
        with torch.no_grad():
            noise_EH = router_noise(router, seed=(self._recorder.iteration << 16) + self._number)
            norms_EE = self._norms(proxy_tokens(router, noise_EH), experts)
        # Hooks on saved tensors (checkpoints that are not reentrant, offloading) have no business here.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            norms_EE.requires_grad_()
            loss = excess(norms_EE, self._recorder.config.erc_alpha)
            (gradient_EE,) = torch.autograd.grad(loss, norms_EE)
        self._recorder.record_loss("erc_loss", loss / self._num_shares, routing.counts)
        slope_EE = (gradient_EE / norms_EE.detach()).masked_fill(norms_EE.detach() == 0, 0.0)
        weight = partial(self._weight, self._group_count(micro_batch, routing))
        return add_weight_gradients(
            y, [router, *experts], partial(self._gradients, noise_EH, self._of_local_experts(slope_EE), weight)
        )

    def _norms(self, proxies_EH: Tensor, experts: list[Tensor]) -> Tensor:
        gates = [gate_rows(self._layer, weight).flatten(0, -2) for weight in experts]
        norms_EL = proxy_norms(proxies_EH, gates, total=partial(summed, group=column_group(self._dispatcher)))
        return gathered(norms_EL.T.contiguous(), self._dispatcher.ep_group).T

    def _of_local_experts(self, x_EE: Tensor) -> Tensor:
        return x_EE.unflatten(1, (self._dispatcher.ep_group.size(), -1))[:, self._dispatcher.ep_group.rank()]

    def _group_count(self, micro_batch: MicroBatch, routing: LayerRouting) -> Tensor:
        """What the micro-batches of the expert group's ranks count for together: tokens, or one where there are any.

        Ranks may hold different numbers of tokens. One all-reduce of one number, for the first layer that asks.
        """
        if micro_batch.expert_group_count is None:
            own = routing.num_tokens if self._layer.config.calculate_per_token_loss else routing.counts
            own = torch.as_tensor(own, dtype=torch.float32, device=self._router.weight.device)
            micro_batch.expert_group_count = summed(own, expert_group(self._dispatcher))
        return micro_batch.expert_group_count

    def _weight(self, group_count: Tensor):
        factor = weight_gradient_factor(self._layer.config, group_count, self._num_shares)
        return self._recorder.config.erc_loss_coeff * factor

    def _gradients(self, noise_EH: Tensor, slope_EL: Tensor, weight: Callable) -> list:
        """Of the router's and of each local expert's weight, in closed form.

        With a = R_i * d_i: dM_ij/dW_j = (W_j a) a^T / M_ij and dM_ij/da = W_j^T (W_j a) / M_ij.
        """
        router, experts = self._router.weight, expert_first_weights(self._layer)
        slope_EL = slope_EL * weight()
        proxies_EH = proxy_tokens(router.detach(), noise_EH)
        proxies_gradient_EH = torch.zeros_like(proxies_EH)
        gradients = []
        for slope_E, expert in zip(slope_EL.unbind(dim=1), experts):
            gate_FH = gate_rows(self._layer, expert.detach()).flatten(0, -2).to(proxies_EH.dtype)
            response_EF = proxies_EH @ gate_FH.T * slope_E.unsqueeze(-1)
            proxies_gradient_EH += response_EF @ gate_FH
            gradients.append(self._expert_gradient(expert, response_EF.T @ proxies_EH))
        return [(proxies_gradient_EH * noise_EH).to(router.dtype), *gradients]

    def _expert_gradient(self, expert: Tensor, gradient_FH: Tensor):
        """Gradient of the whole weight; None where it has been added to where the linear layer adds its own."""
        fused = adds_to_main_gradient(self._layer.config) and hasattr(expert, "main_grad")
        whole = expert.main_grad if fused else torch.zeros_like(expert)
        rows = gate_rows(self._layer, whole)
        rows += gradient_FH.view(rows.shape)
        return None if fused else whole


def _tap_outputs(tap: WeightTap, module: nn.Module, args, outputs):
    """Forward hook of the experts, which return their outputs and a bias."""
    y, *others = outputs
    return (tap.attach_to(y), *others)
