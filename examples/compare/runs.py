"""The runs of an experiment: which there are, running several at a time, and what each leaves behind."""

import json
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from examples.compare.arms import Arm
from examples.compare.experiments import TINY, TINY_EXPERTS, TINY_ITERATIONS, Experiment
from examples.compare.table import Table
from examples.quickstart import training
from examples.quickstart.progress import Progress
from megatron_moe_spec.report import runs as results

POLL_SECONDS = 0.5
SCRIPT = "examples/compare/train.py"
WEIGHTS = "weights.pt"
FOUND = "found.json"
MEASUREMENTS = 30  # of a run; they cost time


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm.name}-seed{self.seed}"


def wanted(experiment: Experiment, names, seeds) -> list:
    """The runs of arms of these names, what they start from included, in the order in which they should run."""
    started = {one.start for one in experiment.all_arms if one.name in names}
    chosen = [[one for one in group if one.name in names or one.name in started] for group in experiment.arms]
    return [Run(one, seed) for group in chosen for seed in seeds for one in group]


@dataclass
class Runner:
    """Runs what the table lacks, several at a time, each in a process of its own.

    Attributes:
        machine: where, with one process a run.
        corpus: folder of the text.
        work: folder for what runs write while they go on.
        workers: runs at a time.
        tiny: to try everything in seconds.
    """

    experiment: Experiment
    machine: training.Machine
    corpus: Path
    work: Path
    workers: int
    tiny: bool = False
    stream = sys.stdout

    @property
    def iterations(self) -> int:
        return TINY_ITERATIONS if self.tiny else self.experiment.iterations

    def command(self, run: Run) -> list:
        folder, experiment = self.work / run.name, self.experiment
        flags = [*experiment.flags(run.seed), *run.arm.flags]
        with_experts = "--num-experts" in flags
        if self.tiny:
            flags += [*TINY, *(TINY_EXPERTS if with_experts else [])]
        if with_experts:
            flags += ["--moe-spec-metrics-interval", str(max(1, self.iterations // MEASUREMENTS))]
            flags += ["--evaluate-experts", *map(str, experiment.fewer)] if experiment.fewer else []
        if run.arm.start:
            flags += ["--upcycle", str(self.weights(run.arm.start, run.seed))]
        if run.arm.name in {one.start for one in experiment.all_arms}:
            flags += ["--keep-weights", str(folder / WEIGHTS)]
        flags += ["--held-out", str(self.corpus / "held_out.npz"), "--results", str(folder / FOUND)]
        return training.megatron_command(
            self.machine, flags, self.corpus / "train", folder, [sys.executable], SCRIPT, split="99,1,0"
        )

    def weights(self, arm_name: str, seed: int) -> Path:
        return self.work / f"{arm_name}-seed{seed}" / WEIGHTS

    def missing(self, runs: list, table: Table) -> list:
        """What is to be run: what the table lacks, and what such a run starts from, where its weights are gone."""
        lacking = [run for run in runs if (run.arm.name, run.seed) not in table]
        starts = {(run.arm.start, run.seed) for run in lacking if run.arm.start}
        gone = {start for start in starts if not self.weights(*start).exists()}
        return [run for run in runs if run in lacking or (run.arm.name, run.seed) in gone]

    def run_all(self, runs: list, table: Table, seconds: float = float("inf")) -> bool:
        """Runs what is missing; returns whether nothing is. Stops everything and exits if a run fails.

        Args:
            seconds: no run is started that would not end before, if it takes as long as the longest one here.
        """
        began = time.monotonic()
        waiting = self.missing(runs, table)
        if len(waiting) < len(runs):
            print(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished already", file=self.stream)
        if not waiting:
            return True
        # smoothing=0: runs side by side end in bursts.
        progress = Progress(len(waiting), "run", self.stream, desc="finished", smoothing=0)
        active, longest = [], 0.0
        try:
            while waiting or active:
                in_time = time.monotonic() - began + longest <= seconds
                while in_time and len(active) < self.workers and (run := self._next(waiting)):
                    waiting.remove(run)
                    free = min(set(range(self.workers)) - {job.worker for job in active})
                    active.append(self._start(run, free))
                if not active:
                    return False
                time.sleep(POLL_SECONDS)
                for job in [job for job in active if not job.running()]:
                    active.remove(job)
                    longest = max(longest, job.seconds)
                    table.add(job.row())
                    progress.write(job.summary(), file=self.stream)
                    progress.update()
        finally:
            progress.close()
            for job in active:
                job.stop()
        return True

    def _next(self, waiting: list):
        """The first run whose start is there."""
        ready = (run for run in waiting if not run.arm.start or self.weights(run.arm.start, run.seed).exists())
        return next(ready, None)

    def _start(self, run: Run, worker: int) -> "_Job":
        # What torchrun would set for one process, without the seconds that it takes.
        variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        if not self.machine.cpu:
            variables["CUDA_VISIBLE_DEVICES"] = str(worker)
        folder = self.work / run.name
        return _Job(run, folder, worker, self.iterations, training.start(self.command(run), folder, variables))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class _Job:
    """A run that is under way."""

    def __init__(self, run: Run, folder: Path, worker: int, iterations: int, process):
        self.run = run
        self.folder = folder
        self.worker = worker
        self.iterations = iterations
        self.process = process
        self.began = time.monotonic()
        self.peak_bytes = 0

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    def running(self) -> bool:
        """Whether it goes on; takes a look at its memory and at the clock, too."""
        try:
            self.peak_bytes = max(self.peak_bytes, psutil.Process(self.process.pid).memory_info().rss)
        except psutil.Error:
            pass
        self.ended = time.monotonic()
        return self.process.poll() is None

    def row(self) -> dict:
        """Everything that the run found, or exits if it failed."""
        if self.process.returncode:
            sys.exit(training.account_of_failure(self.run.name, self.process.returncode, self.folder))
        self.found = json.loads((self.folder / FOUND).read_text())
        series = training.series_of(self.folder)
        window = max(1, self.iterations // 10)
        trained = {name: results.final(points, self.iterations, window) for name, points in series.items()}
        trained.pop(results.VALIDATION_LOSS, None)  # Megatron's own, of one batch
        trained[results.STEP_TIME] = results.median(series.get(results.STEP_TIME, []))
        assert not trained.keys() & self.found.keys(), "one would hide the other"
        return {
            "arm": self.run.arm.name,
            "seed": self.run.seed,
            **self.found,
            **{name: value for name, value in trained.items() if value is not None},
            "peak_memory_mb": self.peak_bytes / 2**20,
            "seconds": self.seconds,
        }

    def summary(self) -> str:
        return f"{self.run.name}: validation loss {self.found['validation_loss']:.4f}, {self.seconds:.0f} s"

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()
