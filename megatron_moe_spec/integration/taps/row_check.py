"""Check that the experts' rows are where the tokens' rows are looked for. Suffixes as in ``expert_rows``; B bytes."""

from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_moe_spec.integration.compat.dispatch import is_flex
from megatron_moe_spec.integration.hooks.replacement import Hook, MethodReplacement
from megatron_moe_spec.integration.support.rules_of_losses import DISORDERED
from megatron_moe_spec.integration.taps.base import TappedLayer
from megatron_moe_spec.parallel.row_exchange import RowExchange
from megatron_moe_spec.parallel.row_indices import expert_rows, first_rows


class RowCheck:
    """In the first micro-batch, and again in the first after weights were loaded: an error instead of a wrong gradient.

    The order in which the flex dispatcher's libraries hand rows over is theirs to choose: what the experts get is
    brought home and has to equal, bit by bit, the tokens that were sent. One exchange of the rows and one all-reduce of
    a number, when one rank or more ask for it: weights may be loaded on one alone. Other dispatchers are Megatron's
    own: their numbers of rows have to be those of the dispatched map, where no exchange needs them to be.
    """

    def __init__(self, layer: TappedLayer, sent: Callable[[Tensor], None]):
        """``sent`` takes the tokens that a library is given."""
        self._layer, self._sent = layer, sent
        self._hook = layer.module.register_load_state_dict_post_hook(Hook(self._loaded))
        self._methods = []
        if is_flex(layer.dispatcher):
            self._methods = [MethodReplacement(layer.dispatcher, "token_dispatch", self._dispatch)]
        self.is_due = True

    def detach(self) -> None:
        self._hook.remove()
        for method in self._methods:
            method.restore()

    def _dispatch(self, dispatch: Callable, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stands in for ``MoEFlexTokenDispatcher.token_dispatch(hidden_states, probs, ...)``."""
        self._sent(hidden_states)
        return dispatch(hidden_states, *args, **kwargs)

    def _loaded(self, module: nn.Module, incompatible_keys: Any) -> None:
        self.is_due = True

    def check(
        self,
        inputs_PH: Tensor,
        sent_TH: Optional[Tensor],  # the tokens, if a library was given any
        dispatched_TE: Tensor,
        counts_L: list[int],  # rows that each local expert is given
        exchange: Optional[RowExchange],
    ) -> None:
        """Raises if the experts are given other rows; if the exchange was asked for it, on all of its ranks."""
        if not self._methods:
            right = exchange is not None or dispatched_TE.sum(dim=0).tolist() == counts_L
        else:
            right = _come_home(inputs_PH, sent_TH, dispatched_TE, counts_L, exchange)
        if exchange is not None and exchange.asked:
            everywhere = torch.tensor(right, dtype=torch.int32, device=inputs_PH.device)
            dist.all_reduce(everywhere, op=dist.ReduceOp.MIN, group=self._layer.dispatcher.ep_group)
            right = bool(everywhere)
        if not right:
            raise RuntimeError(DISORDERED.text(self._layer))
        self.is_due = False


def _come_home(
    inputs_PH: Tensor, sent_TH: Optional[Tensor], own_TE: Tensor, counts_L: list[int], exchange: Optional[RowExchange]
) -> bool:
    """Whether the experts' rows are, bit by bit, those of the tokens they are looked for by."""
    inputs_PB = _as_bytes(inputs_PH)  # which travel as they are
    if exchange is not None:
        home_PB = exchange.in_blocks(counts_L, counts_L, own_TE.device).to_tokens(inputs_PB)
    elif all(count <= block for count, block in zip(own_TE.sum(dim=0).tolist(), counts_L, strict=True)):
        home_PB = inputs_PB[expert_rows(own_TE, first_rows(counts_L, own_TE.device)).T[own_TE.T]]
    else:
        return False
    if sent_TH is None or sent_TH.dtype != inputs_PH.dtype:
        return False
    return torch.equal(home_PB, _as_bytes(sent_TH)[own_TE.T.nonzero()[:, 1]])


def _as_bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)
