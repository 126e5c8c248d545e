"""Hooks into Megatron's own training program (megatron.training), which stays unedited.

Three of its functions are wrapped where they are looked up at call time: the one that defines the flags, the one
that builds the model, and the one that logs a training step.
"""

import functools
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import torch.distributed as dist
from torch import nn

from megatron_moe_spec.config import SpecConfig
from megatron_moe_spec.integration.attach import SpecHandle, attach
from megatron_moe_spec.integration.compat.release import require_megatron
from megatron_moe_spec.integration.compat.schedules import around_schedules
from megatron_moe_spec.integration.compat.training_program import training_modules, training_writers
from megatron_moe_spec.metrics.writer import METRICS_FILE, MetricsWriter

NEVER_ATTACHED = (
    "the command line asks for losses or metrics of megatron_moe_spec, and they were attached to no model: this is not "
    "the training loop of the megatron.training that is imported here. Where the script has built its model, add two "
    "lines, `from megatron_moe_spec import SpecConfig, attach` and `attach(model, SpecConfig(...))`; or, for a copy of "
    "Megatron's training loop, the lines of patches/"
)

AddArguments = Callable[[ArgumentParser], ArgumentParser]
ConfigFromArguments = Callable[[Any], SpecConfig]


def install(add_arguments: AddArguments, config_from_arguments: ConfigFromArguments) -> None:
    """Makes the next ``megatron.training.pretrain`` of this process take the flags and train with the losses.

    Does nothing to a Megatron that has both already: by an earlier call, or changed by one of ``patches/``.

    Args:
        add_arguments: parser -> parser with the flags.
        config_from_arguments: parsed arguments -> SpecConfig.

    Raises:
        ImportError: megatron-core or megatron.training is missing, or too old.
    """
    require_megatron()
    arguments: Any
    training: Any
    arguments, training = training_modules()
    if any(isinstance(value, TrainingLosses) for value in vars(training).values()):
        return
    losses = training.moe_spec = TrainingLosses(config_from_arguments)
    define, build, log = arguments.add_megatron_arguments, training.setup_model_and_optimizer, training.training_log

    @functools.wraps(define)
    def add_megatron_arguments(parser: ArgumentParser) -> ArgumentParser:
        return add_arguments(define(parser))

    @functools.wraps(build)
    def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> tuple:
        model, *rest = build(*args, **kwargs)
        losses.attach(model, training.get_args())
        return (model, *rest)

    @functools.wraps(log)
    def training_log(
        loss_dict: dict, total_loss_dict: dict, learning_rate: Any, iteration: int, *args: Any, **kwargs: Any
    ) -> Any:
        loss_dict = losses.finish_step(loss_dict, iteration)
        return log(loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs)

    arguments.add_megatron_arguments = add_megatron_arguments
    training.setup_model_and_optimizer = setup_model_and_optimizer
    training.training_log = training_log


class AttachedGuard:
    """Has Megatron's schedules stop before a training pass without the losses that were asked for, while it lives.

    Scripts with a training loop of their own take the flags by Megatron's parser and would silently ignore them.

    Args:
        asked: whether losses or metrics were asked for.
    """

    def __init__(self, asked: Callable[[], bool]):
        self._asked = asked
        around_schedules(self, AttachedGuard._around_schedule)

    @contextmanager
    def _around_schedule(self, name: str, arguments: dict) -> Iterator[dict]:
        if not arguments.get("forward_only", False) and never_attached(self._asked):
            raise RuntimeError(NEVER_ATTACHED)
        yield arguments


def never_attached(asked: Callable[[], bool]) -> bool:
    """Whether losses or metrics were asked for and no model of this process has got any."""
    return not SpecHandle.ever_attached and asked()


class TrainingLosses:
    """The losses of one training program: what the launcher's wrappers and the patched Megatron call.

    Args:
        config_from_arguments: parsed arguments -> SpecConfig.
    """

    def __init__(self, config_from_arguments: ConfigFromArguments):
        self._config_from_arguments = config_from_arguments
        self._handle: Optional[SpecHandle] = None
        self._writer = MetricsWriter()
        self._skipped: frozenset[int] = frozenset()

    def attach(self, model: Sequence[nn.Module], args: Any) -> None:
        """Attaches what the flags ask for, once the model is built and its checkpoint loaded.

        Args:
            model: list of model chunks, from Megatron's ``setup_model_and_optimizer``.
            args: Megatron's arguments.

        Raises:
            ValueError, RuntimeError: see ``megatron_moe_spec.attach``.
            OSError: the file of metrics cannot be written; on every rank. The message names the flags to change.
        """
        spec = self._config_from_arguments(args)
        if not spec.enabled:
            return
        folder = Path(getattr(args, "tensorboard_dir", None) or getattr(args, "save", None) or ".")
        file = folder / METRICS_FILE if spec.metrics_interval else None
        tensorboard, wandb = training_writers()
        self._writer = MetricsWriter(file, tensorboard, wandb, spec.wandb_metrics, log_losses=False)
        self._skipped = frozenset(getattr(args, "iterations_to_skip", None) or ())
        self._handle = attach(model, spec)
        self._handle.start_after(self._last_before_training(getattr(args, "iteration", 0)))
        if dist.get_rank() == 0:
            print(f"MoE specialization: {_describe(spec, file)}; {self._handle.describe()}", flush=True)

    def finish_step(self, loss_dict: dict, iteration: int) -> dict:
        """Returns ``loss_dict`` with the losses' values added, to be logged for a training step. A collective.

        Args:
            loss_dict: first argument of Megatron's ``training_log``.
            iteration: index of the step that has just ended.
        """
        if self._handle is None:
            return loss_dict
        values = self._handle.finish_step(iteration)
        if (last := self._last_before_training(iteration)) != iteration:
            self._handle.start_after(last)
        self._writer.write(iteration, values, self._handle.losses_of_layers)
        trained = self._handle.config.trained_losses
        return {**loss_dict, **{name: values[name] for name in trained if name in values}}

    def _last_before_training(self, iteration: int) -> int:
        """``iteration``, or the last of those after it that ``--iterations-to-skip`` names; Megatron logs none."""
        while iteration + 1 in self._skipped:
            iteration += 1
        return iteration


def _describe(spec: SpecConfig, metrics_file: Optional[Path]) -> str:
    parts = [str(loss) for loss in spec.losses if loss.is_trained]
    if metrics_file:
        parts.append(f"measured every {spec.metrics_interval} iterations to {metrics_file}")
    if spec.trace_path:
        parts.append(f"traced every {spec.trace_interval} iterations to {spec.trace_path}")
    return ", ".join(parts)
