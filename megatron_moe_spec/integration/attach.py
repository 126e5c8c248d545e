"""Entry point: hooks the losses on a model."""

import logging
import warnings
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, Optional, Union

from torch import nn

from megatron_moe_spec.config import SpecConfig
from megatron_moe_spec.integration.compat.groups import model_ranks, tp_cp_group
from megatron_moe_spec.integration.compat.models import FoundLayers, model_config, moe_layers
from megatron_moe_spec.integration.compat.release import require_megatron
from megatron_moe_spec.integration.compat.schedules import follow_schedules
from megatron_moe_spec.integration.compat.settings import logs_each_layer
from megatron_moe_spec.integration.hooks.micro_batch import MicroBatchTracker
from megatron_moe_spec.integration.hooks.modes import lasting_tensors
from megatron_moe_spec.integration.pipeline.cross_stage import CrossStageCoupling
from megatron_moe_spec.integration.pipeline.stages import Stages
from megatron_moe_spec.integration.step.clock import Part, Steps
from megatron_moe_spec.integration.step.recorder import Recorder
from megatron_moe_spec.integration.step.tracer import Tracer
from megatron_moe_spec.integration.support.checks import check_supported
from megatron_moe_spec.integration.taps.layer import LayerTaps
from megatron_moe_spec.integration.taps.pairs import resolve_across_stages
from megatron_moe_spec.parallel.collectives import current_device, together

logger = logging.getLogger(__name__)
_attached: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()  # MoE layers


@lasting_tensors()
def attach(model: Union[nn.Module, Sequence[nn.Module]], config: SpecConfig, group=None) -> "SpecHandle":
    """Adds the auxiliary losses to the MoE layers that a Megatron-Core model's decoder runs.

    MTP layers, and the layers of other models that lie in this one (a teacher, an average of weights), are left out;
    ``handle.layers`` and ``handle.skipped`` tell which is which. The forward pass stays bitwise the same; no
    parameter, buffer or state-dict key is added. With all coefficients 0 and no metrics nothing is hooked.

    A collective over the ranks that hold the model: call it on every one of them, before the first forward. If one
    refuses, all do.

    Args:
        model: the module that is called for each micro-batch, or the list of all model chunks of this rank that
            Megatron's ``get_model`` returns; before or after the DDP wrap, with or without adapters. GPT, hybrid or any
            other model with MoELayers.
        config: which losses, how strongly: those of this package, and others in its ``extra_losses``.
        group: the ranks that hold the model, over which values are reduced to be logged; by default those of the
            model's own process groups.

    Returns:
        A handle that reads the losses' values and detaches the hooks.

    Raises:
        ImportError: megatron-core is missing or too old.
        ValueError: the model or its settings are not supported; the message names the flag to change.
        RuntimeError: the model has the losses already.
    """
    if not config.enabled:
        return SpecHandle(config, [], Stages([], [], 0), [])
    require_megatron()
    follow_schedules()
    chunks = list(model) if isinstance(model, (list, tuple, nn.ModuleList)) else [model]
    groups = [group] if group is not None else model_ranks(chunks[0])
    found, transformer_config = together(partial(_find, chunks), groups, current_device())
    stages = Stages.of_model(chunks, [list(one.included.values()) for one in found], transformer_config, config)
    layers = [layer for one in found for layer in one.included.values()]
    config = resolve_across_stages(config, stages, transformer_config)

    def checked() -> tuple[list[str], Tracer]:
        notices = check_supported(chunks, transformer_config, layers, stages, config)
        return notices, Tracer(config.trace_path, config.trace_interval, transformer_config)

    notices, tracer = together(checked, groups, current_device())
    handle = SpecHandle(config, list(zip(chunks, found)), stages, groups, notices, transformer_config, tracer)
    SpecHandle.ever_attached = True
    return handle


def _find(chunks: list[nn.Module]) -> tuple[list[FoundLayers], Any]:
    """The MoE layers of each chunk, and the model's TransformerConfig."""
    found = [moe_layers(chunk) for chunk in chunks]
    if any(layer in _attached for one in found for layer in one.included.values()):
        raise RuntimeError("the losses are attached to this model already: call detach() on the first handle")
    transformer_config = model_config(chunks)
    Stages.check_chunks(chunks, transformer_config)
    return found, transformer_config


class SpecHandle:
    """The losses on one model, from ``attach``.

    Attributes:
        config: what they are; ``coupling_across_stages`` as it is done.
        layers: names of the MoE layers that have them, in this rank's chunks one after another.
        skipped: names of the other MoE layers in these chunks, each with the reason.
        losses_of_layers: with Megatron's ``moe_per_layer_logging``, the losses of the last finished step by name and
            number of the layer in the model.
        ever_attached: of the class: whether any model of this process has got losses.
    """

    ever_attached = False

    def __init__(
        self,
        config: SpecConfig,
        chunks: list[tuple[nn.Module, FoundLayers]],
        stages: Stages,
        groups: Sequence,
        notices: Sequence[str] = (),
        transformer_config=None,
        tracer: Optional[Tracer] = None,
    ):
        self.config = config
        self.layers = [name for _, found in chunks for name in found.included]
        self.skipped = {name: reason for _, found in chunks for name, reason in found.skipped.items()}
        self._layers = [layer for _, found in chunks for layer in found.included.values()]
        self.losses_of_layers: dict[str, dict[int, float]] = {}
        self.recorder = Recorder(
            config,
            [stages.num_experts] * sum(stages.num_layers),
            layer_indices=stages.layer_indices,
            top_k=getattr(transformer_config, "moe_router_topk", 1),
            tp_cp_group=tp_cp_group(self._layers[0]) if self._layers else None,
            groups=groups,
            tracer=tracer,
            logs_each_layer=logs_each_layer(transformer_config),
        )
        self._cross_stage = CrossStageCoupling([chunk for chunk, _ in chunks], stages, config)
        parts: list[Part] = []
        self._steps = Steps(self.recorder, parts)
        self._trackers = [
            MicroBatchTracker(chunk, len(found.included), on_open, self._steps.begin_forward, self._warn_of_decisions)
            for (chunk, found), on_open in zip(chunks, self._cross_stage.on_open)
        ]
        self._taps = [
            LayerTaps(chunk, name, index, first + index, layer, tracker, self.recorder)
            for tracker, (chunk, found), first in zip(self._trackers, chunks, stages.first_layers)
            for index, (name, layer) in enumerate(found.included.items())
        ]
        parts += [*self._trackers, *self._taps]
        self._expected: set[tuple[str, int]] = set().union(*(taps.records() for taps in self._taps))
        self._warned: set = set()
        _attached.update(self._layers)
        logger.info("%s", self.describe())
        if self.skipped:
            logger.warning("MoE layers without losses: %s", _reasons(self.skipped))
        for notice in notices:
            logger.warning("%s", notice)

    def describe(self) -> str:
        """One line: the MoE layers of this rank's chunks with the losses, and those without."""
        text = f"losses on {len(self.layers)} MoE layers" + (f" ({', '.join(self.layers)})" if self.layers else "")
        return text + (f"; not on {_reasons(self.skipped)}" if self.skipped else "")

    @lasting_tensors()
    def end_step(self) -> dict:
        """Ends a training step: returns its values, writes its traces, and starts the next.

        A collective: call it once per optimizer step on every rank that holds the model. Synchronises with the device.
        What trained counts: a forward that failed, or that backward was not called for, does not; nor does a run of
        Megatron's schedule that was followed by another one.

        Returns:
            By the losses' names, floats: unscaled, means over micro-batches (those without
            tokens left out), layers (pairs) and data-parallel ranks; only those that are switched on or measured, and
            that were computed. In every ``metrics_interval``-th step also diagnostics: a dict of lists, ``layers`` and
            ``pairs``.
        """
        losses, diagnostics = self._finish_step(self.recorder.iteration + 1)
        values = {name: float(mean) for name, (mean, number) in losses.items() if number > 0}
        return values if diagnostics is None else {**values, "diagnostics": diagnostics}

    metrics = end_step  # its former name

    @lasting_tensors()
    def finish_step(self, iteration: int) -> tuple[dict, Optional[dict]]:
        """Like ``end_step``, with losses left on the device and the number of the finished step given.

        Traces are written, too. A loss of micro-batches without tokens alone is NaN.
        """
        recorded = self.recorder.recorded
        losses, diagnostics = self._finish_step(iteration)
        missing = {name for name, _ in self._expected} - {name for name, _ in recorded}
        return {name: mean for name, (mean, _) in losses.items() if name not in missing}, diagnostics

    def _finish_step(self, iteration: int) -> tuple[dict, Optional[dict]]:
        self.recorder.tracer.write(iteration)
        for taps in self._taps if self.recorder.measuring else ():
            taps.measure_router()
        losses, diagnostics = self.recorder.losses(), self.recorder.diagnostics()
        self.losses_of_layers = self.recorder.losses_of_layers() if self.recorder.logs_each_layer else {}
        self._warn_of_missing()
        self._warn_of_decisions()
        self.start_after(iteration)
        self._cross_stage.check()  # last: it may raise on one rank, for which no other may wait
        return losses, diagnostics

    @lasting_tensors()
    def start_after(self, iteration: int) -> None:
        """Sets the number of the last finished step, as on resuming from a checkpoint."""
        self._steps.start_after(iteration)

    def detach(self) -> None:
        """Removes every hook; the model is as it was. A second call does nothing."""
        for taps in self._taps:
            taps.detach()
        for tracker in self._trackers:
            tracker.detach()
        self._cross_stage.detach()
        _attached.difference_update(self._layers)
        self._taps, self._trackers, self._layers = [], [], []

    def _warn_of_decisions(self) -> None:
        """Says once that something else than a router's scores decides, of which losses of decisions know nothing."""
        shares = {taps.name: taps.follows_scores for taps in self._taps if taps.follows_scores is not None}
        for taps in self._taps:
            taps.follows_scores = None
        if names := [name for name, share in shares.items() if share < 0.5]:
            warnings.warn(
                f"in MoE layers {', '.join(names)}, most tokens go to other experts than their router scores highest, "
                "as with routing by a table, or replayed. Coupling, score variance and ERC train such a router towards "
                "decisions that it does not make (set their coefficients to 0, unless it is to learn them).",
                stacklevel=4,
            )

    def _warn_of_missing(self) -> None:
        """Says once of each layer and loss that it was to be computed in this step, and was not."""
        trained = set(self.config.trained_losses)
        expected = {(name, layer) for name, layer in self._expected if name in trained}
        missing = expected - self.recorder.recorded
        missed = {taps.name: taps.missed for taps in self._taps if taps.missed}
        found = missing | missed.keys()
        if not found - self._warned:
            return
        self._warned |= found
        names = ", ".join(sorted({name for name, _ in missing}))
        if expected and missing == expected:
            text = (
                f"a training step ended without {names}: no forward of the attached model ran its MoE layers in "
                "training mode and with gradients, and had a backward pass. Nothing is logged for such steps."
            )
        elif missed:
            text = (
                f"in a training step, MoE layers had no losses, nor had the pairs that they belong to: "
                f"{_reasons(missed)}. What is logged is of the others."
            )
        else:
            of = ", ".join(sorted({taps.name for taps in self._taps if missing & taps.records()}))
            text = (
                f"a training step ended without {names} of MoE layers that ran: {of}. What is logged is of the others."
            )
        warnings.warn(text, stacklevel=4)


def _reasons(skipped: dict[str, str]) -> str:
    return ", ".join(f"{name} ({reason})" for name, reason in skipped.items())
