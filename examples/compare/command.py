"""Run experiments with and without the losses, and report what differs (``make compare``).

Every finished run is kept: the same command goes on after an interruption, or after --budget-minutes.
docs/evidence/protocol.md describes the experiments.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

from examples.compare import data, report
from examples.compare.arms import BASELINE
from examples.compare.experiments import EXPERIMENTS
from examples.compare.runs import Runner, wanted
from examples.compare.table import Table
from examples.quickstart import training

PACKAGES = ("torch", "megatron-core", "megatron_moe_spec")


def parse_options(arguments=None):
    parser = argparse.ArgumentParser(
        "python -m examples.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiment", choices=EXPERIMENTS, default="text", help="default: %(default)s")
    parser.add_argument(
        "--arms", nargs="+", metavar="ARM", help="beside those that they are compared with; default: all"
    )
    parser.add_argument("--seeds", type=int, help="runs of each arm (default: what the protocol says)")
    parser.add_argument("--budget-minutes", type=float, default=float("inf"), help="start no run that would end later")
    parser.add_argument("--workers", type=int, help="runs at a time (default: one a CPU core, or one a GPU)")
    parser.add_argument("--tiny", action="store_true", help="a few steps of a tiny model, to try the experiment")
    parser.add_argument("--data-only", action="store_true", help="make the text, for a machine without a network")
    parser.add_argument("--output", type=Path, help="default: build/compare/EXPERIMENT")
    options = parser.parse_args(arguments)
    experiment = EXPERIMENTS[options.experiment]
    names = [one.name for one in experiment.all_arms]
    unknown = [name for name in options.arms or () if name not in names]
    if unknown:
        parser.error(f"--arms {unknown[0]}: {options.experiment} has {', '.join(names)}")
    if options.seeds is not None and not 1 <= options.seeds <= len(experiment.seeds):
        parser.error(f"--seeds must be 1 to {len(experiment.seeds)}")
    if options.workers is not None and options.workers < 1:
        parser.error("--workers must be at least 1")
    if not options.budget_minutes > 0:
        parser.error("--budget-minutes must be positive")
    options.name = f"{options.experiment}-tiny" if options.tiny else options.experiment
    options.output = (options.output or training.ROOT / "build/compare" / options.name).resolve()
    return options


def settings_of(experiment, options, machine, corpus) -> dict:
    """What all runs of a table have in common."""
    return {
        "experiment": options.experiment,
        "flags": " ".join(experiment.flags("SEED")),
        "corpus": data.digest(corpus),
        "tiny": options.tiny,
        "machine": asdict(machine),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def keep(settings: dict, path: Path) -> None:
    """Writes the settings, or leaves if the folder holds runs of others.

    Raises:
        SystemExit: they are others.
    """
    if path.exists():
        earlier = json.loads(path.read_text())
        different = [name for name in settings if earlier.get(name) != settings[name]]
        if different:
            sys.exit(
                f"{training.shown(path.parent)} holds runs with other settings ({', '.join(different)}): remove it, or "
                "choose another --output"
            )
    path.write_text(json.dumps(settings, indent=2) + "\n")


def main(arguments=None):
    options = parse_options(arguments)
    experiment = EXPERIMENTS[options.experiment]
    training.make_output(options.output, "COMPARE_ARGS")
    machine = training.detect_machine()
    if machine.loop != "megatron.training":
        sys.exit("The experiments train by megatron.training, which comes with megatron-core >= 0.17 (Python >= 3.12).")
    corpus = training.ROOT / "build/compare/data" / experiment.corpus
    # In a process of its own: importing Megatron here would cost memory.
    making = [sys.executable, "-W", "ignore", "-m", data.__name__, experiment.corpus, str(corpus)]
    if subprocess.run(making, cwd=training.ROOT).returncode:
        sys.exit(1)
    if options.data_only:
        return
    workers = options.workers or (len(os.sched_getaffinity(0)) if machine.cpu else machine.processes)
    machine = replace(machine, processes=1)
    keep(settings_of(experiment, options, machine, corpus), options.output / "settings.json")

    asked = set(options.arms or [one.name for one in experiment.all_arms])
    # A baseline for each: of every hypothesis about an arm that is asked for.
    asked |= {one.against for tests in experiment.families.values() for one in tests if one.arm in asked} or {BASELINE}
    runs = wanted(experiment, asked, experiment.seeds[: options.seeds])
    work = training.ROOT / "build/compare/runs" / options.name
    table = Table(options.output / "runs.csv")
    runner = Runner(experiment, machine, corpus, work, workers, options.tiny)
    finished = runner.run_all(runs, table, options.budget_minutes * 60)
    report.write(experiment, table, options.output)
    if not finished:
        print(f"{len(runner.missing(runs, table))} of {len(runs)} runs are left: the same command goes on with them")
