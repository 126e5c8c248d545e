"""Check that the experts' rows are where the tokens' rows are looked for.

Suffixes: T tokens of this rank, E experts, L local experts, P rows, H hidden size.
"""

from functools import partial
from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe_spec.integration.compat.dispatch import dispatched_map, hands_over_tokens, row_exchange
from megatron_moe_spec.integration.compat.groups import column_group
from megatron_moe_spec.integration.compat.remedies import with_alltoall
from megatron_moe_spec.integration.hooks import Hook, MethodReplacement
from megatron_moe_spec.integration.taps.base import TappedLayer
from megatron_moe_spec.parallel.collectives import all_gather
from megatron_moe_spec.parallel.positions import expert_rows, first_rows


class RowCheck:
    """In the first micro-batch, and again in the first after weights were loaded: an error instead of a wrong gradient.

    The order in which the flex dispatcher's libraries hand rows over is theirs to choose: what the experts get is
    brought home and has to equal, bit by bit, the tokens that were sent. Other dispatchers are Megatron's own: their
    numbers of rows have to be those of the dispatched map. One exchange of the rows, and one all-reduce of a number.
    """

    def __init__(self, layer: TappedLayer):
        self._layer = layer
        self._due = True
        self._tokens_TH: Optional[Tensor] = None
        self._hook = layer.module.register_load_state_dict_post_hook(Hook(self._loaded))
        self._method = None
        if hands_over_tokens(layer.dispatcher):
            self._method = MethodReplacement(layer.dispatcher, "token_dispatch", partial(_token_dispatch, self))

    def detach(self) -> None:
        self._hook.remove()
        if self._method is not None:
            self._method.restore()

    def _loaded(self, module, incompatible_keys) -> None:
        self._due = True

    def sent(self, tokens_TH: Tensor) -> None:
        """Takes the tokens that the dispatcher is given."""
        if self._due:
            self._tokens_TH = tokens_TH.detach()

    @property
    def is_due(self) -> bool:
        """Whether ``received`` is to be called."""
        return self._due

    def received(self, inputs_PH: Tensor, routing_map_TE: Tensor, counts_L: list[int]) -> None:
        """Checks what the experts are given.

        Raises:
            RuntimeError: on every rank of the expert-parallel group.
        """
        with torch.no_grad():
            right = torch.tensor(self._right(inputs_PH.detach(), routing_map_TE, counts_L), dtype=torch.int32)
            right = right.to(inputs_PH.device)
            dist.all_reduce(right, op=dist.ReduceOp.MIN, group=self._layer.dispatcher.ep_group)
        if not right:
            transformer_config, layer = self._layer.transformer_config, self._layer.global_index
            kind = transformer_config.moe_token_dispatcher_type
            remedy = f"{with_alltoall(transformer_config)}, or " if kind == "flex" else ""
            raise RuntimeError(
                f"MoE layer {layer}: the rows that the {kind} dispatcher hands to the experts do not lie as expected, "
                f"and cannot be told apart by token ({remedy}set the coefficients of the losses of rows to 0)"
            )
        self._due, self._tokens_TH = False, None

    def _right(self, inputs_PH: Tensor, routing_map_TE: Tensor, counts_L: list[int]) -> bool:
        dispatcher = self._layer.dispatcher
        own_TE = dispatched_map(dispatcher, routing_map_TE)
        if self._method is None and dispatcher.ep_size > 1:
            return True  # the counts are those of the exchange, which has to fit
        if self._method is None:
            return all_gather(own_TE, column_group(dispatcher)).sum(dim=0).tolist() == counts_L
        if self._tokens_TH is None:
            return False
        exchange = row_exchange(dispatcher, own_TE, len(inputs_PH))
        if exchange is not None:
            exchange = exchange.in_blocks(counts_L, counts_L, own_TE.device)
            home_PH = exchange.to_tokens(inputs_PH)
        elif all(count <= block for count, block in zip(own_TE.sum(dim=0).tolist(), counts_L, strict=True)):
            home_PH = inputs_PH[expert_rows(own_TE, first_rows(counts_L, own_TE.device)).T[own_TE.T]]
        else:
            return False
        return _same_bits(home_PH, self._tokens_TH[own_TE.T.nonzero()[:, 1]])


def _same_bits(x: Tensor, other: Tensor) -> bool:
    return x.dtype == other.dtype and torch.equal(
        x.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


def _token_dispatch(check: RowCheck, dispatch, hidden_states: Tensor, *args, **kwargs):
    """Stands in for ``MoEFlexTokenDispatcher.token_dispatch(hidden_states, probs, ...)``."""
    check.sent(hidden_states)
    return dispatch(hidden_states, *args, **kwargs)
