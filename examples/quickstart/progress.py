"""One line of progress for several training runs in a row."""

import sys
import time


class Progress:
    """Shows iteration, loss and the time left, on one line of a terminal or, elsewhere, on a line now and then.

    Args:
        iterations: training steps of each run.
        runs: how many runs there will be.
        stream: where to print.
    """

    LINES_PER_RUN = 6

    def __init__(self, iterations, runs, stream=sys.stdout, clock=time.monotonic):
        self.iterations = iterations
        self.runs = runs
        self.stream = stream
        self.clock = clock
        self.run = 0

    def start(self, name):
        self.run += 1
        self.name = name
        self.started = self.clock()
        self.first = None
        self.shown = 0
        self._print(f"{self._label()}  starting (importing PyTorch and Megatron)", lasting=True)

    def show(self, steps):
        """Takes all (iteration, loss) of the present run so far."""
        if not steps or steps[-1][0] <= self.shown:
            return
        iteration, loss = steps[-1]
        if self.first is None:
            self.first = (iteration, self.clock())
        part, part_before = (n * self.LINES_PER_RUN // self.iterations for n in (iteration, self.shown))
        self.shown = iteration
        text = f"{self._label()}  {iteration:5d}/{self.iterations}  loss {loss:.3f}{self._left(iteration)}"
        self._print(text, lasting=part > part_before)

    def finish(self, steps):
        loss = f"  loss {steps[-1][1]:.3f}" if steps else ""
        self._print(f"{self._label()}  done in {self.clock() - self.started:.0f} s{loss}", lasting=True)
        self.end_line()

    def end_line(self):
        if self.stream.isatty():
            self.stream.write("\n")

    def _label(self):
        return f"[{self.run}/{self.runs}] {self.name:<12}"

    def _left(self, iteration):
        """The time left in all runs; the first step seen is not timed, for it holds the warm-up."""
        first_iteration, first_time = self.first
        if iteration == first_iteration:
            return ""
        per_step = (self.clock() - first_time) / (iteration - first_iteration)
        start_up = first_time - self.started
        left = per_step * (self.iterations - iteration)
        left += (self.runs - self.run) * (start_up + per_step * self.iterations)
        minutes, seconds = divmod(round(left), 60)
        return f"  {per_step:.2f} s/step  {minutes} min {seconds:02d} s left"

    def _print(self, text, lasting):
        if self.stream.isatty():
            self.stream.write(f"\r\033[K{text}")
        elif lasting:
            self.stream.write(f"{text}\n")
        self.stream.flush()
