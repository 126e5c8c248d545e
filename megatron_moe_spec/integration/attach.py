"""Entry point: hooks the losses on a model."""

import logging
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, Optional, Union

from torch import nn
from torch.distributed import ProcessGroup

from megatron_moe_spec.config import SpecConfig
from megatron_moe_spec.integration.compat.groups import model_ranks, tp_cp_group
from megatron_moe_spec.integration.compat.models import FoundLayers, model_config, moe_layers
from megatron_moe_spec.integration.compat.protocols import TransformerConfig
from megatron_moe_spec.integration.compat.release import require_megatron
from megatron_moe_spec.integration.compat.schedules import follow_schedules
from megatron_moe_spec.integration.compat.settings import logs_each_layer
from megatron_moe_spec.integration.hooks.micro_batch import MicroBatchTracker
from megatron_moe_spec.integration.hooks.modes import lasting_tensors
from megatron_moe_spec.integration.pipeline.cross_stage import CrossStageCoupling
from megatron_moe_spec.integration.pipeline.stages import Stages
from megatron_moe_spec.integration.step.clock import StepClock
from megatron_moe_spec.integration.step.diagnostics import StepDiagnostics
from megatron_moe_spec.integration.step.losses import ReducedLosses, StepLosses
from megatron_moe_spec.integration.step.tracer import Tracer
from megatron_moe_spec.integration.support.checks import check_chunks, check_supported, resolve_across_stages
from megatron_moe_spec.integration.support.facts import ModelFacts
from megatron_moe_spec.integration.taps.base import TappedLayer
from megatron_moe_spec.integration.taps.layer import LayerTaps
from megatron_moe_spec.integration.taps.lost_losses import LostLosses, warn_of_decisions, with_reasons
from megatron_moe_spec.parallel.collectives import current_device, together

logger = logging.getLogger(__name__)
_attached: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()  # MoE layers


@lasting_tensors()
def attach(
    model: Union[nn.Module, Sequence[nn.Module]], config: SpecConfig, group: Optional[ProcessGroup] = None
) -> "SpecHandle":
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
        clock = StepClock(config)
        return SpecHandle(config, clock, Tracer("", clock, None), [], Stages([], [], 0), [])
    require_megatron()
    follow_schedules()
    chunks = list(model) if isinstance(model, (list, tuple, nn.ModuleList)) else [model]
    groups = [group] if group is not None else model_ranks(chunks[0])
    found, transformer_config = together(partial(_find, chunks), groups, current_device())
    stages = Stages.of_model(chunks, [list(one.included.values()) for one in found], transformer_config, config)
    layers = [layer for one in found for layer in one.included.values()]
    config = resolve_across_stages(config, stages, transformer_config)
    clock = StepClock(config)

    def checked() -> tuple[list[str], Tracer]:
        facts = ModelFacts.of_model(chunks, transformer_config, layers, stages, config)
        return check_supported(facts), Tracer(config.trace_path, clock, transformer_config)

    notices, tracer = together(checked, groups, current_device())
    handle = SpecHandle(config, clock, tracer, list(zip(chunks, found)), stages, groups, transformer_config)
    for notice in notices:
        logger.warning("%s", notice)
    SpecHandle.ever_attached = True
    return handle


def _find(chunks: list[nn.Module]) -> tuple[list[FoundLayers], Any]:
    """The MoE layers of each chunk, and the model's TransformerConfig."""
    found = [moe_layers(chunk) for chunk in chunks]
    if any(layer in _attached for one in found for layer in one.included.values()):
        raise RuntimeError("the losses are attached to this model already: call detach() on the first handle")
    transformer_config = model_config(chunks)
    check_chunks(chunks, transformer_config)
    return found, transformer_config


class SpecHandle:
    """The losses on one model, from ``attach``; as a context manager, until the block ends.

    Attributes:
        config: what they are; ``coupling_across_stages`` as it is done.
        layers: names of the MoE layers that have them, in this rank's chunks one after another.
        skipped: names of the other MoE layers in these chunks, each with the reason.
        losses_of_layers: with Megatron's ``moe_per_layer_logging``, the losses of the last finished step by name and
            layer index (among all layers of the model; of a pair, the first one's).
        ever_attached: of the class: whether any model of this process has got losses.
    """

    ever_attached = False

    def __init__(
        self,
        config: SpecConfig,
        clock: StepClock,
        tracer: Tracer,
        chunks: list[tuple[nn.Module, FoundLayers]],
        stages: Stages,
        groups: Sequence[ProcessGroup],
        transformer_config: Optional[TransformerConfig] = None,
    ):
        self.config = config
        self.layers = [name for _, found in chunks for name in found.included]
        self.skipped = {name: reason for _, found in chunks for name, reason in found.skipped.items()}
        self.losses_of_layers: dict[str, dict[int, float]] = {}
        self._layers = [layer for _, found in chunks for layer in found.included.values()]
        self._clock, self._tracer = clock, tracer
        self._logs_each_layer = logs_each_layer(transformer_config)
        top_k = getattr(transformer_config, "moe_router_topk", 1)
        group = tp_cp_group(self._layers[0]) if self._layers else None
        indices = stages.layer_indices
        self._losses = StepLosses(config, clock, indices, group, groups, self._logs_each_layer)
        self._diagnostics = StepDiagnostics(config, clock, indices, stages.num_experts, top_k, group, groups)
        self._cross_stage = CrossStageCoupling([chunk for chunk, _ in chunks], stages, config)
        self._taps: list[LayerTaps] = []
        warn = partial(warn_of_decisions, self._taps)
        self._trackers: list[MicroBatchTracker] = []
        for (chunk, found), on_open, first in zip(chunks, self._cross_stage.on_open, stages.first_layers):
            tracker = MicroBatchTracker(chunk, len(found.included), on_open, clock.begin_forward, warn)
            self._trackers.append(tracker)
            for index, (name, module) in enumerate(found.included.items()):
                place = index, first + index, indices[first + index]
                layer = TappedLayer(module, name, *place, config, clock, self._losses, self._diagnostics, tracer)
                self._taps.append(LayerTaps(layer, chunk, tracker))
        clock.add(self._losses, self._diagnostics, tracer, *self._trackers, *self._taps)
        self._lost = LostLosses(config, self._taps)
        _attached.update(self._layers)
        logger.info("%s", self.describe())
        if self.skipped:
            logger.warning("MoE layers without losses: %s", with_reasons(self.skipped))

    def describe(self) -> str:
        """One line: the MoE layers of this rank's chunks with the losses, and those without."""
        text = f"losses on {len(self.layers)} MoE layers" + (f" ({', '.join(self.layers)})" if self.layers else "")
        return text + (f"; not on {with_reasons(self.skipped)}" if self.skipped else "")

    @lasting_tensors()
    def end_step(self) -> dict:
        """Ends a training step: returns its values, writes its traces, and starts the next.

        A collective: call it once per optimizer step on every rank that holds the model. Synchronises with the device.
        What trained counts: a forward that failed, or that backward was not called for, does not; nor does a run of
        Megatron's schedule that was followed by another one.

        Returns:
            By the losses' names, floats: unscaled, means over micro-batches (those without tokens left out), layers
            (pairs) and data-parallel ranks; only those that are switched on or measured, and that were computed. In
            every ``metrics_interval``-th step also diagnostics: a dict of lists, ``layers`` and ``pairs``.
        """
        losses, measured = self._finish_step(self._clock.iteration + 1)
        return {**losses.values(), **measured}

    @lasting_tensors()
    def finish_step(self, iteration: int) -> dict:
        """Like ``end_step``, with losses left on the device and the index of the finished step given.

        Traces are written, too. A loss of micro-batches without tokens alone is NaN.
        """
        not_recorded = self._lost.names(self._losses.recorded)
        losses, measured = self._finish_step(iteration)
        return {**{name: mean for name, mean in losses.means.items() if name not in not_recorded}, **measured}

    def _finish_step(self, iteration: int) -> tuple[ReducedLosses, dict]:
        self._tracer.write(iteration)
        for taps in self._taps if self._clock.measuring else ():
            taps.measure_router()
        losses, diagnostics = self._diagnostics.reduce(self._losses)
        self.losses_of_layers = losses.of_layers if self._logs_each_layer else {}
        self._lost.warn(self._losses.recorded)
        warn_of_decisions(self._taps)
        self.start_after(iteration)
        # Last: these may raise on one rank, for which no other may wait.
        self._tracer.check()
        self._cross_stage.check()
        return losses, {} if diagnostics is None else {"diagnostics": diagnostics}

    @lasting_tensors()
    def start_after(self, iteration: int) -> None:
        """For resuming: the next step is the one after ``iteration``, the last that the checkpoint's run has finished.

        Intervals of metrics and traces, and what is drawn at random or in turns, go on from there. Nothing of the
        present step is kept.
        """
        self._clock.start_after(iteration)

    def detach(self) -> None:
        """Removes every hook; the model is as it was. Waits until traces are written. A second call does nothing."""
        for taps in self._taps:
            taps.detach()
        for tracker in self._trackers:
            tracker.detach()
        self._cross_stage.detach()
        _attached.difference_update(self._layers)
        for removed in (self._taps, self._trackers, self._layers):
            removed.clear()
        self._tracer.close()

    def __enter__(self) -> "SpecHandle":
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()
