"""Starting training runs under torchrun and reading their logs."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from examples.quickstart import data, settings
from megatron_moe_spec.report.runs import RunError, read_run

ROOT = Path(__file__).resolve().parents[2]
TAIL_LINES = 30


@dataclass(frozen=True)
class Machine:
    """Resources of the runs: the training loop, the processes and the device."""

    loop: str  # "megatron.training" or "megatron.core"
    device: str
    processes: int
    cpu: bool


def detect_machine():
    import torch

    loop = "megatron.training" if importlib.util.find_spec("megatron.training") else "megatron.core"
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        return Machine(loop, torch.cuda.get_device_name(0), min(gpus, 2), cpu=False)
    return Machine(loop, f"CPU, {os.cpu_count()} cores", 2, cpu=True)


def torchrun(processes):
    # The address is given because a machine's own name does not resolve everywhere.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    return [*launcher, f"--nproc-per-node={processes}"]


def megatron_command(machine, flags, prefix, folder, launcher=None, script="examples/pretrain_gpt.py", split="90,5,5"):
    """The command line of a run by Megatron's own training loop.

    Args:
        flags: model, schedule and losses.
        prefix: of the data set.
        folder: where the run leaves its logs.
        launcher: start of the command; None: torchrun.
        script: that trains.
        split: shares of the data set to train, validate and test on.
    """
    return [
        *(launcher or torchrun(machine.processes)),
        *["-m", "megatron_moe_spec.launch"],
        *(["--cpu"] if machine.cpu else []),
        str(ROOT / script),
        *settings.PLAIN_TORCH,
        *["--distributed-backend", "gloo" if machine.cpu else "nccl"],
        *["--data-path", str(prefix), "--data-cache-path", str(prefix.parent / "cache"), "--split", split],
        *["--tokenizer-type", "NullTokenizer", "--vocab-size", str(data.VOCAB_SIZE)],
        *["--tensorboard-dir", str(folder / "tensorboard")],
        *flags,
    ]


def megatron_steps(text):
    """(iteration, lm loss) from Megatron's console lines."""
    pattern = re.compile(r"iteration\s+(\d+)/\s*\d+ \|.*?lm loss: (\S+)")
    return [(int(iteration), float(loss)) for iteration, loss in pattern.findall(text)]


def series_of(folder):
    """{measure: [(iteration, value), ...]} of a run; empty where it left nothing that can be read."""
    try:
        return read_run(folder).series
    except RunError:
        return {}


def make_data(prefix):
    """Builds the data set unless it is there, in a process of its own: importing Megatron here would cost memory."""
    made = subprocess.run([sys.executable, "-W", "ignore", data.__file__, str(shown(prefix))])
    if made.returncode:
        sys.exit(made.returncode)


def make_output(folder, variable):
    """Makes the folder of a report, or leaves with what to do where it cannot be written.

    Args:
        variable: of the Makefile, for the script's flags.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        sys.exit(
            f"Cannot write to {shown(folder)} ({error.strerror}). Name another folder: --output DIR, "
            f'or with make: {variable}="--output DIR"'
        )


def start(command, folder, variables=None):
    """Starts a run in an emptied folder; its log, with the command in the first line, is ``log.txt`` there.

    Args:
        variables: environment variables to set for it.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    environment = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ}
    environment.update(variables or {})
    with (folder / "log.txt").open("w") as output:
        output.write(f"{shlex.join(command)}\n")
        output.flush()
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment, cwd=ROOT
        )


def account_of_failure(name, status, folder):
    """Text about a run that failed: the end of its log, and where the log is."""
    log = folder / "log.txt"
    # torchrun adds its own account below the worker's; the cause stands above it.
    text = re.split(r"^.*torch/distributed/elastic", log.read_text(errors="replace"), maxsplit=1, flags=re.M)[0]
    tail = "\n".join(text.splitlines()[-TAIL_LINES:])
    return (
        f"\nThe {name} run failed (status {status}). The end of its log:\n\n{tail}\n\n"
        f"The whole log, with the command in its first line: {shown(log)}"
    )


def shown(path):
    """The path as a user in the current folder would type it."""
    path = Path(path).resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
