"""SpecConfig's fields are the options of the losses, to programs and to type checkers."""

import dataclasses
import re
import subprocess
import sys

import pytest
from processes import ROOT

from megatron_moe_spec import SpecConfig
from megatron_moe_spec.losses import LOSSES
from megatron_moe_spec.losses.base import config_field, options_of

MISSPELLED = """from megatron_moe_spec import SpecConfig

SpecConfig(specialization_loss_coeff=1.0, coupling_type="mass")
SpecConfig(specialisation_loss_coeff=1.0)
SpecConfig(coupling_type=1)
"""


def test_fields_are_the_options_of_the_losses():
    declared = [
        (config_field(one), one.type, one.default, dict(one.metadata)) for loss in LOSSES for one in options_of(loss)
    ]
    fields = [(one.name, one.type, one.default, dict(one.metadata)) for one in dataclasses.fields(SpecConfig)]
    assert fields[: len(declared)] == declared
    assert all(name == config_field(one) for name, one in SpecConfig.__dataclass_fields__.items() if one.metadata)
    assert [name for name, _, _, metadata in fields if not metadata] == ["extra_losses"]


def test_the_docstring_has_a_line_for_each_field():
    attributes = SpecConfig.__doc__.partition("Attributes:")[2].partition("Raises:")[0]
    assert re.findall(r"^ {8}(\w+): ", attributes, re.M) == [one.name for one in dataclasses.fields(SpecConfig)]


@pytest.mark.slow
def test_a_type_checker_finds_a_misspelled_field(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed")
    file = tmp_path / "settings.py"
    file.write_text(MISSPELLED)
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", "--cache-dir", tmp_path, file]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    errors = [line for line in checked.stdout.splitlines() if "error:" in line]
    assert len(errors) == 2, checked.stdout + checked.stderr
    assert 'settings.py:4: error: Unexpected keyword argument "specialisation_loss_coeff"' in errors[0]
    assert 'settings.py:5: error: Argument "coupling_type" to "SpecConfig" has incompatible type "int"' in errors[1]
