"""``.ci/venv`` with fake interpreters: no network, and versions that no machine has."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.once]

# Answers the script's questions; a "pip install" is written down and ends as the file "pip" beside the calls says.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
    *version_info*) echo {version} ;;
    *ensurepip*) exit {venv_missing} ;;
    "-m venv "*) mkdir -p "$3/bin"; touch "$3/pyvenv.cfg"; cp "$0" "$3/bin/python" ;;
    *"pip --version"*) ;;
    *"pip install"*) echo "$*" >>{calls}; if [ -f {pip} ]; then . {pip}; fi ;;
esac
"""
BROKEN_SHIM = "#!/bin/sh\necho 'command not found; it exists in these versions: 3.91' >&2\nexit 127\n"


class Machine:
    """A repository with the script, and a PATH with the interpreters that a test puts there."""

    def __init__(self, folder):
        self.repository = folder / "repository"
        self.bin = folder / "bin"
        self.pyenv = folder / "pyenv"
        self.calls = folder / "calls"
        self.pip = folder / "pip"
        (self.repository / ".ci").mkdir(parents=True)
        self.bin.mkdir()
        shutil.copy(ROOT / ".ci/venv", self.repository / ".ci/venv")
        self.pyproject = self.repository / "pyproject.toml"
        self.pyproject.write_text("[project]\n")

    def add(self, path, version, venv_missing=0):
        self.write(path, FAKE_PYTHON.format(version=version, venv_missing=venv_missing, calls=self.calls, pip=self.pip))
        return str(path)

    def write(self, path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def start(self, *arguments, **variables):
        environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(self.repository),
            "PYENV_ROOT": str(self.pyenv),
            **variables,
        }
        return subprocess.Popen(
            [str(self.repository / ".ci/venv"), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments, **variables):
        process = self.start(*arguments, **variables)
        process.out, process.err = process.communicate(timeout=60)
        return process

    def installs(self):
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_find_prefers_the_first_version_in_either_direction(machine):
    low = machine.add(machine.bin / "python3.91", "3.91")
    high = machine.add(machine.bin / "python3.92", "3.92")
    assert machine.run("--find", "3.90", "3.92").out.strip() == low
    assert machine.run("--find", "3.92", "3.90").out.strip() == high


def test_find_asks_the_interpreter_and_not_its_name(machine):
    machine.write(machine.bin / "python3.91", BROKEN_SHIM)
    machine.add(machine.bin / "python3", "3.95")
    real = machine.add(machine.pyenv / "versions/3.91.4/bin/python", "3.91")
    assert machine.run("--find", "3.91", "3.93").out.strip() == real


def test_find_takes_plain_python3_of_a_fitting_version(machine):
    python = machine.add(machine.bin / "python3", "3.92")
    assert machine.run("--find", "3.91", "3.93").out.strip() == python


def test_find_passes_over_an_interpreter_without_venv(machine):
    bare = machine.add(machine.bin / "python3.91", "3.91", venv_missing=1)
    found = machine.run("--find", "3.91", "3.91")
    assert found.returncode == 3
    assert bare in found.err and "python3-venv" in found.err
    other = machine.add(machine.pyenv / "versions/3.91.0/bin/python", "3.91")
    assert machine.run("--find", "3.91", "3.91").out.strip() == other


def test_find_takes_the_interpreter_that_the_user_names(machine, tmp_path):
    machine.add(machine.bin / "python3.91", "3.91")
    named = machine.add(tmp_path / "elsewhere" / "python", "3.91")
    assert machine.run("--find", "3.91", "3.91", PYTHON=named).out.strip() == named


def test_no_interpreter_is_status_3_and_names_the_remedy(machine):
    for arguments in (("--find", "3.90", "3.92"), (".venv", "3.90", "3.92", "test")):
        failed = machine.run(*arguments)
        assert failed.returncode == 3
        assert "3.90 3.91 3.92" in failed.err and "PYTHON=" in failed.err


def test_wrong_usage_is_status_2(machine):
    assert machine.run(".venv").returncode == 2


def test_installs_extras_and_requirements_once(machine):
    machine.add(machine.bin / "python3.91", "3.91")
    arguments = (".venv", "3.91", "3.92", "megatron", "test", "--", "torch==2.13.0")
    assert machine.run(*arguments).returncode == 0
    (install,) = machine.installs()
    assert install.endswith("--editable .[megatron,test] torch==2.13.0")
    start = time.monotonic()
    again = machine.run(*arguments)
    assert again.returncode == 0 and again.err == ""
    assert time.monotonic() - start < 1
    assert len(machine.installs()) == 1


def test_installs_again_when_pyproject_or_the_extras_change(machine):
    machine.add(machine.bin / "python3.91", "3.91")
    machine.run(".venv", "3.91", "3.91", "test")
    machine.pyproject.write_text("[project]\nname = 'other'\n")
    machine.run(".venv", "3.91", "3.91", "test")
    machine.run(".venv", "3.91", "3.91", "test", "report")
    assert len(machine.installs()) == 3


def test_installs_again_when_the_constraints_change(machine):
    machine.add(machine.bin / "python3.91", "3.91")
    constraints = machine.repository / ".ci/constraints.txt"
    for text in ("torch==2.13.0", "torch==2.13.0", "torch==2.14.1"):
        constraints.write_text(text)
        machine.run(".venv", "3.91", "3.91", "test", "--", "--constraint", ".ci/constraints.txt")
    first, _ = machine.installs()
    assert first.endswith("--editable .[test] --constraint .ci/constraints.txt")


def test_failing_pip_is_reported_and_tried_again(machine):
    machine.add(machine.bin / "python3.91", "3.91")
    machine.pip.write_text("echo 'no network' >&2; exit 1")
    failed = machine.run(".venv", "3.91", "3.91", "test")
    assert failed.returncode == 1
    assert "no network" in failed.err and "run the same command again" in failed.err
    machine.pip.unlink()
    kept = machine.repository / ".venv/kept"
    kept.touch()
    assert machine.run(".venv", "3.91", "3.91", "test").returncode == 0
    assert kept.exists(), "pip undoes its own failures: the environment need not be made anew"


def test_cut_off_installation_starts_anew(machine):
    machine.add(machine.bin / "python3.91", "3.91")
    machine.pip.write_text("exec sleep 60")
    process = machine.start(".venv", "3.91", "3.91", "test")
    deadline = time.monotonic() + 20
    while not machine.installs() and time.monotonic() < deadline:
        time.sleep(0.05)
    half_done = machine.repository / ".venv/half-done"
    half_done.touch()
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode != 0
    machine.pip.unlink()
    repaired = machine.run(".venv", "3.91", "3.91", "test")
    assert repaired.returncode == 0 and "cut off" in repaired.err
    assert not half_done.exists()


def test_environment_whose_python_is_gone_is_made_anew(machine):
    machine.add(machine.bin / "python3.91", "3.91")
    machine.run(".venv", "3.91", "3.91", "test")
    machine.write(machine.repository / ".venv/bin/python", "#!/bin/sh\nexit 127\n")
    assert machine.run(".venv", "3.91", "3.91", "test").returncode == 0
    assert len(machine.installs()) == 2


def test_a_folder_that_is_no_environment_is_left_alone(machine):
    machine.add(machine.bin / "python3.91", "3.91")
    precious = machine.repository / "data/file"
    precious.parent.mkdir()
    precious.touch()
    refused = machine.run("data", "3.91", "3.91", "test")
    assert refused.returncode == 1 and "not a virtual environment" in refused.err
    assert precious.exists()
