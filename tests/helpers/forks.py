"""Ranks and programs that start in a moment: forked from a process that has imported torch, Megatron and this package.

This process is multiprocessing's fork server: one for each test session, or worker of pytest-xdist. It has imported
``preloaded.py`` and initialized nothing. Tests of starting a program, or of what a fresh interpreter does, use
``processes.py`` instead.
"""

import atexit
import contextlib
import ctypes
import faulthandler
import multiprocessing.connection
import multiprocessing.forkserver
import os
import runpy
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from subprocess import CompletedProcess

from processes import HELPERS, ROOT, environment, starts

# Seconds in which the other ranks may end by themselves once one has failed.
GRACE = 1.0
# Of prctl(2): the signal that a process gets when its parent dies.
PR_SET_PDEATHSIG = 1

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["preloaded"])
_starting = threading.Lock()


def ranks(number: int, *command, timeout: float = 600, folders=()) -> str:
    """Runs a command as the ranks of one job, as ``torchrun --standalone`` does; returns what they printed.

    Args:
        number: of ranks. Their store is on a port of its own.
        command: a script and its arguments, or ``-m``, a module and its arguments; run in the helpers' folder.
        timeout: seconds.
        folders: to import from, besides those of the project and of the tests.

    Raises:
        AssertionError: a rank failed, crashed or hung. Holds the end of its output, and where its threads were if it
            hung. Nothing that the job started is running any more.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    job = dict(
        WORLD_SIZE=number, LOCAL_WORLD_SIZE=number, GROUP_RANK=0, GROUP_WORLD_SIZE=1,
        MASTER_ADDR="127.0.0.1", MASTER_PORT=store.port,
        TORCHELASTIC_USE_AGENT_STORE=True, TORCHELASTIC_RESTART_COUNT=0,
    )  # fmt: skip
    environments = [environment(**job, RANK=rank, LOCAL_RANK=rank) for rank in range(number)]
    ended, hung = _run(command, environments, timeout, folders)
    problems = [
        f"rank {rank} of {number} {_ending(one.returncode)}:\n{(one.stdout + one.stderr)[-6000:]}"
        for rank, one in enumerate(ended)
        if one.returncode
    ]
    # First those that ended by themselves.
    problems.sort(key=lambda problem: _ending(-signal.SIGKILL) in problem.partition("\n")[0])
    assert not problems, "\n".join([f"not ended after {timeout} s"] * hung + problems)
    return "".join(one.stdout for one in ended) + "".join(one.stderr for one in ended)


def program(*command, timeout: float = 300, **variables) -> CompletedProcess:
    """Runs a command, as ``ranks`` does, in one process that is no rank; returns its exit status, stdout and stderr.

    Args:
        variables: of the environment, as in ``processes.environment``.

    Raises:
        AssertionError: it has not ended after ``timeout`` seconds.
    """
    (ended,), hung = _run(command, [environment(**variables)], timeout)
    assert not hung, f"not ended after {timeout} s:\n{(ended.stdout + ended.stderr)[-6000:]}"
    return ended


def _ending(status: int) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"exited with {status}"


def _run(command, environments: list[dict], timeout: float, folders=()) -> tuple[list[CompletedProcess], bool]:
    """One process for each environment, all at once; how each ended, and whether any had to be ended for its time."""
    begun = time.time()
    _start_server()
    command, folders = [str(word) for word in command], [str(folder) for folder in folders]
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch) / str(number) for number in range(len(environments))]
        processes = [
            _context.Process(target=_become, args=(command, variables, folders, file))
            for variables, file in zip(environments, files)
        ]
        try:
            for process in processes:
                process.start()
            hung = _wait(processes, timeout)
        finally:
            for process in processes:
                _end(process)
        marks = [mark.stat().st_mtime for mark in Path(scratch).glob("*.begun")]
        starts["forks"].append(max(marks, default=time.time()) - begun)
        return [CompletedProcess(command, one.exitcode, *_outputs(file)) for one, file in zip(processes, files)], hung


def _outputs(file: Path) -> list[str]:
    """What a process wrote to stdout and to stderr; nothing if it ended before it could."""
    outputs = [file.with_suffix(suffix) for suffix in (".out", ".err")]
    return [output.read_text(errors="replace") if output.exists() else "" for output in outputs]


def _start_server() -> None:
    """Starts the server, if none is running, with the folders that it imports from."""
    with _starting:
        before = os.environ.pop("PYTHONPATH", None)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), str(HELPERS), before)))
        try:
            multiprocessing.forkserver.ensure_running()
        finally:
            del os.environ["PYTHONPATH"]
            if before is not None:
                os.environ["PYTHONPATH"] = before


def _wait(processes: list, timeout: float) -> bool:
    """Until all have ended, or one has failed and the others have not followed; whether the time was up before that."""
    running = {process.sentinel: process for process in processes}
    deadline, failed = time.monotonic() + timeout, False
    while running:
        ready = multiprocessing.connection.wait(running, max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for process in [running.pop(sentinel) for sentinel in ready]:
            process.join()
            if process.exitcode and not failed:
                failed, deadline = True, min(deadline, time.monotonic() + GRACE)
    for process in running.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGUSR1)  # writes the stacks of its threads
    if running:
        time.sleep(0.2)
    return bool(running) and not failed


def _end(process) -> None:
    """Ends a process and what it has started."""
    if process.pid is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # it may not have made its group yet
    process.join()


def _draw_seeds() -> None:
    """As each interpreter has its own; Python's own generators do so by themselves."""
    import numpy
    import torch

    numpy.random.seed()
    torch.default_generator.seed()


def _become(command: list[str], variables: dict[str, str], folders: list[str], file: Path) -> None:
    """In the new process: runs the command as a fresh interpreter would."""
    os.setsid()  # a process group, with all that it starts
    # There are more ranks, and threads of gloo, than cores: none is to interrupt another for a message.
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    # To end with the server, which ends with the session: once nobody holds the other end of this pipe.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.close(multiprocessing.forkserver._forkserver._forkserver_alive_fd)
    for suffix, stream in ((".out", sys.stdout), (".err", sys.stderr)):
        stream.flush()
        output = os.open(file.with_suffix(suffix), os.O_WRONLY | os.O_CREAT)
        os.dup2(output, stream.fileno())
        os.close(output)
        stream.reconfigure(line_buffering=True)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    import preloaded  # noqa: F401  The server has done it, and hides why it could not.

    os.environ.clear()
    os.environ.update({**variables, "CUDA_DEVICE_MAX_CONNECTIONS": "1"})  # as the CPU back end does
    os.chdir(HELPERS)
    _draw_seeds()
    of_module = command[0] == "-m"
    if not of_module:
        command[0] = os.path.abspath(command[0])  # which processes that it spawns import again
    sys.argv = command[of_module:]
    sys.path[:0] = [str(HELPERS) if of_module else os.path.dirname(command[0]), str(ROOT), str(HELPERS), *folders]
    file.with_suffix(".begun").touch()
    try:
        if of_module:
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out
