"""Each part of the package imports only from the parts above it."""

import ast
import re
from pathlib import Path

import pytest

import megatron_moe_spec
from megatron_moe_spec.losses import LOSSES

pytestmark = pytest.mark.once

ROOT = Path(megatron_moe_spec.__file__).parent
ORDER = [
    *["losses", "config", "metrics", "traces", "kernels", "parallel", "integration", "arguments", "cpu"],
    *["launch", "doctor", "report", "placement"],
]
# Of integration/.
ROOMS = ["compat", "hooks", "step", "pipeline", "support", "taps", "attach", "training", "frameworks"]
MEGATRON_FREE = [part for part in ORDER if part not in ("integration", "cpu")]


def _imports(file: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.append(node.module)
    return names


def _files() -> list[tuple[str, Path]]:
    files = []
    for file in sorted(ROOT.rglob("*.py")):
        part = file.relative_to(ROOT).parts[0].removesuffix(".py")
        if part != "__init__":
            files.append((part, file))
    return files


def test_every_part_has_a_place():
    assert {part for part, _ in _files()} <= set(ORDER)


def test_imports_point_upwards():
    checked = 0
    for part, file in _files():
        for name in _imports(file):
            if name.startswith("megatron_moe_spec."):
                other = name.split(".")[1]
                checked += 1
                assert ORDER.index(other) <= ORDER.index(part), f"{file} imports {name}"
    assert checked > 20


def _imports_between_rooms() -> set[tuple[str, str, str]]:
    """(room, room that it imports from, file)."""
    found = set()
    for part, file in _files():
        path = file.relative_to(ROOT / part) if part == "integration" else Path("__init__.py")
        room = path.parts[0].removesuffix(".py")
        for name in _imports(file) if room != "__init__" else ():
            parts = name.split(".")
            if parts[:2] == ["megatron_moe_spec", "integration"] and parts[2] != room:
                found.add((room, parts[2], path.as_posix()))
    return found


def test_rooms_import_from_those_before():
    upwards = {
        (file, other) for room, other, file in _imports_between_rooms() if ROOMS.index(other) > ROOMS.index(room)
    }
    assert not upwards


def test_few_arrows_between_rooms():
    arrows = sorted({f"{room} -> {other}" for room, other, _ in _imports_between_rooms()})
    assert 10 < len(arrows) <= 23, arrows


def test_rooms_of_integration_are_small():
    """A reader finds the way in a room of some files, and in a file of some pages."""
    for room in ROOMS:
        lengths = [len(file.read_text().splitlines()) for file in (ROOT / "integration").glob(f"{room}/*.py")]
        assert sum(lengths) <= 1300 and max(lengths, default=0) <= 300, (room, lengths)


def test_only_integration_knows_megatron():
    for part, file in _files():
        if part in MEGATRON_FREE:
            assert not [n for n in _imports(file) if n.split(".")[0] == "megatron"], file


def test_megatron_symbols_are_named_in_compat_alone():
    """Apart from the CPU back end, which patches Megatron and is not used in training on GPUs."""
    for part, file in _files():
        if part == "integration" and file.parent.name != "compat":
            assert not [n for n in _imports(file) if n.split(".")[0] == "megatron"], file


def test_the_cpu_backend_serves_the_command_line_alone():
    for part, file in _files():
        if part not in ("cpu", "launch", "doctor"):
            assert not [n for n in _imports(file) if n.startswith("megatron_moe_spec.cpu")], file


def test_only_losses_and_the_taps_of_one_loss_name_a_loss():
    """Code that runs taps, records, reports and refuses serves losses that it does not know."""
    words = {word for loss in LOSSES for word in (loss.__name__, loss.name, loss.name.removesuffix("_loss"))}
    pattern = re.compile(r"\b(" + "|".join(words) + r")\b", re.IGNORECASE)
    generic = (
        ["doctor.py", "arguments.py", "config.py"]
        + [
            f"integration/{name}.py"
            for name in (
                *["hooks/injection", "hooks/micro_batch", "hooks/routing", "hooks/scaling", "pipeline/stages"],
                *["step/clock", "step/losses", "step/diagnostics", "taps/layer"],
                *["support/checks", "support/facts", "support/rule"],
            )
        ]
        + [f"integration/taps/{name}.py" for name in ("__init__", "base", "router_weight", "scores")]
        + [f"integration/taps/{name}.py" for name in ("expert_rows", "activations", "outputs")]
        + ["parallel/token_rows.py"]
    )
    for name in generic:
        assert not pattern.search((ROOT / name).read_text()), name


def test_losses_need_neither_triton_nor_distributed():
    for part, file in _files():
        if part in ("config", "losses", "metrics", "traces"):
            for name in _imports(file):
                assert "triton" not in name, file
                # Which rank writes, and that all know whether it can, is a question to the ranks.
                assert "distributed" not in name or file == ROOT / "metrics" / "writer.py", file
