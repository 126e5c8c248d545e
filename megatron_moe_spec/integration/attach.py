"""Entry point: hooks the losses on a model."""

from typing import Sequence, Union

from torch import nn

from megatron_moe_spec.config import SpecConfig
from megatron_moe_spec.integration.checks import check_supported
from megatron_moe_spec.integration.compat import model_config, moe_layers, require_megatron, token_group
from megatron_moe_spec.integration.layer import LayerTap
from megatron_moe_spec.integration.microbatch import MicroBatchTracker
from megatron_moe_spec.integration.pipeline import Stages, carries_of_chunks
from megatron_moe_spec.integration.recorder import Recorder

_MARK = "_megatron_moe_spec_handle"


def attach(model: Union[nn.Module, Sequence[nn.Module]], config: SpecConfig) -> "SpecHandle":
    """Adds the auxiliary losses to every MoE layer of a Megatron-Core model, MTP layers left out.

    The forward pass stays bitwise the same; no parameter, buffer or state-dict key is added. With all coefficients
    0 and no metrics nothing is hooked.

    With pipeline parallelism it is a collective over the pipeline group: call it on every rank.

    Args:
        model: the module that is called for each micro-batch, or the list of all model chunks of this rank that
            Megatron's ``get_model`` returns; before or after the DDP wrap. GPT, hybrid or any other model with
            MoELayers.
        config: which losses, how strongly.

    Returns:
        A handle that reads the losses' values and detaches the hooks.

    Raises:
        ImportError: megatron-core is missing or too old.
        ValueError: the model or its settings are not supported; the message names the flag to change.
        RuntimeError: the model has the losses already.
    """
    if not config.enabled:
        return SpecHandle(config, [], Stages([], [], 0))
    require_megatron()
    chunks = list(model) if isinstance(model, (list, tuple, nn.ModuleList)) else [model]
    layers_of_chunks = [[layer for _, layer in moe_layers(chunk)] for chunk in chunks]
    layers = [layer for chunk in layers_of_chunks for layer in chunk]
    if any(hasattr(layer, _MARK) for layer in layers):
        raise RuntimeError("the losses are attached to this model already: call detach() on the first handle")
    model_settings = model_config(chunks)
    stages = Stages.of_model(chunks, [len(layers) for layers in layers_of_chunks], model_settings)
    check_supported(model_settings, layers, stages, config)
    SpecHandle.ever_attached = True
    return SpecHandle(config, list(zip(chunks, layers_of_chunks)), stages)


class SpecHandle:
    """The losses on one model, from ``attach``.

    Attributes:
        ever_attached: of the class: whether any model of this process has got losses.
    """

    ever_attached = False

    def __init__(
        self, config: SpecConfig, chunks: list[tuple[nn.Module, list[nn.Module]]], stages: Stages
    ):
        self.config = config
        self._layers = [layer for _, layers in chunks for layer in layers]
        num_shares = token_group(self._layers[0]).size() if self._layers else 1
        self.recorder = Recorder(config, [stages.num_experts] * sum(stages.num_layers), num_shares)
        self._carries = carries_of_chunks([chunk for chunk, _ in chunks], stages, config)
        self._trackers = [
            MicroBatchTracker(chunk, len(layers), carry) for (chunk, layers), carry in zip(chunks, self._carries)
        ]
        self._taps = [
            LayerTap(index, first + index, layer, tracker, self.recorder)
            for tracker, (_, layers), first in zip(self._trackers, chunks, stages.first_layers)
            for index, layer in enumerate(layers)
        ]
        for layer in self._layers:
            setattr(layer, _MARK, True)

    def metrics(self) -> dict:
        """Values of the training step that has just ended; starts the next.

        A collective: call it once per optimizer step on every rank. Synchronises with the device.

        Returns:
            specialization_loss, coupling_loss: floats, unscaled, means over micro-batches, layers (pairs) and
            data-parallel ranks; only those that are switched on or measured. In every
            ``metrics_interval``-th step also diagnostics: a dict of lists, ``layers`` and ``pairs``.
        """
        losses, diagnostics = self.finish_step(self.recorder.iteration + 1)
        values = {name: float(loss) for name, loss in losses.items()}
        return values if diagnostics is None else {**values, "diagnostics": diagnostics}

    def finish_step(self, iteration: int) -> tuple[dict, Union[dict, None]]:
        """Like ``metrics``, with losses left on the device and the number of the finished step given."""
        losses, diagnostics = self.recorder.losses(), self.recorder.diagnostics()
        self.start_after(iteration)
        return losses, diagnostics

    def start_after(self, iteration: int) -> None:
        """Sets the number of the last finished step, as on resuming from a checkpoint."""
        self.recorder.begin_after(iteration)
        for tracker in self._trackers:
            tracker.start_step()

    def detach(self) -> None:
        """Removes every hook; the model is as it was. A second call does nothing."""
        for tap in self._taps:
            tap.detach()
        for tracker in self._trackers:
            tracker.detach()
        for carry in self._carries:
            if carry is not None:
                carry.detach()
        for layer in self._layers:
            delattr(layer, _MARK)
        self._taps, self._trackers, self._carries, self._layers = [], [], [], []
