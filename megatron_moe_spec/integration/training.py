"""Hooks into Megatron's own training program (megatron.training), which stays unedited.

Three of its functions are wrapped where they are looked up at call time: the one that defines the flags, the one
that builds the model, and the one that logs a training step.
"""

import functools
import json
import math
import os
import warnings
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Optional

import torch.distributed as dist

from megatron_moe_spec.config import SpecConfig
from megatron_moe_spec.integration.attach import SpecHandle, attach
from megatron_moe_spec.integration.compat.release import require_megatron
from megatron_moe_spec.integration.compat.schedules import around_schedules
from megatron_moe_spec.integration.compat.settings import training_modules, training_writers

METRICS_FILE = "moe_spec_metrics.jsonl"
NEVER_ATTACHED = (
    "the command line asks for losses or metrics of megatron_moe_spec, and they were attached to no model: this is not "
    "the training loop of the megatron.training that is imported here. Where the script has built its model, add two "
    "lines, `from megatron_moe_spec import SpecConfig, attach` and `attach(model, SpecConfig(...))`; or, for a copy of "
    "Megatron's training loop, the lines of patches/"
)


def install(add_arguments: Callable, config_from_arguments: Callable) -> None:
    """Makes the next ``megatron.training.pretrain`` of this process take the flags and train with the losses.

    Does nothing to a Megatron that has both already: by an earlier call, or changed by one of ``patches/``.

    Args:
        add_arguments: parser -> parser with the flags.
        config_from_arguments: parsed arguments -> SpecConfig.

    Raises:
        ImportError: megatron-core or megatron.training is missing, or too old.
    """
    require_megatron()
    arguments, training = training_modules()
    if not any(isinstance(value, TrainingLosses) for value in vars(training).values()):
        _wrap(arguments, training, add_arguments, TrainingLosses(config_from_arguments))


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
    def _around_schedule(self, name: str, arguments: dict):
        if not arguments.get("forward_only", False) and never_attached(self._asked):
            raise RuntimeError(NEVER_ATTACHED)
        yield arguments


def never_attached(asked: Callable[[], bool]) -> bool:
    """Whether losses or metrics were asked for and no model of this process has got any."""
    return not SpecHandle.ever_attached and asked()


def _wrap(arguments, training, add_arguments: Callable, losses: "TrainingLosses") -> None:
    define, build, log = (
        arguments.add_megatron_arguments,
        training.setup_model_and_optimizer,
        training.training_log,
    )

    @functools.wraps(define)
    def add_megatron_arguments(parser):
        return add_arguments(define(parser))

    @functools.wraps(build)
    def setup_model_and_optimizer(*args, **kwargs):
        model, *rest = build(*args, **kwargs)
        losses.attach(model, training.get_args())
        return (model, *rest)

    @functools.wraps(log)
    def training_log(loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs):
        loss_dict = losses.finish_step(loss_dict, iteration)
        return log(loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs)

    training.moe_spec = losses
    arguments.add_megatron_arguments = add_megatron_arguments
    training.setup_model_and_optimizer = setup_model_and_optimizer
    training.training_log = training_log


class TrainingLosses:
    """The losses of one training program: what the launcher's wrappers and the patched Megatron call.

    Args:
        config_from_arguments: parsed arguments -> SpecConfig.
    """

    def __init__(self, config_from_arguments: Callable):
        self._config_from_arguments = config_from_arguments
        self._handle: Optional[SpecHandle] = None
        self._metrics_file: Optional[MetricsFile] = None
        self._skipped: frozenset[int] = frozenset()

    def attach(self, model, args) -> None:
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
        if spec.metrics_interval:
            folder = Path(getattr(args, "tensorboard_dir", None) or getattr(args, "save", None) or ".")
            self._metrics_file = MetricsFile(folder / METRICS_FILE)
            self._metrics_file.check()
        self._skipped = frozenset(getattr(args, "iterations_to_skip", None) or ())
        self._handle = attach(model, spec)
        self._handle.start_after(self._last_before_training(getattr(args, "iteration", 0)))
        if dist.get_rank() == 0:
            described = _describe(spec, self._metrics_file)
            print(f"MoE specialization: {described}; {self._handle.describe()}", flush=True)

    def finish_step(self, loss_dict: dict, iteration: int) -> dict:
        """Returns ``loss_dict`` with the losses' values added, to be logged for a training step. A collective.

        Args:
            loss_dict: first argument of Megatron's ``training_log``.
            iteration: number of the step that has just ended.
        """
        if self._handle is None:
            return loss_dict
        losses, diagnostics = self._handle.finish_step(iteration)
        if (last := self._last_before_training(iteration)) != iteration:
            self._handle.start_after(last)
        if diagnostics is not None:
            self._write(iteration, losses, diagnostics)
        trained = self._handle.config.trained_losses
        return {**loss_dict, **{name: loss for name, loss in losses.items() if name in trained}}

    def _last_before_training(self, iteration: int) -> int:
        """``iteration``, or the last of those after it that ``--iterations-to-skip`` names; Megatron logs none."""
        while iteration + 1 in self._skipped:
            iteration += 1
        return iteration

    def _write(self, iteration: int, losses: dict, diagnostics: dict) -> None:
        tensorboard, wandb = training_writers()
        if tensorboard or wandb:
            scalars = _scalars(diagnostics)
            for tag, value in scalars.items() if tensorboard else ():
                tensorboard.add_scalar(tag, value, iteration)
            if wandb:
                wandb.log(scalars, iteration)
        if dist.get_rank() == 0:
            line = {"iteration": iteration, **{name: float(loss) for name, loss in losses.items()}, **diagnostics}
            self._metrics_file.append(line)


class MetricsFile:
    """A file of strict JSON lines, which rank 0 writes. A long run does not end for it: it warns, once."""

    def __init__(self, path: Path):
        self._path = path
        self._warned = False

    def __str__(self):
        return str(self._path)

    def check(self) -> None:
        """Raises OSError, on every rank, where rank 0 cannot write the file. A collective."""
        problem: list = [None]
        if dist.get_rank() == 0:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._path.open("a").close()
            except OSError as error:
                problem = [f"{error.strerror}: {error.filename}"]
        dist.broadcast_object_list(problem)
        if problem[0]:
            raise OSError(
                f"{self._path} cannot be written ({problem[0]}): set --tensorboard-dir, or --save, to another folder, "
                "or --moe-spec-metrics-interval to 0"
            )

    def append(self, line: dict) -> None:
        """Writes a line, with null for what is not finite."""
        size = None
        try:
            size = self._path.stat().st_size if self._path.exists() else 0
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps(_finite(line), allow_nan=False) + "\n")
        except OSError as error:
            # No part of a line stays before the next one, if there is room for that later.
            if size is not None:
                with suppress(OSError):
                    os.truncate(self._path, size)
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"{self._path} cannot be written ({error.strerror}); training goes on without its lines",
                    stacklevel=2,
                )


def _finite(value):
    """The same with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _describe(spec: SpecConfig, metrics_file: Optional[MetricsFile]) -> str:
    parts = [str(loss) for loss in spec.losses if loss.coeff > 0]
    if metrics_file:
        parts.append(f"measured every {spec.metrics_interval} iterations to {metrics_file}")
    return ", ".join(parts)


def _scalars(diagnostics: dict) -> dict[str, float]:
    """Flat tags for the loggers: moe_spec/<measure>/layer_<i> and moe_spec/<measure>/layers_<i>_<j>."""
    scalars = {}
    for layer in diagnostics["layers"]:
        number = layer["layer"]
        scalars.update({f"moe_spec/{k}/layer_{number}": v for k, v in layer.items() if k != "layer"})
    for pair in diagnostics["pairs"]:
        numbers = "_".join(map(str, pair["layers"]))
        scalars.update({f"moe_spec/{k}/layers_{numbers}": v for k, v in pair.items() if k != "layers"})
    return {tag: value for tag, value in scalars.items() if value is not None}
