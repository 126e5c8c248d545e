"""Where training steps begin and end, and attempts at them."""

import warnings
from collections.abc import Sequence
from typing import Optional, Protocol

from megatron_moe_spec.integration.compat.schedules import training_schedule
from megatron_moe_spec.integration.step.recorder import Recorder

_MOST_ATTEMPTS = 8  # Megatron's rerun state machine makes two
_MOST_FORWARDS = 1024  # of a loop that does not call Megatron's schedules


class Part(Protocol):
    def start_step(self) -> None:
        """A training step begins, or is begun again."""


class Steps:
    """Counts forwards that train, and tells steps and attempts apart.

    A run of one of Megatron's schedules is an attempt at a step: what an earlier one has recorded, of the same step,
    goes. Where a loop never ends its steps, what is to differ from one to the next goes on by attempts.

    Args:
        recorder: of the model.
        parts: what counts within a step.
    """

    def __init__(self, recorder: Recorder, parts: Sequence[Part]):
        self._recorder, self._parts = recorder, parts
        self._schedule: Optional[int] = None
        self._attempts = self._forwards = 0
        self._warned = False

    def start_after(self, iteration: int) -> None:
        """The step after ``iteration`` begins."""
        self._attempts = self._forwards = 0
        self._begin(iteration)

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
                self._begin(self._recorder.iteration, self._recorder.unended)

    def _go_on(self) -> None:
        self._begin(self._recorder.iteration, self._recorder.unended + 1)
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._forwards} micro-batches since the losses were attached, or a step was ended: call end_step() "
                "once per optimizer step, on every rank. Without it values, metrics and traces are lost.",
                stacklevel=3,
            )

    def _begin(self, iteration: int, unended: int = 0) -> None:
        self._recorder.begin_after(iteration, unended)
        for part in self._parts:
            part.start_step()
