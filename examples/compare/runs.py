"""The runs of a comparison: which there are, running several at a time, and what each leaves behind."""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from examples.compare import arms, schedule
from examples.quickstart import training
from examples.quickstart.progress import Progress
from megatron_moe_spec.report import runs as results

RESULT_FILE = "result.json"
PEAK_MEMORY = "peak_memory_mb"
POLL_SECONDS = 0.5
NOT_KEPT = (results.TRAIN_LOSS, results.STEP_TIME, results.MEMORY)


@dataclass(frozen=True)
class Run:
    """One arm at one multiple of its papers' coefficients, with one seed."""

    arm: str
    scale: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}-x{self.scale:g}-seed{self.seed}"


def sweep(seed: int, compared: list) -> list:
    """Every scale of every arm that has a choice, and the baseline to compare with."""
    choices = [Run(arm.name, scale, seed) for arm in compared for scale in arm.scales]
    return [Run(arms.BASELINE, 1, seed), *choices]


def final(seeds: list, scales: dict, compared: list) -> list:
    """Every arm at its chosen scale, seed by seed, so that what is finished early can be compared."""
    return [Run(arm.name, scales.get(arm.name, 1), seed) for seed in seeds for arm in compared]


def chosen_scales(output: Path, seed: int, compared: list) -> dict:
    """The scale with the lowest validation loss in the sweep, by arm."""
    found = {}
    for arm in compared:
        losses = {scale: result_of(output, Run(arm.name, scale, seed)) for scale in arm.scales}
        if losses:
            found[arm.name] = min(losses, key=lambda scale: losses[scale]["values"][results.VALIDATION_LOSS])
    return found


def result_of(output: Path, run: Run):
    """Results of a finished run, or None."""
    path = output / "runs" / run.name / RESULT_FILE
    return json.loads(path.read_text()) if path.exists() else None


def step_times(output: Path, run: Run) -> list:
    """[(iteration, seconds), ...] of a finished run."""
    return training.series_of(output / "runs" / run.name)[results.STEP_TIME]


class Runner:
    """Runs what is not finished yet, several runs at a time, each in a process of its own.

    Args:
        machine: where, with one process a run.
        scale: the model.
        iterations: training steps of a run.
        prefix: of the data set.
        workers: runs at a time.
        stream: where progress is printed.
    """

    def __init__(self, machine, scale, iterations: int, prefix: Path, workers: int, stream=sys.stdout):
        self.machine = machine
        self.scale = scale
        self.iterations = iterations
        self.prefix = prefix
        self.workers = workers
        self.stream = stream

    def command(self, run: Run, scales: dict, folder: Path) -> list:
        base = schedule.flags(self.scale, self.iterations, run.seed)
        losses = arms.flags(arms.BY_NAME[run.arm], {**scales, run.arm: run.scale})
        return training.megatron_command(self.machine, [*base, *losses], self.prefix, folder)

    def run_all(self, wanted: list, output: Path, scales: dict, later: int = 0) -> None:
        """Runs all that has left no result; stops everything and exits with the log's end if one fails.

        Args:
            later: how many more runs will follow, for the time left.
        """
        waiting = [run for run in wanted if result_of(output, run) is None]
        if len(waiting) < len(wanted):
            print(f"{len(wanted) - len(waiting)} of {len(wanted)} runs are finished already", file=self.stream)
        if not waiting:
            return
        # smoothing=0: runs side by side end in bursts.
        progress = Progress(len(waiting) + later, "run", self.stream, desc="finished", smoothing=0)
        active = []
        try:
            while waiting or active:
                while waiting and len(active) < self.workers:
                    free = min(set(range(self.workers)) - {job.worker for job in active})
                    active.append(self._start(waiting.pop(0), output, scales, free))
                time.sleep(POLL_SECONDS)
                for job in [job for job in active if not job.running()]:
                    active.remove(job)
                    job.store(self.iterations)
                    progress.write(job.summary(), file=self.stream)
                    progress.update()
        finally:
            progress.close()
            for job in active:
                job.stop()

    def _start(self, run: Run, output: Path, scales: dict, worker: int) -> "_Job":
        folder = output / "runs" / run.name
        variables = {} if self.machine.cpu else {"CUDA_VISIBLE_DEVICES": str(worker)}
        return _Job(run, folder, worker, training.start(self.command(run, scales, folder), folder, variables))


class _Job:
    """A run that is under way."""

    def __init__(self, run: Run, folder: Path, worker: int, process):
        self.run = run
        self.folder = folder
        self.worker = worker
        self.process = process
        self.began = time.monotonic()
        self.peak_bytes = 0

    def running(self) -> bool:
        """Whether it goes on; takes a look at its memory, too."""
        try:
            # Below the launcher, the one process that trains is by far the largest.
            for worker in psutil.Process(self.process.pid).children(recursive=True):
                self.peak_bytes = max(self.peak_bytes, worker.memory_info().rss)
        except psutil.Error:
            pass
        return self.process.poll() is None

    def store(self, iterations: int) -> None:
        """Writes the result, or exits if the run failed."""
        self.seconds = time.monotonic() - self.began
        if self.process.returncode:
            sys.exit(training.account_of_failure(self.run.name, self.process.returncode, self.folder))
        self.result = summary(training.series_of(self.folder), iterations, self.peak_bytes, self.seconds)
        if results.VALIDATION_LOSS not in self.result["values"]:
            sys.exit(f"{self.run.name} left no validation loss: see {training.shown(self.folder / 'log.txt')}")
        # Moved into place, so that a result is there whole or not at all.
        part = self.folder / f".{RESULT_FILE}"
        part.write_text(json.dumps(self.result) + "\n")
        os.replace(part, self.folder / RESULT_FILE)

    def summary(self) -> str:
        loss = self.result["values"][results.VALIDATION_LOSS]
        return f"{self.run.name}: validation loss {loss:.4f}, {self.seconds:.0f} s"

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


def summary(series: dict, iterations: int, peak_bytes: int, seconds: float) -> dict:
    """The values of a run that the report needs, and its curves.

    Args:
        series: see ``training.series_of``.
        iterations: training steps of the run.
        peak_bytes: memory of the run's processes, where the device does not tell its own.
        seconds: that the run took.
    """
    window = max(1, iterations // 10)
    values = {name: results.final(points, iterations, window) for name, points in series.items()}
    if series.get(results.VALIDATION_LOSS):
        values[results.VALIDATION_LOSS] = series[results.VALIDATION_LOSS][-1][1]
    values[results.STEP_TIME] = results.median(series.get(results.STEP_TIME, []))
    on_device = series.get(results.MEMORY)
    values[PEAK_MEMORY] = (max(value for _, value in on_device) if on_device else peak_bytes) / 2**20
    return {
        "values": {name: value for name, value in values.items() if value is not None},
        "series": {name: points for name, points in series.items() if name not in NOT_KEPT},
        "seconds": seconds,
    }
