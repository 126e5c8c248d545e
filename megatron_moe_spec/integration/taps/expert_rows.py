"""Base class of the taps of the rows that experts compute.

Rows lie permuted by expert, and may belong to the tokens of other ranks. They are weighted by the router's probability
p: Megatron multiplies what enters the down projection, and its bias, by it. Suffixes: T tokens, E experts, L local
experts, K experts per token, P rows, D components of a row, H hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Optional

import torch
from torch import Tensor, nn

from megatron_moe_spec.integration.compat.dispatch import dispatched_map, is_flex, on_host, row_exchange
from megatron_moe_spec.integration.compat.groups import etp_group
from megatron_moe_spec.integration.compat.protocols import TransformerConfig
from megatron_moe_spec.integration.hooks.injection import add_gradient, kept_by, separate_graph
from megatron_moe_spec.integration.hooks.routing import TokenCount
from megatron_moe_spec.integration.hooks.scaling import gradient_weight
from megatron_moe_spec.integration.taps.base import RouterCall, Tap, TappedLayer, TokensPerExpert
from megatron_moe_spec.integration.taps.row_check import RowCheck
from megatron_moe_spec.kernels import choose
from megatron_moe_spec.losses import RowsLoss
from megatron_moe_spec.losses.base import one_per_token
from megatron_moe_spec.losses.vectors import mixing_of
from megatron_moe_spec.parallel.collectives import all_gather
from megatron_moe_spec.parallel.row_exchange import Pending
from megatron_moe_spec.parallel.token_rows import ComparedRows, KeptRows, LocatedRows, UsedTokens, Weight

_ALL = slice(0, None, 1)
_INCOMPLETE = "the experts have ended before all of them handed in their rows"


@dataclass
class RowsBackward:
    """What the nodes of a run need until backward; they hold it, and nothing else of the run."""

    transformer_config: TransformerConfig
    tokens: slice  # of this rank, that are used: one of every ``stride``
    stride: int
    count: TokenCount  # of the micro-batch
    rows: Optional[KeptRows] = None  # of the tokens that are used; once the losses are evaluated
    per_square: float = 1.0  # coefficient of a token's squared cosines in the losses; see ``RowsLoss.squares_divisor``
    saved: list[Callable[[], Tensor]] = field(default_factory=list)  # give, in backward, each part; see ``kept_by``
    experts_TK: Optional[Tensor] = None  # numbers of this rank's tokens' experts; None where no loss asks for lengths
    grad_probs_TK: Optional[Tensor] = None  # gradient of p; likewise, once the losses are evaluated
    _gradients: list[Optional[Tensor]] = field(default_factory=list)

    def weight(self) -> Weight:
        """Makes a sum over the used tokens a mean over all, as this rank's gradient has to count."""
        return gradient_weight(self.transformer_config, self.per_square * self.stride, self.count)

    def add_gradient(self, part: int, incoming: Tensor) -> Tensor:
        """incoming + that of one part of the rows; the first that asks has those of all parts computed."""
        assert self.rows is not None, _INCOMPLETE
        if self.rows.exchange is None and len(self.saved) == 1:
            (rows,), self.saved = self.saved, []
            return self.rows.add_gradient(rows(), self.weight(), incoming)
        if not self._gradients:
            self._gradients = list(self.rows.gradients([rows() for rows in self.saved], self.weight()))
            self.saved = []
        gradient, self._gradients[part] = self._gradients[part], None
        return incoming + gradient

    def swiglu_gradient(
        self, y_PU: Tensor, probs: Tensor, rows: Optional[Tensor], incoming: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert self.rows is not None, _INCOMPLETE
        return self.rows.swiglu_gradient(y_PU, probs, rows, self.weight(), incoming)

    def add_probs_gradient(self, incoming: Tensor) -> Tensor:
        assert self.experts_TK is not None and self.grad_probs_TK is not None
        weight, factor = self.weight()
        gradient_TK, self.grad_probs_TK = self.grad_probs_TK * (weight * factor), None
        gradient_TE = torch.zeros(incoming.shape, dtype=gradient_TK.dtype, device=incoming.device)
        gradient_TE[self.tokens].scatter_add_(1, self.experts_TK, gradient_TK)
        return incoming + gradient_TE.to(incoming.dtype)


@dataclass
class RowsRun:
    """One run of the experts: the router has announced it; then they begin, hand in their rows, and end."""

    used: UsedTokens  # whose vectors are compared
    backward: RowsBackward
    note: Callable  # ``Notes.add`` of the micro-batch
    routing_map_TE: Tensor  # bool, by which this rank's tokens go to experts, as the router has it
    probs_TK: Optional[Tensor] = None  # p of each vector, 1 where there is none; None where no loss asks for lengths
    sent_TH: Optional[Tensor] = None  # that a library of the dispatcher takes to the experts; until these begin
    # Once the experts have begun:
    rows: Optional[LocatedRows] = None
    num_rows: int = 0  # that the dispatcher has handed to the local experts
    tokens_per_expert: TokensPerExpert = ()  # how many of these are each local expert's
    parts: list[Tensor] = field(default_factory=list)  # of the rows, in the experts' order; until they are compared
    # Of each part, how many rows are each local expert's, padded where Megatron pads them.
    handed_in: list[TokensPerExpert] = field(default_factory=list)
    coming: Optional[Pending[ComparedRows]] = None  # once all parts are there


class RowsTap(Tap[RowsLoss]):
    """Compares the vectors of each token, differentiates the losses of their angles and lengths, and adds the gradient.

    The vectors are the rows without p: lengths are divided by it. What a loss says of lengths would reach p by way of
    the rows; p gets the opposite, so that nothing of these losses reaches the router.

    What each rank keeps for backward are the rows, as autograd keeps its own tensors, and ``RowsBackward``.
    """

    def __init__(self, losses: Sequence[RowsLoss], layer: TappedLayer, projections: Sequence[nn.Module] = ()):
        """The rows are handed in by ``projections``, of which each has a part of them; or by none."""
        super().__init__(losses, layer)
        self._projections, self._num_parts = projections, max(1, len(projections))
        self._stride, self._a2a_dtype = losses[0].token_stride, losses[0].a2a_dtype
        self._run: Optional[RowsRun] = None
        self._is_flex = is_flex(layer.dispatcher)
        self._check = RowCheck(layer, self._note_sent)
        self.last_hooks = list(map(self.hook_activations, range(len(projections)), projections))
        if not projections or layer.dispatcher.ep_size > 1:
            self.last_hooks.append(self.hook_outputs())
        self.hooks = [self.hook_inputs(), *self.last_hooks]

    def forget(self) -> None:
        self._run = None

    def tap_probs(self, probs: Tensor, call: RouterCall) -> Tensor:
        computed = self.computed_losses()
        if not computed:
            return probs
        transformer_config, group = self.layer.transformer_config, etp_group(self.layer.dispatcher)
        stride, tokens = 1, _ALL
        if self._stride > 1:  # of fewer tokens than the stride, one is used
            stride = max(1, min(self._stride, call.routing.active_TE.shape[0]))
            tokens = slice((self.layer.clock.step + call.micro_batch.index) % stride, None, self._stride)
        fused = choose(self.layer.config.kernels, probs.device)
        used = UsedTokens.gather(call.routing.active_TE, transformer_config.moe_router_topk, tokens, group, fused)
        backward = RowsBackward(transformer_config, tokens, stride, call.routing.tokens)
        self._run = RowsRun(used, backward, call.micro_batch.notes.add, call.routing_map_TE)
        if not any([loss.uses_lengths for loss in computed]):
            return probs
        experts_TK, active_TK = used.experts()
        backward.experts_TK, active_TK = experts_TK[used.own], active_TK[used.own]
        probs_TK = call.probs_TE.detach()[tokens].gather(1, backward.experts_TK).masked_fill(~active_TK, 1.0)
        self._run.probs_TK = all_gather(probs_TK, group)
        return add_gradient(probs, backward.add_probs_gradient) if self.trained else probs

    def _note_sent(self, tokens_TH: Tensor) -> None:
        if self._run is not None:
            self._run.sent_TH = tokens_TH.detach()

    def tap_inputs(self, inputs_PH: Tensor, tokens_per_expert: TokensPerExpert) -> Tensor:
        run = self._run
        # Where none is announced, nothing may come to the host: inference may be captured in a CUDA graph.
        if run is None or run.rows is not None:
            return inputs_PH
        run.num_rows, run.tokens_per_expert, dispatcher = inputs_PH.shape[0], tokens_per_expert, self.layer.dispatcher
        dispatched_TE = all_gather(dispatched_map(dispatcher, run.routing_map_TE), etp_group(dispatcher))
        asks, fused = self._check.is_due, run.used.fused
        exchange = row_exchange(dispatcher, dispatched_TE, run.num_rows, self._a2a_dtype, asks, fused)
        if self._check.is_due or (exchange is not None and exchange.asked):
            counts_L = on_host(tokens_per_expert)
            self._check.check(inputs_PH.detach(), run.sent_TH, dispatched_TE, counts_L, exchange)
        run.rows, run.sent_TH = run.used.locate(dispatched_TE, exchange), None
        return inputs_PH

    def _take(self, part: int, rows_PD: Tensor, tokens_per_expert: Optional[TokensPerExpert]) -> Tensor:
        """Takes part of the rows, ``tokens_per_expert`` of them (None: as were given); returns what to go on with."""
        run = self._run
        if run is None or run.rows is None:
            return rows_PD
        kept_PD = self._kept(rows_PD)
        run.parts.append(kept_PD.detach())
        if tokens_per_expert is not None:
            run.handed_in.append(tokens_per_expert)
        if len(run.parts) == self._num_parts:
            run.coming, run.parts = self._begin(run, run.rows), []
            if not run.rows.travel:
                self._finish()
        return self._with_gradient(run, part, rows_PD, kept_PD) if self.trained else rows_PD

    def tap_outputs(self, outputs_PH: Tensor) -> Tensor:
        self._finish()  # nothing of the experts is left for the exchange to run beside
        return outputs_PH

    def _finish(self) -> None:
        run, self._run = self._run, None
        if run is not None and run.rows is not None:
            assert run.coming is not None, _INCOMPLETE
            self._evaluate(run, run.coming.wait())

    def _with_gradient(self, run: RowsRun, part: int, rows_PD: Tensor, kept_PD: Tensor) -> Tensor:
        rows_PD = add_gradient(rows_PD, partial(run.backward.add_gradient, part), [kept_PD])
        run.backward.saved.append(kept_by(rows_PD, kept_PD))
        return rows_PD

    def _kept(self, rows_PD: Tensor) -> Tensor:
        """What is compared, and kept until backward."""
        return rows_PD

    def _begin(self, run: RowsRun, rows: LocatedRows) -> Pending[ComparedRows]:
        if sum([part.shape[0] for part in run.parts]) == run.num_rows and not self._is_flex:
            return rows.begin(run.parts, (), None)
        # Numbers that may be on the device come to the host only here.
        counts_L = on_host(run.tokens_per_expert)
        blocks_L = [number for part in run.handed_in for number in on_host(part)] or counts_L
        if any(block < count for count, block in zip(counts_L, blocks_L, strict=True)):
            raise RuntimeError(
                f"the experts of MoE layer {self.layer.moe_layer_index} ran on {blocks_L} rows each, of "
                f"{counts_L} that the dispatcher had handed to them: these cannot be told apart by token"
            )
        return rows.begin(run.parts, counts_L, blocks_L)

    def _evaluate(self, run: RowsRun, rows: ComparedRows) -> None:
        """Records the losses, and leaves what backward needs of them."""
        computed, layer, backward = self.computed_losses(), self.layer.moe_layer_index, run.backward
        if self.layer.clock.measuring and any(loss.measured for loss in self.losses):
            own_TKK, active_TK = rows.cosines_TKK[rows.own], rows.active_TK[rows.own]
            self.layer.diagnostics.measure_cosines(layer, own_TKK, active_TK, when=run.note)
        divided = [(loss, divisor) for loss in computed if (divisor := loss.squares_divisor(rows.rows_TK.shape[1]))]
        if len(divided) < len(computed) or run.probs_TK is not None:
            self._differentiate(run, rows, computed)
            return
        # The gradient of squares is known: no small operation is launched for it.
        for loss, divisor in divided:
            what = loss.name, layer, rows.squares, backward.count, backward.stride / divisor
            run.note(self.layer.losses.record_mean, *what)
        if self.trained:
            backward.rows = rows.keep_squares()
            backward.per_square = sum([loss.coeff / divisor for loss, divisor in divided])

    def _differentiate(self, run: RowsRun, rows: ComparedRows, computed: Sequence[RowsLoss]) -> None:
        layer, backward = self.layer.moe_layer_index, run.backward
        cosines_TKK, lengths_TK, active_TK = rows.cosines_TKK, rows.lengths_TK, rows.active_TK
        if run.probs_TK is not None:
            lengths_TK = lengths_TK / run.probs_TK.to(lengths_TK.dtype)
        has_some_T = active_TK.any(dim=1)
        total = cosines_TKK.new_zeros(())
        with separate_graph():
            variables = cosines_TKK.requires_grad_(), lengths_TK.requires_grad_()
            for loss in computed:
                losses_T = loss.token_losses(cosines_TKK, lengths_TK if loss.uses_lengths else None, active_TK)
                losses_T = torch.where(has_some_T, one_per_token(loss, losses_T, len(active_TK)), 0.0)
                what = loss.name, layer, losses_T[rows.own].detach(), backward.count, backward.stride
                run.note(self.layer.losses.record_mean, *what)
                if loss.is_trained:
                    total = total + loss.coeff * losses_T.sum()
            if not self.trained:
                return
            gradients = torch.autograd.grad(total, variables, allow_unused=True, materialize_grads=True)
        grad_cosines_TKK, grad_lengths_TK = gradients
        cosines_TKK, lengths_TK = cosines_TKK.detach(), lengths_TK.detach()
        backward.rows = rows.keep(mixing_of(cosines_TKK, lengths_TK, grad_cosines_TKK, grad_lengths_TK))
        if run.probs_TK is not None:
            grad_probs_TK = -grad_lengths_TK * lengths_TK / run.probs_TK.to(lengths_TK.dtype)
            backward.grad_probs_TK = grad_probs_TK[rows.own]

    def detach(self) -> None:
        self._check.detach()
        super().detach()
