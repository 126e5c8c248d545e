"""docs/recipes.md says what the doctor says of public recipes."""

import json
import shlex
import subprocess

import pytest
from processes import ROOT, needs_training_loop

from examples import recipes


@needs_training_loop
def test_committed_report_is_what_the_doctor_says(megatron):
    from megatron_moe_spec.integration.compat.release import megatron_version

    committed = recipes.REPORT.read_text()
    release = megatron_version().partition("+")[0]
    if f"Megatron-Core {release}:" not in committed:
        pytest.skip("the report is of another release of Megatron-Core")
    assert recipes.report() == committed, "make recipes"


def test_recipes_are_flags_with_a_source():
    names = []
    for recipe in json.loads(recipes.RECIPES.read_text()):
        flags = shlex.split(recipe["flags"])
        assert flags[0].startswith("--") and "--num-experts" in flags, recipe["name"]
        assert recipe["source"].count(": ") == 1
        names.append(recipe["name"])
    assert len(set(names)) == len(names) > 30


def test_make_recipes():
    planned = subprocess.run(["make", "-n", "recipes"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert "-m examples.recipes --write\n" in planned
