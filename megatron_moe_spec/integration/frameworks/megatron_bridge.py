"""The losses in Megatron-Bridge: ``pretrain(cfg, forward_step, callbacks=[SpecCallback(config)])``."""

from pathlib import Path
from typing import Any

from megatron_moe_spec.config import SpecConfig
from megatron_moe_spec.integration.attach import SpecHandle, attach
from megatron_moe_spec.metrics.writer import METRICS_FILE, MetricsWriter


class SpecCallback:
    """Attaches the losses before the first step, adds them to what Megatron-Bridge logs, and writes the metrics.

    Bridge's ``CallbackManager`` finds the methods by their names, so this derives from no class of Bridge. Metrics go
    to ``moe_spec_metrics.jsonl`` in ``logger.tensorboard_dir`` (else ``checkpoint.save``, else the current folder),
    and to Bridge's TensorBoard and W&B.

    Args:
        config: as for ``attach``.

    Attributes:
        handle: from ``attach``; from ``on_train_start`` on.
    """

    handle: SpecHandle
    _writer: MetricsWriter

    def __init__(self, config: SpecConfig):
        self._config = config

    def on_train_start(self, context: Any) -> None:
        """Here the checkpoint is loaded, adapters are on, and DDP is around the model."""
        state, config = context.state, self._config
        folder = Path(state.cfg.logger.tensorboard_dir or state.cfg.checkpoint.save or ".")
        file = folder / METRICS_FILE if config.metrics_interval else None
        loggers = state.tensorboard_logger, state.wandb_logger
        self._writer = MetricsWriter(file, *loggers, config.wandb_metrics, log_losses=False)
        self.handle = attach(context.model, config)

    def on_train_step_start(self, context: Any) -> None:
        """Bridge resumes at any step, and goes over ``iterations_to_skip`` without a callback."""
        self.handle.start_after(context.state.train_state.step)

    def on_train_step_end(self, context: Any) -> None:
        """Comes before Bridge counts the step and logs ``loss_dict``. A collective."""
        iteration = context.state.train_state.step + 1
        values = self.handle.finish_step(iteration)
        self._writer.write(iteration, values, self.handle.losses_of_layers)
        context.loss_dict.update({name: values[name] for name in self._config.trained_losses if name in values})

    def on_train_end(self, context: Any) -> None:
        """Leaves the model as it was built."""
        self.handle.detach()
