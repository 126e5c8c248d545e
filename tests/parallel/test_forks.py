"""Forked ranks: as torchrun's, and no failure of theirs is lost or leaves anything running."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from forks import program, ranks
from processes import HAS_MEGATRON, HAS_TRAINING_LOOP, HELPERS, ROOT, needs_megatron, python, starts, torchrun
from test_layouts import MODELS, _case

pytestmark = pytest.mark.slow


@pytest.fixture
def script(tmp_path):
    def write(text: str):
        path = tmp_path / "script.py"
        imports = "import json, os, signal, subprocess, sys, threading, time"
        path.write_text(f"{imports}\nRANK = int(os.environ['RANK'])\n{text}")
        return path

    return write


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _all_end(pids, seconds=10) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(_runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(_runs, pids))


def _pids(folder) -> list[int]:
    return [int(file.name) for file in folder.iterdir()]


# Writes the process's number, and that of a process that it starts.
NOTE = """
def note(folder):
    open(os.path.join(folder, str(os.getpid())), "w").close()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(os.path.join(folder, str(child.pid)), "w").close()
note(sys.argv[1])
"""


@needs_megatron
def test_the_same_bits_as_under_torchrun(tmp_path):
    """Under torchrun each rank hashes strings in its own way, too."""
    layout = {"expert_model_parallel_size": 2}
    cases = [_case(MODELS[name], 1.0) for name in ("plain", "peers, per-token loss, padding, full recompute")]
    (tmp_path / "job.json").write_text(json.dumps([layout, cases]))
    for run in (torchrun, ranks):
        run(2, "layouts.py", tmp_path / "job.json", tmp_path / f"{run.__name__}.pt")
    expected, found = (torch.load(tmp_path / f"{name}.pt") for name in ("torchrun", "ranks"))
    assert len(expected) == len(found) == 2
    for one, other in zip(expected, found):
        assert one["losses"] == other["losses"] and one["diagnostics"] == other["diagnostics"]
        assert one["gradients"].keys() == other["gradients"].keys()
        assert all(torch.equal(g, other["gradients"][name]) for name, g in one["gradients"].items())


def test_the_server_has_imported_and_initialized_nothing(script):
    modules = ["torch"] + ["megatron.core"] * HAS_MEGATRON + ["megatron.training.training"] * HAS_TRAINING_LOOP
    path = script(
        "import random, numpy, torch\n"
        "print(json.dumps({\n"
        f"    'modules': [name for name in {modules} if name in MODULES],\n"
        "    'process group': torch.distributed.is_initialized(),\n"
        "    'threads': [len(os.listdir(f'/proc/{pid}/task')) for pid in (os.getpid(), os.getppid())],\n"
        "    'torch threads': torch.get_num_threads(),\n"
        "    'grad': torch.is_grad_enabled(),\n"
        "    'random': [random.random(), numpy.random.random(), torch.rand(()).item()],\n"
        "}))"
    )
    path.write_text("import sys\nMODULES = set(sys.modules)\n" + path.read_text())
    one, other = (json.loads(ranks(1, path)) for _ in range(2))
    assert all(x != y for x, y in zip(one.pop("random"), other.pop("random"), strict=True))
    assert one == other
    assert one == {"modules": modules, "process group": False, "threads": [1, 1], "torch threads": 1, "grad": True}


def test_ranks_meet_as_torchrun_s_do(script):
    """Two jobs at once, each with its own store."""
    path = script(
        "import torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "x = torch.tensor([10.0 ** RANK])\n"
        "dist.all_reduce(x)\n"
        "print(sys.argv[1:], x.item(), os.environ['LOCAL_RANK'], os.environ['WORLD_SIZE'])\n"
    )
    outputs = {}
    threads = [threading.Thread(target=lambda name=name: outputs.update({name: ranks(3, path, name)})) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in "ab":
        assert outputs[name].splitlines() == [f"['{name}'] 111.0 {rank} 3" for rank in range(3)]


def test_an_exception_of_one_rank_fails_with_its_output(script, tmp_path):
    (tmp_path / "pids").mkdir()
    path = script(
        f"{NOTE}"
        "print('rank', RANK, 'was here')\n"
        "if RANK == 1:\n"
        "    time.sleep(1)\n"
        "    raise ValueError('this one')\n"
        "import torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
    )
    begun = time.monotonic()
    with pytest.raises(AssertionError) as failed:
        ranks(2, path, tmp_path / "pids")
    assert time.monotonic() - begun < 60
    message = str(failed.value)
    assert message.startswith("rank 1 of 2 exited with 1:\nrank 1 was here\n") and "ValueError: this one" in message
    assert "rank 0 of 2 was ended by SIGKILL:\nrank 0 was here" in message
    assert "in init_process_group" in message  # where the other one was
    assert len(_pids(tmp_path / "pids")) == 4 and _all_end(_pids(tmp_path / "pids"))


@pytest.mark.parametrize(
    "end, problem",
    [
        ("sys.exit(7)", "exited with 7"),
        ("sys.exit('no such flag')", "exited with 1:\nno such flag"),
        ("os._exit(3)", "exited with 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "was ended by SIGKILL"),
        ("import ctypes; ctypes.string_at(0)", "was ended by SIGSEGV"),
    ],
)
def test_every_bad_end_fails(script, end, problem):
    with pytest.raises(AssertionError, match=f"rank 0 of 1 {problem}") as failed:
        ranks(1, script(end))
    assert "SIGSEGV" not in problem or "Fatal Python error: Segmentation fault" in str(failed.value)


def test_a_hang_fails_with_the_stacks_and_leaves_nothing(script, tmp_path):
    (tmp_path / "pids").mkdir()
    path = script(f"{NOTE}def waits_for_ever():\n    time.sleep(600)\nif RANK == 1:\n    waits_for_ever()\n")
    with pytest.raises(AssertionError) as failed:
        ranks(2, path, tmp_path / "pids", timeout=5)
    message = str(failed.value)
    assert message.startswith("not ended after 5 s\nrank 1 of 2 was ended by SIGKILL")
    assert "in waits_for_ever" in message and "rank 0 of 2" not in message
    assert len(_pids(tmp_path / "pids")) == 4 and _all_end(_pids(tmp_path / "pids"))


@pytest.mark.parametrize("number", [0, 2], ids=["interpreter", "torchrun"])
def test_what_starts_an_interpreter_leaves_nothing_either(script, tmp_path, number):
    (tmp_path / "pids").mkdir()
    path = script(f"open(os.path.join({str(tmp_path / 'pids')!r}, str(os.getpid())), 'w').close(); time.sleep(600)")
    with pytest.raises(AssertionError, match="not ended after"):
        torchrun(number, path, timeout=20) if number else python(path, timeout=3, RANK=0)
    assert len(_pids(tmp_path / "pids")) == max(number, 1) and _all_end(_pids(tmp_path / "pids"))


def test_nothing_outlives_a_session_that_is_killed(script, tmp_path):
    (tmp_path / "pids").mkdir()
    path = script("open(os.path.join(sys.argv[1], str(os.getpid())), 'w').close(); time.sleep(600)")
    code = f"from forks import ranks; ranks(2, {str(path)!r}, {str(tmp_path / 'pids')!r})"
    session = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": f"{ROOT}:{HELPERS}"})
    deadline = time.monotonic() + 120
    while len(_pids(tmp_path / "pids")) < 2 and session.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    pids = _pids(tmp_path / "pids")
    assert len(pids) == 2 and all(map(_runs, pids))
    session.send_signal(signal.SIGKILL)
    session.wait()
    assert _all_end(pids)


def test_a_program_has_its_status_and_its_two_outputs(script, monkeypatch):
    monkeypatch.setenv("TO_BE_GONE", "1")
    path = script(
        "import atexit\n"
        "atexit.register(print, 'at exit')\n"
        "print(os.environ.get('TO_BE_GONE'), os.environ['ADDED'], sys.argv[1:], __name__)\n"
        "print('trouble', file=sys.stderr)\n"
        "sys.exit(5)\n"
    )
    ended = program(path, "--flag", RANK=0, ADDED=2, TO_BE_GONE=None)
    assert (ended.returncode, ended.stderr) == (5, "trouble\n")
    assert ended.stdout == "None 2 ['--flag'] __main__\nat exit\n"
    assert program("-m", "json.tool", "--help").stdout.startswith("usage: ")
    with pytest.raises(AssertionError, match="not ended after 1 s"):
        program(script("time.sleep(600)"), RANK=0, timeout=1)


def test_starts_are_counted(script):
    ranks(1, script(""))
    number, begun = len(starts["forks"]), time.monotonic()
    ranks(1, script("time.sleep(1)"))
    assert len(starts["forks"]) == number + 1 and starts["forks"][-1] < time.monotonic() - begun - 1
