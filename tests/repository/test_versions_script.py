"""``.ci/versions.py`` with a release that pip need not fetch."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT

pytestmark = pytest.mark.once

specification = importlib.util.spec_from_file_location("versions", ROOT / ".ci" / "versions.py")
versions = importlib.util.module_from_spec(specification)
specification.loader.exec_module(versions)

REPORT = """<testsuites><testsuite errors="1" failures="2" skipped="3" tests="10" time="1.5"/></testsuites>"""


def test_counts():
    assert versions.count(REPORT) == {"passed": 4, "failed": 3, "skipped": 3}


def test_every_test_file_exists():
    assert all((ROOT / file).is_file() for file in versions.TESTS)


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """The command with pytest's results given: (exit status, report) by release."""

    def make(results):
        def run(command, **kwargs):
            name = Path(command[0]).parents[1].name
            release = "0.16.1" if name == "oldest" else name.removeprefix("base-")
            if "pytest" not in command:
                facts = "3.12.1 2.14.1" if command[2] == versions.FACTS else release
                return subprocess.CompletedProcess(command, 0, stdout=facts)
            status, report = results[release]
            (target,) = [a.removeprefix("--junitxml=") for a in command if a.startswith("--junitxml=")]
            if report:
                Path(target).write_text(report)
            return subprocess.CompletedProcess(command, status)

        monkeypatch.setattr(versions.subprocess, "run", run)
        return versions.main([str(tmp_path / "base"), str(tmp_path / "oldest"), *results])

    return make


PASSED = """<testsuite errors="0" failures="0" skipped="1" tests="5"/>"""


def test_table_and_exit_status(runs, capsys):
    assert runs({"0.16.1": (0, PASSED), "0.19.2": (0, PASSED)}) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[-1].startswith("| 0.19.2 | 3.12.1 | 2.14.1 | 4 | 0 | 1 | ")
    assert rows[-2].startswith("| 0.16.1 |") and rows[-4].startswith("| megatron-core | Python |")


@pytest.mark.parametrize("result", [(1, REPORT), (2, None), (4, PASSED)])
def test_failures_are_not_lost(runs, result):
    assert runs({"0.17.1": (0, PASSED), "0.18.2": result}) == 1


# Writes a package to where pip is told to install.
FAKE_PIP = """
import sys, pathlib
folder = pathlib.Path(sys.argv[sys.argv.index("--target") + 1])
(folder / "shared.py").write_text(f"origin = 'own {sys.argv[-1]}'")
"""


def test_borrowing_environment_puts_its_own_packages_first(tmp_path):
    base = tmp_path / "base"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", base], check=True)
    (packages,) = base.glob("lib/python*/site-packages")
    for module in ("shared", "lent"):
        (packages / f"{module}.py").write_text("origin = 'base'")
    (packages / "pip.py").write_text(FAKE_PIP)
    folder = versions.environment(base, "0.17.1")
    code = "import shared, lent; print(shared.origin, lent.origin)"
    found = subprocess.run([folder / "bin/python", "-c", code], capture_output=True, text=True).stdout
    assert found == "own megatron-core==0.17.1 base\n"
    (folder / "kept").touch()
    versions.environment(base, "0.17.1")
    assert (folder / "kept").exists(), "it is up to date"
    (base / ".installed").write_text("others")
    versions.environment(base, "0.17.1")
    assert not (folder / "kept").exists(), "what it borrows has changed"
