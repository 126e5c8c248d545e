"""Hooks into Megatron's own training program (megatron.training), which stays unedited.

Three of its functions are wrapped where they are looked up at call time: the one that defines the flags, the one
that builds the model, and the one that logs a training step.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

import torch.distributed as dist

from megatron_moe_spec.config import SpecConfig
from megatron_moe_spec.integration.attach import SpecHandle, attach
from megatron_moe_spec.integration.compat.release import require_megatron
from megatron_moe_spec.integration.compat.schedules import around_schedules
from megatron_moe_spec.integration.compat.training_program import training_modules, training_writers
from megatron_moe_spec.metrics.json_lines import JsonLines, finite

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
        self._log_layers(iteration)
        trained = self._handle.config.trained_losses
        return {**loss_dict, **{name: loss for name, loss in losses.items() if name in trained}}

    def _last_before_training(self, iteration: int) -> int:
        """``iteration``, or the last of those after it that ``--iterations-to-skip`` names; Megatron logs none."""
        while iteration + 1 in self._skipped:
            iteration += 1
        return iteration

    def _write(self, iteration: int, losses: dict, diagnostics: dict) -> None:
        if any(training_writers()):
            scalars = _scalars(diagnostics)
            brief = self._handle.config.wandb_metrics == "brief"
            self._log(iteration, scalars, _brief(diagnostics) if brief else scalars)
        if dist.get_rank() == 0:
            line = {"iteration": iteration, **{name: float(loss) for name, loss in losses.items()}, **diagnostics}
            self._metrics_file.append(line)

    def _log_layers(self, iteration: int) -> None:
        """Each layer's losses, under the names that Megatron gives its own ones with --moe-per-layer-logging."""
        if of_layers := self._handle.losses_of_layers:
            scalars = {f"moe/{name}_layer_{i}": v for name, layers in of_layers.items() for i, v in layers.items()}
            self._log(iteration, scalars, scalars)

    @staticmethod
    def _log(iteration: int, for_tensorboard: dict[str, float], for_wandb: dict[str, float]) -> None:
        tensorboard, wandb = training_writers()
        if tensorboard:
            for tag, value in for_tensorboard.items():
                tensorboard.add_scalar(tag, value, iteration)
        if wandb:
            wandb.log(for_wandb, iteration)


class MetricsFile(JsonLines):
    """The file of metrics, which rank 0 writes."""

    def check(self) -> None:
        """Raises OSError, on every rank, where rank 0 cannot write the file. A collective."""
        problem = [self.problem() if dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(problem)
        if problem[0]:
            raise OSError(
                f"{self} cannot be written ({problem[0]}): set --tensorboard-dir, or --save, to another folder, "
                "or --moe-spec-metrics-interval to 0"
            )

    def append(self, line: dict) -> None:
        """Writes a line, with null for what is not finite."""
        self.extend([finite(line)])


def _describe(spec: SpecConfig, metrics_file: Optional[MetricsFile]) -> str:
    parts = [str(loss) for loss in spec.losses if loss.coeff > 0]
    if metrics_file:
        parts.append(f"measured every {spec.metrics_interval} iterations to {metrics_file}")
    if spec.trace_path:
        parts.append(f"traced every {spec.trace_interval} iterations to {spec.trace_path}")
    return ", ".join(parts)


def _scalars(diagnostics: dict) -> dict[str, float]:
    """Flat tags for the loggers: moe_spec/<measure>/layer_<i> and moe_spec/<measure>/layers_<i>_<j>."""
    return {
        f"moe_spec/{name}/{'layers' if len(layers) > 1 else 'layer'}_{'_'.join(map(str, layers))}": value
        for name, layers, value in _measures(diagnostics)
    }


def _brief(diagnostics: dict) -> dict[str, float]:
    """The same, of all layers together: moe_spec/<measure>, its mean, and of some measures the largest value."""
    values: dict[str, list[float]] = {}
    for name, _, value in _measures(diagnostics):
        values.setdefault(name, []).append(value)
    largest = {
        f"moe_spec/{name}_largest": max(values[name]) for name in ("max_violation", "dead_experts") if name in values
    }
    return {**{f"moe_spec/{name}": sum(found) / len(found) for name, found in values.items()}, **largest}


def _measures(diagnostics: dict) -> Iterator[tuple[str, list[int], float]]:
    """(measure, layer or pair of layers, value) of what was measured and is a number."""
    for row in (*diagnostics["layers"], *diagnostics["pairs"]):
        layers = row["layers"] if "layers" in row else [row["layer"]]
        for name, value in row.items():
            if isinstance(value, (int, float)) and name not in ("layer", "layer_index"):
                yield name, layers, value
