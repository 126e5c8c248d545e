"""``.ci/times.py``: where the time of a run of the tests went."""

import subprocess
import sys

import pytest
from processes import ROOT

pytestmark = pytest.mark.once

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_one" name="test_a[x]" time="1.5"><properties>
  <property name="forks" value="3 0.75"/><property name="errors" value="a | b"/>
</properties></testcase>
<testcase classname="tests.test_one" name="test_b" time="30.25"><properties>
  <property name="forks" value="1 9.5"/><property name="torchrun" value="1 20.000"/>
</properties></testcase>
</testsuite></testsuites>"""


def run(*arguments) -> str:
    command = [sys.executable, ROOT / ".ci" / "times.py", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_steps_starts_and_slowest_tests(tmp_path):
    (tmp_path / "steps").write_text("75 installation of both\n200 all tests\n")
    (tmp_path / "primary.xml").write_text(REPORT)
    (tmp_path / "oldest.xml").write_text(
        "<testsuites>"
        + "".join(f"<testcase classname='c' name='n{n}' time='{n}'/>" for n in range(30))
        + "</testsuites>"
    )
    lines = run(tmp_path / "steps", tmp_path / "primary.xml", tmp_path / "oldest.xml").splitlines()
    assert lines[1:4] == ["Where the time went", "     75 s  installation of both", "    200 s  all tests"]
    assert "     10 s  4 forked jobs, until their command began" in lines
    assert "     20 s  1 jobs of torchrun, until they ended" in lines
    assert "      0 s  0 interpreters, until they ended" in lines
    first = lines.index("The 20 slowest of 32 tests, 467 s in all") + 1
    assert lines[first] == "   30.2 s  primary: tests/test_one::test_b"
    assert lines[first + 1 :] == [f"{n:7.1f} s  oldest: c::n{n}" for n in range(29, 10, -1)]


def test_a_run_that_ended_before_its_tests(tmp_path):
    """The pattern of the reports stands for itself then."""
    (tmp_path / "steps").write_text("3 linters\n")
    assert "      3 s  linters" in run(tmp_path / "steps", tmp_path / "*.xml").splitlines()
