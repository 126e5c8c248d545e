"""Train one model with each of several specialization losses and compare them (``make compare``).

A sweep on one seed chooses a multiple of each paper's coefficients; then every arm trains with the same seeds, data
order and initial weights. Every finished run is kept: the same command goes on after an interruption.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

from examples.compare import arms, report, runs, schedule
from examples.quickstart import training
from megatron_moe_spec.report import runs as results

CALIBRATION_ITERATIONS = 40
MIN_ITERATIONS = 100
SWEEP_SEED = 1000
FIRST_SEED = 1  # Megatron refuses 0
# An evaluation pass is about a third of a step, and there are six of up to 20 passes.
EVALUATION_STEPS = 45


def parse_options(arguments=None):
    parser = argparse.ArgumentParser(
        "python -m examples.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget-minutes", type=float, default=60, help="what to plan for (default: %(default)g)")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each arm (default: %(default)s)")
    names = [arm.name for arm in arms.ARMS if arm.name != arms.BASELINE]
    parser.add_argument("--arms", nargs="+", choices=names, default=names, help="beside the baseline (default: all)")
    parser.add_argument("--no-sweep", action="store_true", help="take the papers' coefficients as they are")
    parser.add_argument("--iterations", type=int, help="training steps of a run (default: what the budget allows)")
    parser.add_argument("--workers", type=int, help="runs at a time (default: one a CPU core, or one a GPU)")
    parser.add_argument("--output", type=Path, default=training.ROOT / "build/compare", help="default: build/compare")
    options = parser.parse_args(arguments)
    for name, least in (("seeds", 1), ("iterations", 4), ("workers", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name} must be at least {least}")
    if not options.budget_minutes > 0:
        parser.error("--budget-minutes must be positive")
    options.output = options.output.resolve()
    return options


def iterations_for(budget_seconds: float, number_of_runs: int, workers: int, start_up: float, step: float) -> int:
    """Training steps of a run, so that all runs fit the budget with a tenth to spare.

    Raises:
        SystemExit: too few to mean anything.
    """
    rounds = -(-number_of_runs // workers)
    iterations = int((0.9 * budget_seconds / rounds - start_up) / step) - EVALUATION_STEPS
    if iterations < MIN_ITERATIONS:
        needed = rounds * (start_up + (MIN_ITERATIONS + EVALUATION_STEPS) * step) / 0.9 / 60
        sys.exit(
            f"{number_of_runs} runs of at least {MIN_ITERATIONS} steps take about {needed:.0f} minutes here: raise "
            "--budget-minutes, or lower --seeds, or leave the sweep out with --no-sweep"
        )
    return iterations // 20 * 20


def calibrate(machine, scale, prefix, output, workers) -> tuple:
    """Seconds that a run needs to start, and that a step takes, with all workers busy."""
    folder = output / "calibration"
    probes = [runs.Run("both", 1, seed) for seed in range(FIRST_SEED, FIRST_SEED + workers)]
    for probe in probes:  # a calibration that was cut off is made anew
        (folder / "runs" / probe.name / runs.RESULT_FILE).unlink(missing_ok=True)
    print(f"Timing {workers} run(s) of {CALIBRATION_ITERATIONS} steps", flush=True)
    runner = runs.Runner(machine, scale, CALIBRATION_ITERATIONS, prefix, workers)
    runner.run_all(probes, folder, {})
    # The first steps are slower: they count as starting.
    late = [values[len(values) // 2 :] for values in (runs.step_times(folder, probe) for probe in probes)]
    step = statistics.fmean(results.median(values) for values in late)
    longest = max(runs.result_of(folder, probe)["seconds"] for probe in probes)
    return max(0.0, longest - CALIBRATION_ITERATIONS * step), step


def make_plan(options, machine, scale, workers, prefix) -> dict:
    """Contents of the comparison; kept, so that a restart goes on with the same."""
    seeds = list(range(FIRST_SEED, FIRST_SEED + options.seeds))
    compared = arms.selected(options.arms)
    number_of_runs = len(runs.final(seeds, {}, compared))
    number_of_runs += 0 if options.no_sweep else len(runs.sweep(SWEEP_SEED, compared))
    iterations = options.iterations
    if iterations is None:
        timing = calibrate(machine, scale, prefix, options.output, workers)
        iterations = iterations_for(options.budget_minutes * 60, number_of_runs, workers, *timing)
        print(f"{number_of_runs} runs of {iterations} steps should take about {options.budget_minutes:g} minutes")
    packages = ("torch", "megatron-core", "megatron_moe_spec")
    return {
        "iterations": min(iterations, scale.max_iterations),
        "arms": [arm.name for arm in compared],
        "seeds": seeds,
        "sweep_seed": None if options.no_sweep else SWEEP_SEED,
        "tokens_per_step": scale.tokens_per_step,
        "shape": scale.shape,
        "workers": workers,
        "machine": asdict(machine),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def plan_of(options, machine, scale, workers, prefix) -> dict:
    """The plan of an earlier start, with the arms and seeds that have been added since, or a new one.

    Raises:
        SystemExit: the earlier one is another than what is asked for, or has more.
    """
    path = options.output / "plan.json"
    if path.exists():
        plan = json.loads(path.read_text())
        asked = {"seeds": list(range(FIRST_SEED, FIRST_SEED + options.seeds)), "machine": asdict(machine)}
        asked["arms"] = [arm.name for arm in arms.selected(options.arms)]
        asked["sweep_seed"] = None if options.no_sweep else SWEEP_SEED
        if options.iterations is not None:
            asked["iterations"] = options.iterations
        added = [name for name in ("arms", "seeds") if set(plan[name]) < set(asked[name])]
        different = [name for name, value in asked.items() if plan[name] != value and name not in added]
        if different:
            sys.exit(
                f"{training.shown(options.output)} holds a comparison with other settings ({', '.join(different)}): "
                "remove it, or choose another --output"
            )
        print(f"Going on with the comparison in {training.shown(options.output)}", flush=True)
        plan.update({name: asked[name] for name in added})
    else:
        plan = make_plan(options, machine, scale, workers, prefix)
    path.write_text(json.dumps(plan, indent=2) + "\n")
    return plan


def main():
    options = parse_options()
    training.make_output(options.output, "COMPARE_ARGS")
    machine = training.detect_machine()
    if machine.loop != "megatron.training":
        sys.exit("The comparison trains by megatron.training, which comes with megatron-core >= 0.17 (Python >= 3.12).")
    workers = options.workers or (len(os.sched_getaffinity(0)) if machine.cpu else machine.processes)
    machine = replace(machine, processes=1)
    scale = schedule.CPU if machine.cpu else schedule.GPU
    prefix = options.output / "data" / "stdlib"
    training.make_data(prefix)

    plan = plan_of(options, machine, scale, workers, prefix)
    runner = runs.Runner(machine, scale, plan["iterations"], prefix, workers)
    began = time.monotonic()
    scales, seeds, compared = {}, plan["seeds"], arms.selected(plan["arms"])
    if plan["sweep_seed"] is not None:
        print("Choosing coefficients", flush=True)
        later = len(runs.final(seeds, {}, compared))
        runner.run_all(runs.sweep(plan["sweep_seed"], compared), options.output, {}, later)
        scales = runs.chosen_scales(options.output, plan["sweep_seed"], compared)
        print("Chosen: " + ", ".join(f"{name} x{scale:g}" for name, scale in scales.items()))
    print("Comparing", flush=True)
    runner.run_all(runs.final(seeds, scales, compared), options.output, scales)
    print(f"Finished, {(time.monotonic() - began) / 60:.0f} min since this start")
    report.write(options.output)
