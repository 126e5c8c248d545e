"""Each patch fits the Megatron-LM that it names, and a patched Megatron trains as an edited script does."""

import os
import re
import shutil
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import ROOT, needs_training_loop, torchrun
from test_pretrain import LOSSES, MODEL

from megatron_moe_spec import SpecConfig

PATCHES = sorted((ROOT / "patches").glob("*.patch"))
FILES = ("megatron/training/arguments.py", "megatron/training/training.py")
CHECKOUT = os.environ.get("MEGATRON_LM_CHECKOUT")


def _apply(folder: Path, patch: Path, *options: str) -> subprocess.CompletedProcess:
    # Inside a repository, git would take the paths from its root and skip what is not there.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    command = ["git", "apply", *options, str(patch)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def _revision(patch: Path) -> str:
    return patch.read_text().splitlines()[0].rsplit(" ", 1)[1]


def _check_round_trip(folder: Path, patch: Path) -> None:
    before = [(folder / file).read_text() for file in FILES]
    assert _apply(folder, patch, "-R", "--check").returncode, "reads as applied already"
    for options in ((), ("-R",)):
        applied = _apply(folder, patch, *options)
        assert applied.returncode == 0, applied.stderr
        changed = [(folder / file).read_text() for file in FILES]
        assert all((now == then) == bool(options) for now, then in zip(changed, before))


def test_patches_add_the_same_lines_and_remove_none():
    changes = [
        [line for line in re.findall(r"^[+-](?![+-]{2} ).*", patch.read_text(), re.M) if line != "+"]
        for patch in PATCHES
    ]
    assert len(changes) == 5 and len(changes[0]) == 7
    assert all(lines == changes[0] and all(line[0] == "+" for line in lines) for lines in changes)


def test_readme_names_each_patch_and_its_revision():
    readme = (ROOT / "patches" / "README.md").read_text()
    for patch in PATCHES:
        (row,) = re.findall(rf"^\| `{re.escape(patch.name)}` \|.*", readme, re.M)
        assert _revision(patch) in row


@pytest.fixture
def installed(tmp_path) -> tuple[Path, Path]:
    """A copy of the installed wheel's megatron.training, and the patch for its release."""
    release = version("megatron-core").rsplit(".", 1)[0]
    (patch,) = [p for p in PATCHES if _revision(p).startswith(f"core_v{release}.")]
    source = Path(find_spec("megatron.training").origin).parent
    shutil.copytree(source, tmp_path / "wheel/megatron/training", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "wheel", patch


@needs_training_loop
def test_patch_fits_the_installed_wheel(installed):
    _check_round_trip(*installed)


@pytest.mark.skipif(not CHECKOUT, reason="MEGATRON_LM_CHECKOUT names no git checkout of Megatron-LM")
@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_patch_fits_its_revision(patch, tmp_path):
    for file in FILES:
        (tmp_path / "tree" / file).parent.mkdir(parents=True, exist_ok=True)
        show = ["git", "-C", CHECKOUT, "show", f"{_revision(patch)}:{file}"]
        (tmp_path / "tree" / file).write_bytes(subprocess.run(show, check=True, capture_output=True).stdout)
    _check_round_trip(tmp_path / "tree", patch)


def _logged(output: str) -> list[str]:
    """Losses and gradient norms of each iteration, without what depends on the clock."""
    names = "lm loss|load_balancing_loss|specialization_loss|coupling_loss|grad norm"
    return re.findall(rf"(?:{names}): \S+", output)


@pytest.mark.slow
@needs_training_loop
def test_patched_megatron_trains_as_a_script_with_the_one_line_does(installed):
    folder, patch = installed
    # In the copy's folder, which comes before the installed package; the launcher takes no part.
    runner = folder / "run.py"
    runner.write_text(
        "import runpy, sys\n"
        "from megatron_moe_spec.cpu import enable\n"
        "enable()\n"
        f"sys.path.append({str(ROOT / 'examples')!r})\n"
        "runpy.run_path(sys.argv.pop(1), run_name='__main__')\n"
    )
    flags = [*MODEL, *LOSSES, "--train-iters", 3]
    with_the_line = _logged(torchrun(1, runner, ROOT / "examples" / "pretrain_gpt_spec.py", *flags))
    assert len(with_the_line) == 15
    assert _apply(folder, patch).returncode == 0
    assert _logged(torchrun(1, runner, ROOT / "examples" / "pretrain_gpt.py", *flags)) == with_the_line


def test_install_adds_nothing_to_what_has_the_losses(monkeypatch):
    from megatron_moe_spec.integration import training

    def modules(**extra):
        return (
            SimpleNamespace(add_megatron_arguments=len),
            SimpleNamespace(setup_model_and_optimizer=len, training_log=len, **extra),
        )

    monkeypatch.setattr(training, "require_megatron", lambda: None)
    for extra, wrapped in ({}, True), ({"moe_spec": training.TrainingLosses(SpecConfig)}, False):
        pair = modules(**extra)
        monkeypatch.setattr(training, "training_modules", lambda: pair)
        training.install(None, None)
        after_one = [dict(vars(module)) for module in pair]
        assert (after_one != [dict(vars(module)) for module in modules(**extra)]) == wrapped
        training.install(None, None)
        assert [dict(vars(module)) for module in pair] == after_one
