"""Runs of a layer's experts whose rows are read: one that the router has announced, one that goes on, and its backward.

Suffixes: T tokens, E experts, L local experts, K experts per token, P rows, D components of a row, H hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor

from megatron_moe_spec.integration.hooks.routing import TokenCount
from megatron_moe_spec.integration.hooks.scaling import gradient_weight
from megatron_moe_spec.integration.taps.base import TokensPerExpert
from megatron_moe_spec.parallel.row_exchange import Pending
from megatron_moe_spec.parallel.token_rows import ComparedRows, KeptRows, LocatedRows, UsedTokens, Weight


@dataclass
class RowsBackward:
    """What the nodes of a run need until backward; they hold it, and nothing else of the run.

    Attributes:
        transformer_config: of the layer.
        tokens: which of this rank's tokens are used: one of every ``stride``.
        count: of the tokens of the micro-batch.
        rows: of the tokens that are used; once the losses are evaluated.
        per_square: coefficient of a token's squared cosines in the losses; see ``RowsLoss.squares_divisor``.
        saved: give, in backward, each part of the rows; see ``kept_by``.
        experts_TK: numbers of the experts of this rank's tokens; None where no loss asks for lengths.
        grad_probs_TK: gradient of p of this rank's tokens; likewise, once the losses are evaluated.
    """

    transformer_config: Any
    tokens: slice
    stride: int
    count: TokenCount
    rows: Optional[KeptRows] = None
    per_square: float = 1.0
    saved: list[Callable[[], Tensor]] = field(default_factory=list)
    experts_TK: Optional[Tensor] = None
    grad_probs_TK: Optional[Tensor] = None
    _gradients: list[Optional[Tensor]] = field(default_factory=list)

    def _evaluated(self) -> KeptRows:
        assert self.rows is not None  # in backward
        return self.rows

    def weight(self) -> Weight:
        """Makes a sum over the used tokens a mean over all, as this rank's gradient has to count."""
        factor = self.per_square * self.stride / self.count.divisor
        return gradient_weight(self.transformer_config, factor, self.count.total)

    def add_gradient(self, part: int, incoming: Tensor) -> Tensor:
        """incoming + that of one part of the rows; the first that asks has those of all parts computed."""
        kept = self._evaluated()
        if kept.exchange is None and len(self.saved) == 1:
            (rows,), self.saved = self.saved, []
            return kept.add_gradient(rows(), self.weight(), incoming)
        if not self._gradients:
            self._gradients = list(kept.gradients([rows() for rows in self.saved], self.weight()))
            self.saved = []
        gradient, self._gradients[part] = self._gradients[part], None
        return incoming + gradient

    def swiglu_gradient(self, y_PU: Tensor, probs: Tensor, incoming: Tensor) -> tuple[Tensor, Tensor]:
        return self._evaluated().swiglu_gradient(y_PU, probs, self.weight(), incoming)

    def add_probs_gradient(self, incoming: Tensor) -> Tensor:
        assert self.experts_TK is not None and self.grad_probs_TK is not None
        weight, factor = self.weight()
        gradient_TK, self.grad_probs_TK = self.grad_probs_TK * (weight * factor), None
        gradient_TE = torch.zeros(incoming.shape, dtype=gradient_TK.dtype, device=incoming.device)
        gradient_TE[self.tokens].scatter_add_(1, self.experts_TK, gradient_TK)
        return incoming + gradient_TE.to(incoming.dtype)


@dataclass
class AnnouncedRun:
    """The router has decided; the experts have not begun.

    Attributes:
        used: the tokens whose vectors are compared.
        note: see ``Notes.add``, of the micro-batch.
        routing_map_TE: bool, by which this rank's tokens go to experts, as the router has it.
        probs_TK: p of each vector, 1 where there is none; None where no loss asks for lengths.
        sent_TH: the tokens that the dispatcher is given, where a library takes them to the experts.
    """

    used: UsedTokens
    backward: RowsBackward
    note: Callable
    routing_map_TE: Tensor
    probs_TK: Optional[Tensor] = None
    sent_TH: Optional[Tensor] = None


@dataclass
class ExpertsRun:
    """The experts hand in their rows.

    Attributes:
        num_rows: that the dispatcher has handed to the local experts.
        tokens_per_expert: how many of these are each local expert's.
        parts: of the rows, in the experts' order; until they are compared.
        handed_in: of each part, how many rows are each local expert's, padded where Megatron pads them.
        coming: the rows, once all parts are there.
        backward, note, probs_TK: see ``AnnouncedRun``.
    """

    rows: LocatedRows
    num_rows: int
    tokens_per_expert: TokensPerExpert
    backward: RowsBackward
    note: Callable
    probs_TK: Optional[Tensor]
    parts: list[Tensor] = field(default_factory=list)
    handed_in: list[TokensPerExpert] = field(default_factory=list)
    coming: Optional[Pending[ComparedRows]] = None
