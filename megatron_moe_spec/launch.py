"""Runs an unedited Megatron training script with the losses' flags and hooks.

torchrun <torchrun's flags> -m megatron_moe_spec.launch [--cpu] SCRIPT <the script's flags>
"""

import os
import runpy
import shlex
import sys
from pathlib import Path
from typing import Optional

import torch

from megatron_moe_spec.arguments import add_moe_spec_args, spec_config_from_args, spec_config_from_command_line

_USAGE = """usage: torchrun ... -m megatron_moe_spec.launch [--cpu] SCRIPT [SCRIPT'S FLAGS ...]

Runs a Megatron training script, such as pretrain_gpt.py, with the flags --moe-specialization-loss-coeff,
--moe-coupling-loss-coeff and the others of this package added to its own. Nothing of the script or of Megatron
is edited.

  --cpu   run on CPU with gloo, without a GPU: for development, teaching and tests, not for real training
"""
# What torchrun sets, and what stands for it where others start the processes (srun, mpirun, PMI).
_STARTED_BY = ("RANK", "MASTER_ADDR", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
_guards: list = []  # of this process, until it ends


def _asked() -> bool:
    """Whether the command line asks for losses or metrics."""
    return spec_config_from_command_line().enabled


def install() -> None:
    """Gives the next ``megatron.training.pretrain`` of this process the flags and the losses.

    For a script of one's own, anywhere before Megatron parses its arguments. It adds neither to a Megatron that was
    changed by one of ``patches/``. A training loop that is not ``pretrain``'s, and attaches no losses itself, is
    stopped before its first step where the command line asks for losses.

    Raises:
        ImportError: megatron-core or megatron.training is missing, or too old.
        ValueError: a flag of this package has no fitting value; the message names it.
    """
    from megatron_moe_spec.integration import training

    training.install(add_moe_spec_args, spec_config_from_args)
    asked = _asked()
    # A script may set sys.argv for Megatron's parser later, or empty it.
    _guards.append(training.AttachedGuard(lambda: asked or _asked()))


def main(argv: list[str]) -> int:
    """Runs ``[--cpu] SCRIPT flags``; returns the exit status: 2 for bad use, 1 if the losses were never attached."""
    on_cpu = argv[:1] == ["--cpu"]
    command = argv[1:] if on_cpu else argv
    if not command or command[0].startswith("-"):
        asked = command[:1] in (["-h"], ["--help"])
        print(_USAGE, end="", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    script = Path(command[0])
    # As `python SCRIPT` would have it: a Megatron-LM checkout around the script comes before installed packages.
    sys.argv = command
    sys.path.insert(0, str(script.resolve().parent))
    problem = _problem(script, on_cpu)
    if problem:
        return _fail(problem, 2)
    if on_cpu:
        from megatron_moe_spec.cpu import enable

        enable()
    install()
    asked = _asked()
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as leaving:
        if leaving.code:
            raise
    from megatron_moe_spec.integration.training import NEVER_ATTACHED, never_attached

    return _fail(NEVER_ATTACHED, 1) if never_attached(lambda: asked) else 0


def _problem(script: Path, on_cpu: bool) -> Optional[str]:
    """The mistake in the command line, with its remedy, or None; ``sys.argv`` is the script's."""
    if not script.is_file():
        return f"no such script: {script}"
    try:
        _asked()
    except ValueError as error:
        return str(error)
    if {"-h", "--help"} & set(sys.argv):
        return None
    start = "torchrun --nproc-per-node PROCESSES -m megatron_moe_spec.launch"
    if not any(name in os.environ for name in _STARTED_BY):
        flag = "--cpu " if on_cpu else ""
        return f"torchrun has to start it, for one process too: {start} {flag}{shlex.join(sys.argv)}"
    if not (on_cpu or torch.cuda.is_available() or torch.accelerator.is_available()):  # of another vendor
        return f"torch sees no GPU. To run on CPU, put --cpu before the script: {start} --cpu {shlex.join(sys.argv)}"
    return None


def _fail(problem: str, status: int) -> int:
    print(f"megatron_moe_spec.launch: {problem}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
