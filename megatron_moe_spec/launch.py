"""Runs an unedited Megatron training script with the losses' flags and hooks.

    torchrun <torchrun's flags> -m megatron_moe_spec.launch [--cpu] SCRIPT <the script's flags>
"""

import runpy
import sys
from pathlib import Path

from megatron_moe_spec.arguments import add_moe_spec_args, spec_config_from_args

_USAGE = """usage: torchrun ... -m megatron_moe_spec.launch [--cpu] SCRIPT [SCRIPT'S FLAGS ...]

Runs a Megatron training script, such as pretrain_gpt.py, with the flags --moe-specialization-loss-coeff,
--moe-coupling-loss-coeff and the others of this package added to its own. Nothing of the script or of Megatron
is edited.

  --cpu   run on CPU with gloo, without a GPU: for development, teaching and tests, not for real training
"""


def install() -> None:
    """Gives the next ``megatron.training.pretrain`` of this process the flags and the losses.

    For a script of one's own, anywhere before Megatron parses its arguments. It does nothing to a Megatron that was
    changed by one of ``patches/``.

    Raises:
        ImportError: megatron-core or megatron.training is missing, or too old.
    """
    from megatron_moe_spec.integration import training

    training.install(add_moe_spec_args, spec_config_from_args)


def main(argv: list[str]) -> int:
    """Runs ``[--cpu] SCRIPT flags``; returns the exit status of a usage error, or 0."""
    on_cpu = argv[:1] == ["--cpu"]
    command = argv[1:] if on_cpu else argv
    if not command or command[0].startswith("-"):
        asked = command[:1] in (["-h"], ["--help"])
        print(_USAGE, end="", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    script = Path(command[0])
    if not script.is_file():
        print(f"megatron_moe_spec.launch: no such script: {script}", file=sys.stderr)
        return 2
    # As `python SCRIPT` would have it: a Megatron-LM checkout around the script comes before installed packages.
    sys.argv = command
    sys.path.insert(0, str(script.resolve().parent))
    if on_cpu:
        from megatron_moe_spec.integration.cpu import enable

        enable()
    install()
    runpy.run_path(str(script), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
