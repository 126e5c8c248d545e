"""The installed package: one version, types, and commands that can be called."""

import importlib
import inspect
import pkgutil
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points, version
from importlib.resources import files
from pathlib import Path

import pytest

import megatron_moe_spec

SCRIPTS = entry_points(group="console_scripts")
COMMANDS = [script for script in SCRIPTS if script.value.startswith("megatron_moe_spec.")]


def test_version_is_that_of_the_installed_package():
    assert version("megatron_moe_spec") == megatron_moe_spec.__version__


def test_types_are_shipped():
    assert files("megatron_moe_spec").joinpath("py.typed").is_file()


@pytest.mark.once
def test_tuned_options_are_shipped_where_they_were_written(tmp_path):
    root = Path(megatron_moe_spec.__file__).parent.parent
    shutil.copytree(root / "megatron_moe_spec", tmp_path / "megatron_moe_spec")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path / name)
    (tmp_path / "megatron_moe_spec" / "kernels" / "tuned.json").write_text("{}")
    code = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    built = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"megatron_moe_spec/kernels/tuned.json", "megatron_moe_spec/py.typed"} <= set(names)


def test_what_is_exported_is_there(megatron):
    exported = {name: getattr(megatron_moe_spec, name) for name in megatron_moe_spec.__all__}
    handle = exported["attach"]([], exported["SpecConfig"]())
    assert type(handle) is exported["SpecHandle"]


def test_commands_are_installed():
    assert {command.name for command in COMMANDS} == {"moe-spec-doctor"}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_commands_can_be_called_without_arguments(command):
    inspect.signature(command.load()).bind()


def test_every_module_is_imported_by_this_python(megatron):
    """Those too whose tests are not repeated in the second environment."""
    walked = pkgutil.walk_packages(megatron_moe_spec.__path__, "megatron_moe_spec.")
    names = [module.name for module in walked if not module.name.endswith(".__main__")]
    assert len(names) > 90 and {"megatron_moe_spec.report.command", "megatron_moe_spec.placement.command"} <= set(names)
    for name in names:
        importlib.import_module(name)


def test_importing_imports_neither_torch_nor_megatron():
    code = "import sys, megatron_moe_spec; sys.exit(bool({'torch', 'megatron', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
