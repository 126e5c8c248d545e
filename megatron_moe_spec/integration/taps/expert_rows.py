"""Taps of the rows that experts compute: their activations z before, and their outputs y after, the down projection.

Rows lie permuted by expert, and may belong to the tokens of other ranks. Both are weighted by the router's probability
p: Megatron multiplies what enters the down projection, and its bias, by it. Suffixes: T tokens, E experts, K experts
per token, P rows, D components of a row.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megatron_moe_spec.integration.compat.dispatch import (
    dispatched_map,
    is_flex,
    row_exchange,
)
from megatron_moe_spec.integration.compat.experts import (
    expert_down_projections,
    frees_expert_outputs,
    weighted_swiglu_inputs,
)
from megatron_moe_spec.integration.compat.groups import etp_group
from megatron_moe_spec.integration.hooks.injection import add_gradient, kept_by, replace_swiglu, separate_graph
from megatron_moe_spec.integration.hooks.replacement import Hook, keep_last
from megatron_moe_spec.integration.hooks.routing import LayerRouting
from megatron_moe_spec.integration.hooks.scaling import gradient_weight
from megatron_moe_spec.integration.taps.base import RouterCall, Tap, TappedLayer
from megatron_moe_spec.integration.taps.row_check import RowCheck
from megatron_moe_spec.kernels import choose
from megatron_moe_spec.losses import RowsLoss
from megatron_moe_spec.losses.base import one_per_token
from megatron_moe_spec.losses.vectors import mixing_of
from megatron_moe_spec.parallel.collectives import all_gather
from megatron_moe_spec.parallel.token_rows import TokenRows


@dataclass
class _Run:
    """One run of the experts that the router has announced.

    Attributes:
        rows: of the tokens that are used.
        note: see ``Notes.add``, of its micro-batch.
        tokens: which of this rank's they are: one of every ``stride``.
        routing: the router's decision.
        routing_map_TE: bool, by which this rank's tokens go to experts, as the router has it; until they have run.
        sent_TH: see ``_note_sent``; until the experts begin to run.
        num_rows: that the dispatcher has handed to the local experts; known when they begin to run.
        tokens_per_expert: how many of these are each local expert's; likewise.
        handed_in: of each part of the rows, how many are each local expert's, padded where Megatron pads them.
        experts_TK: numbers of the experts of this rank's tokens; None where no loss asks for lengths.
        probs_TK: p of each vector, 1 where there is none; None likewise.
        probs_gradients: with respect to p of this rank's tokens; one, once the experts have run.
        per_square: coefficient of a token's squared cosines in the losses; see ``RowsLoss.of_squares``.
    """

    rows: TokenRows
    note: Callable
    tokens: slice
    stride: int
    routing: LayerRouting
    routing_map_TE: Tensor
    sent_TH: Optional[Tensor] = None
    num_rows: int = 0
    tokens_per_expert: Union[Tensor, Sequence[int]] = ()
    handed_in: list[Union[Tensor, Sequence[int]]] = field(default_factory=list)
    experts_TK: Optional[Tensor] = None
    probs_TK: Optional[Tensor] = None
    probs_gradients: list[Tensor] = field(default_factory=list)
    per_square: float = 1.0

    @property
    def counts_L(self) -> list[int]:
        """``tokens_per_expert`` on the host."""
        return _numbers(self.tokens_per_expert)


class RowsTap(Tap[RowsLoss]):
    """Compares the vectors of each token, differentiates the losses of their angles and lengths, and adds the gradient.

    The vectors are the rows without p: lengths are divided by it. What a loss says of lengths would reach p by way of
    the rows; p gets the opposite, so that nothing of these losses reaches the router.

    What each rank keeps for backward are the rows, as autograd keeps its own tensors, and what ``TokenRows`` says.
    """

    _num_parts = 1
    _is_last = True  # whether nothing of the experts runs after they have handed in their rows

    def __init__(self, losses: Sequence[RowsLoss], layer: TappedLayer):
        super().__init__(losses, layer)
        self._stride, self._a2a_dtype = losses[0].token_stride, losses[0].a2a_dtype
        self._run: Optional[_Run] = None
        self._check = RowCheck(layer, self._note_sent)
        experts = layer.module.experts
        self._rows_hooks = self._register()
        self._hooks = [experts.register_forward_pre_hook(Hook(partial(_tap_inputs, self))), *self._rows_hooks]

    def _register(self) -> list[RemovableHandle]:
        """Hooks what hands in the rows; returns it."""
        raise NotImplementedError

    def detach(self) -> None:
        self._check.detach()
        for hook in self._hooks:
            hook.remove()

    def forget(self) -> None:
        self._run = None

    def begin_first_forward(self) -> None:
        for hook in self._rows_hooks:
            keep_last(hook)

    def tap_probs(self, probs: Tensor, call: RouterCall) -> Tensor:
        computed = self.computed_losses()
        if not computed:
            return probs
        dispatcher = self.layer.dispatcher
        # Of fewer tokens than the stride, one is used.
        stride = max(1, min(self._stride, len(call.routing.active_TE)))
        tokens = slice((self.layer.clock.step + call.micro_batch.index) % stride, None, self._stride)
        rows = TokenRows(
            call.routing.active_TE,
            self.layer.transformer_config.moe_router_topk,
            tokens,
            self._num_parts,
            etp_group(dispatcher),
            choose(self.layer.config.kernels, probs.device),
        )
        self._run = run = _Run(rows, call.micro_batch.notes.add, tokens, stride, call.routing, call.routing_map_TE)
        if not any(loss.uses_lengths for loss in computed):
            return probs
        experts_TK, active_TK = rows.experts()
        run.experts_TK, active_TK = experts_TK[rows.own], active_TK[rows.own]
        probs_TK = call.probs_TE[tokens].gather(1, run.experts_TK).masked_fill(~active_TK, 1.0)
        run.probs_TK = all_gather(probs_TK, etp_group(dispatcher))
        return add_gradient(probs, partial(self._add_probs_gradient, run)) if self.trained else probs

    def _note_sent(self, tokens_TH: Tensor) -> None:
        """Takes the tokens that the dispatcher is given, where a library takes them to the experts."""
        if self._run is not None:
            self._run.sent_TH = tokens_TH.detach()

    def tap_inputs(self, inputs_PH: Tensor, tokens_per_expert) -> None:
        """Takes note of what the experts are to run on."""
        run = self._run
        # Else nothing may come to the host: inference may be captured in a CUDA graph.
        if run is None:
            return
        dispatcher = self.layer.dispatcher
        run.num_rows, run.tokens_per_expert = len(inputs_PH), tokens_per_expert
        dispatched_TE = all_gather(dispatched_map(dispatcher, run.routing_map_TE), etp_group(dispatcher))
        exchange = row_exchange(dispatcher, dispatched_TE, run.num_rows, self._a2a_dtype, asks=self._check.is_due)
        if self._check.is_due or (exchange is not None and exchange.asked):
            self._check.check(inputs_PH.detach(), run.sent_TH, dispatched_TE, run.counts_L, exchange)
        run.rows.locate(dispatched_TE, exchange)
        run.sent_TH = None
        del run.routing_map_TE

    def tap_rows(self, part: int, rows_PD: Tensor, tokens_per_expert=None) -> Tensor:
        """Takes part of the layer's rows; returns what the model is to go on with instead.

        Args:
            tokens_per_expert: how many rows of each expert these are; None: as many as the experts were given.
        """
        run = self._run
        if run is None:
            return rows_PD
        kept_PD = self._kept(rows_PD)
        run.rows.add(kept_PD)
        if tokens_per_expert is not None:
            run.handed_in.append(tokens_per_expert)
        if run.rows.complete:
            self._begin(run, run.rows)
            if self._is_last or not run.rows.travel:
                self.tap_end()
        return self._with_gradient(run, part, rows_PD, kept_PD) if self.trained else rows_PD

    def tap_end(self) -> None:
        """The experts have run; by now their rows should be where their tokens are."""
        run, self._run = self._run, None
        if run is not None:
            run.rows.finish()
            self._evaluate(run)

    def _with_gradient(self, run: _Run, part: int, rows_PD: Tensor, kept_PD: Tensor) -> Tensor:
        rows_PD = add_gradient(rows_PD, partial(self._add_gradient, run, part), [kept_PD])
        run.rows.keep(kept_by(rows_PD, kept_PD))
        return rows_PD

    def _kept(self, rows_PD: Tensor) -> Tensor:
        """What is compared, and kept until backward."""
        return rows_PD

    def _begin(self, run: _Run, rows: TokenRows) -> None:
        if rows.num_rows == run.num_rows and not is_flex(self.layer.dispatcher):
            rows.begin((), None)
            return
        # Numbers that may be on the device come to the host only here.
        counts_L = run.counts_L
        blocks_L = [number for part in run.handed_in for number in _numbers(part)] or counts_L
        if any(block < count for count, block in zip(counts_L, blocks_L, strict=True)):
            raise RuntimeError(
                f"the experts of MoE layer {self.layer.moe_layer_index} ran on {blocks_L} rows each, of "
                f"{counts_L} that the dispatcher had handed to them: these cannot be told apart by token"
            )
        rows.begin(counts_L, blocks_L)

    def _evaluate(self, run: _Run) -> None:
        """Records the losses, and leaves what backward needs of them."""
        rows, computed = run.rows, self.computed_losses()
        if self.layer.clock.measuring and any(loss.measured for loss in self.losses):
            what = self.layer.moe_layer_index, rows.cosines_TKK[rows.own], rows.active_TK[rows.own]
            self.layer.diagnostics.measure_cosines(*what, when=run.note)
        if all(loss.of_squares for loss in computed):
            self._evaluate_squares(run, computed)
        else:
            self._differentiate(run, computed)

    def _evaluate_squares(self, run: _Run, computed: Sequence[RowsLoss]) -> None:
        """Of losses whose gradient is known: no small operation is launched for it."""
        k = self.layer.transformer_config.moe_router_topk
        pairs = k * (k - 1)
        layer = self.layer.moe_layer_index
        for loss in computed:
            what = loss.name, layer, run.rows.squares, run.routing.tokens, run.stride / pairs
            run.note(self.layer.losses.record_mean, *what)
        if self.trained:
            run.rows.keep_squares()
            run.per_square = sum(loss.coeff for loss in self.trained) / pairs

    def _differentiate(self, run: _Run, computed: Sequence[RowsLoss]) -> None:
        rows, layer = run.rows, self.layer.moe_layer_index
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
                what = loss.name, layer, losses_T[rows.own].detach(), run.routing.tokens, run.stride
                run.note(self.layer.losses.record_mean, *what)
                if loss.is_trained:
                    total = total + loss.coeff * losses_T.sum()
            if not self.trained:
                return
            gradients = torch.autograd.grad(total, variables, allow_unused=True, materialize_grads=True)
        grad_cosines_TKK, grad_lengths_TK = gradients
        cosines_TKK, lengths_TK = cosines_TKK.detach(), lengths_TK.detach()
        rows.keep_mixing(mixing_of(cosines_TKK, lengths_TK, grad_cosines_TKK, grad_lengths_TK))
        if run.probs_TK is not None:
            grad_probs_TK = -grad_lengths_TK * lengths_TK / run.probs_TK.to(lengths_TK.dtype)
            run.probs_gradients.append(grad_probs_TK[rows.own])

    def _add_gradient(self, run: _Run, part: int, incoming: Tensor) -> Tensor:
        return run.rows.add_gradient(part, partial(self._weight, run), incoming)

    def _add_probs_gradient(self, run: _Run, incoming: Tensor) -> Tensor:
        weight, factor = self._weight(run)
        gradient_TK = run.probs_gradients.pop() * (weight * factor)
        gradient_TE = torch.zeros(incoming.shape, dtype=gradient_TK.dtype, device=incoming.device)
        gradient_TE[run.tokens].scatter_add_(1, run.experts_TK, gradient_TK)
        return incoming + gradient_TE.to(incoming.dtype)

    def _weight(self, run: _Run):
        """Makes a sum over the used tokens a mean over all, as this rank's gradient has to count; in backward."""
        factor = run.per_square * run.stride / run.routing.tokens.divisor
        return gradient_weight(self.layer.transformer_config, factor, run.routing.tokens.total)


class ActivationsTap(RowsTap):
    """p z, at the input of the down projections."""

    _is_last = False

    def _register(self) -> list[RemovableHandle]:
        self._projections = projections = expert_down_projections(self.layer.module)
        self._num_parts = len(projections)
        return [
            *(
                module.register_forward_pre_hook(Hook(partial(_tap_activations, self, part)))
                for part, module in enumerate(projections)
            ),
            self.layer.module.experts.register_forward_hook(Hook(partial(_tap_end, self))),
        ]

    def hooked(self) -> Iterator[tuple[str, Any, nn.Module]]:
        for found, hooked in zip(expert_down_projections(self.layer.module), self._projections):
            yield "linear_fc2", found, hooked

    def _with_gradient(self, run: _Run, part: int, rows_PD: Tensor, kept_PD: Tensor) -> Tensor:
        """Megatron's node of the SwiGLU gives way to one that adds the gradient on its way, where that is possible."""
        inputs = weighted_swiglu_inputs(rows_PD) if run.rows.goes_through_swiglu else None
        if inputs is None:
            return super()._with_gradient(run, part, rows_PD, kept_PD)
        return replace_swiglu(rows_PD, inputs, partial(self._swiglu_gradient, run))

    def _swiglu_gradient(self, run: _Run, y_PU: Tensor, probs: Tensor, incoming: Tensor) -> tuple[Tensor, Tensor]:
        return run.rows.swiglu_gradient(y_PU, probs, self._weight(run), incoming)


class OutputsTap(RowsTap):
    """y = p x, at the output of the experts."""

    def _register(self) -> list[RemovableHandle]:
        return [self.layer.module.experts.register_forward_hook(Hook(partial(_tap_outputs, self)))]

    def _kept(self, rows_PD: Tensor) -> Tensor:
        return rows_PD.detach().clone() if frees_expert_outputs(self.layer.transformer_config) else rows_PD


def _tap_inputs(tap: RowsTap, module: nn.Module, args) -> None:
    """Forward pre-hook of the experts, whose first inputs are the tokens in permuted rows, and their numbers."""
    tap.tap_inputs(args[0], args[1])


def _tap_activations(tap: ActivationsTap, part: int, module: nn.Module, args):
    """Forward pre-hook of ``linear_fc2``, whose first input is p * z, in permuted rows.

    The second is how many rows each expert has, padding included, where one module serves them all.
    """
    tokens_per_expert = args[1] if len(args) > 1 else [len(args[0])]
    return (tap.tap_rows(part, args[0], tokens_per_expert), *args[1:])


def _tap_end(tap: ActivationsTap, module: nn.Module, args, outputs) -> None:
    """Forward hook of the experts."""
    tap.tap_end()


def _tap_outputs(tap: OutputsTap, module: nn.Module, args, outputs):
    """Forward hook of the experts, which return (p * x, no bias); as many rows as came in."""
    return (tap.tap_rows(0, outputs[0]), *outputs[1:])


def _numbers(tokens_per_expert) -> list[int]:
    return tokens_per_expert.tolist() if isinstance(tokens_per_expert, Tensor) else list(map(int, tokens_per_expert))
