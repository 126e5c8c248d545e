"""Train a tiny Mixture-of-Experts model without and with the losses, and write a report (``make quickstart``)."""

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from examples.quickstart import report, settings
from examples.quickstart.progress import Progress
from examples.quickstart.training import (
    ROOT,
    account_of_failure,
    detect_machine,
    make_data,
    make_output,
    megatron_command,
    megatron_steps,
    start,
    torchrun,
)


def command(machine, options, prefix, folder, coefficients):
    """The command line of one arm."""
    losses = [
        f"--moe-specialization-loss-coeff={coefficients['specialization']}",
        f"--moe-coupling-loss-coeff={coefficients['coupling']}",
        f"--moe-spec-metrics-interval={min(settings.LOG_INTERVAL, options.iterations)}",
        f"--moe-spec-trace-path={folder / 'traces'}",
        f"--moe-spec-trace-interval={max(1, options.iterations // settings.TRACED_STEPS)}",
    ]
    if machine.loop == "megatron.core":
        cpu = ["--cpu"] if machine.cpu else []
        script = [str(ROOT / "examples/pretrain_core.py"), *cpu, f"--data-path={prefix}", f"--output={folder}"]
        length = [f"--iterations={options.iterations}", *settings.validation(options.iterations)]
        return [*torchrun(machine.processes), *script, *length, f"--seed={options.seed}", *losses]
    flags = [*settings.MODEL, *settings.schedule(options.iterations, options.seed), *losses]
    return megatron_command(machine, flags, prefix, folder)


def core_steps(text):
    """(iteration, lm loss) from the JSON lines of examples/pretrain_core.py; a line still being written is left out."""
    records = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    return [(record["iteration"], record["lm_loss"]) for record in records if "lm_loss" in record]


def train(name, arm_command, folder, iterations, watched, steps_of, progress):
    """Run one arm to its end; on failure, show the end of its log and leave."""
    before = progress.n

    def show():
        steps = steps_of(watched.read_text(errors="replace")) if watched.exists() else []
        if steps:
            if not progress.n:
                progress.unpause()  # starting takes longer than steps do
            iteration, loss = steps[-1]
            progress.advance(before + iteration, f"loss {loss:.3f}")

    process = start(arm_command, folder)
    progress.set_postfix_str("importing PyTorch and Megatron", refresh=False)
    progress.set_description_str(name)
    try:
        while process.poll() is None:
            time.sleep(0.5)
            show()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if process.returncode:
        progress.close()
        sys.exit(account_of_failure(name, process.returncode, folder))
    show()
    progress.update(before + iterations - progress.n)  # the last ones may not have been logged


def describe(machine, options):
    """Facts for the report about how it was made."""
    versions = {package: version(package) for package in ("torch", "megatron-core", "megatron_moe_spec")}
    return {
        "iterations": options.iterations,
        "seed": options.seed,
        "tokens_per_step": settings.TOKENS_PER_STEP,
        "coefficients": coefficients_of(options),
        "machine": asdict(machine),
        "versions": {"python": platform.python_version(), **versions},
    }


def coefficients_of(options):
    return {
        "baseline": {"specialization": 0.0, "coupling": 0.0},
        "specialized": {"specialization": options.specialization_coeff, "coupling": options.coupling_coeff},
    }


def parse_options(arguments=None):
    parser = argparse.ArgumentParser("python -m examples.quickstart", description=__doc__)
    parser.add_argument("--iterations", type=int, default=450, help="training steps of each run (default: %(default)s)")
    parser.add_argument("--specialization-coeff", type=float, default=2e-2, help="default: %(default)s")
    parser.add_argument("--coupling-coeff", type=float, default=1e-2, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1234, help="of weights and data order, in both runs")
    parser.add_argument("--output", type=Path, default=ROOT / "build/quickstart", help="default: build/quickstart")
    options = parser.parse_args(arguments)
    if options.iterations < 2:
        parser.error("--iterations must be at least 2")
    if options.specialization_coeff < 0 or options.coupling_coeff < 0:
        parser.error("--specialization-coeff and --coupling-coeff must not be negative")
    options.output = options.output.resolve()
    return options


def main():
    options = parse_options()
    make_output(options.output, "QUICKSTART_ARGS")
    machine = detect_machine()
    prefix = options.output / "data" / "stdlib"
    print(f"Training by {machine.loop} {version('megatron-core')}, {machine.processes} process(es), {machine.device}")
    if machine.loop == "megatron.core":
        print(
            "This Megatron-Core has no megatron.training (that needs Python >= 3.12): using examples/pretrain_core.py."
        )
    make_data(prefix)

    for stale in ("run.json", "report.md", "report.html", "curves.png"):
        (options.output / stale).unlink(missing_ok=True)
    start = time.monotonic()
    description = describe(machine, options)
    with Progress(options.iterations * len(settings.ARMS), "step") as progress:
        for name in settings.ARMS:
            folder = options.output / name
            arm_command = command(machine, options, prefix, folder, description["coefficients"][name])
            if machine.loop == "megatron.core":
                log = (folder / "log.jsonl", core_steps)
            else:
                log = (folder / "log.txt", megatron_steps)
            train(name, arm_command, folder, options.iterations, *log, progress)
    description["seconds"] = round(time.monotonic() - start)
    (options.output / "run.json").write_text(json.dumps(description, indent=2) + "\n")
    report.write(options.output)
