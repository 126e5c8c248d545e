"""Where training steps begin and end, attempts at them, and what is done in each."""

import warnings
from typing import Optional, Protocol

from megatron_moe_spec.config import SpecConfig
from megatron_moe_spec.integration.compat.schedules import training_schedule
from megatron_moe_spec.losses import Loss

_MOST_ATTEMPTS = 8  # Megatron's rerun state machine makes two
_MOST_FORWARDS = 1024  # of a loop that does not call Megatron's schedules


class Part(Protocol):
    def begin_step(self) -> None:
        """A training step begins, or another attempt at it: nothing has been counted."""


class StepClock:
    """Counts forwards that train, and tells steps and attempts apart.

    A run of one of Megatron's schedules is an attempt at a step: what an earlier one has recorded, of the same step,
    goes. Where a loop never ends its steps, what is to differ from one to the next goes on by attempts.

    Attributes:
        iteration: number of the last finished training step.
        measuring: whether this step's routing and overlap are measured for the diagnostics.
        tracing: whether this step's routing is traced.
        active: whether anything is computed in this step.
    """

    def __init__(self, config: SpecConfig):
        self._config = config
        self._parts: list[Part] = []
        self._schedule: Optional[int] = None
        self._warned = False
        self.start_after(0)

    def add(self, *parts: Part) -> None:
        """Has parts told of each step that begins, in their order."""
        self._parts += parts

    @property
    def step(self) -> int:
        """Number by which what is drawn at random, or chosen in turns, differs from step to step."""
        return self.iteration + self._unended

    def is_computed(self, loss: Loss) -> bool:
        """Whether a loss is to be computed in this step."""
        return loss.is_trained or (self.measuring and loss.measured)

    def start_after(self, iteration: int) -> None:
        """The step after ``iteration`` begins."""
        self._attempts = self._forwards = 0
        self._begin(iteration, unended=0)

    def begin_forward(self) -> None:
        """A forward that trains begins."""
        schedule = training_schedule()
        self._forwards += 1
        if schedule is None:
            if self._forwards % _MOST_FORWARDS == 0:
                self._go_on()
        elif schedule != self._schedule:
            self._schedule = schedule
            self._attempts += 1
            if self._attempts > _MOST_ATTEMPTS:
                self._go_on()
            elif self._attempts > 1 or self._forwards > 1:
                self._begin(self.iteration, self._unended)

    def _go_on(self) -> None:
        self._begin(self.iteration, self._unended + 1)
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._forwards} micro-batches since the losses were attached, or a step was ended: call end_step() "
                "once per optimizer step, on every rank. Without it values, metrics and traces are lost.",
                stacklevel=3,
            )

    def _begin(self, iteration: int, unended: int) -> None:
        """Begins the step after ``iteration``, ``unended`` steps after it where the loop ends none."""
        self.iteration, self._unended = iteration, unended
        measured, traced = self._config.metrics_interval, self._config.trace_interval
        self.measuring = bool(measured) and (iteration + 1) % measured == 0
        self.tracing = bool(self._config.trace_path) and (iteration + 1) % traced == 0
        self.active = self.measuring or self.tracing or bool(self._config.trained_losses)
        for part in self._parts:
            part.begin_step()
