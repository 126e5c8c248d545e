"""The stand-in of the compiled extension has the names, arguments and numbers of the real one, by its source."""

import enum
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

import pytest
from processes import ROOT

SOURCE = Path(sys.prefix) / "source"
BINDINGS = SOURCE / "csrc" / "extensions" / "pybind.cpp"
HELPER = SOURCE / "common_headers" / "common" / "util" / "pybind_helper.h"


@cache
def _code(file: Path) -> str:
    """Without comments, and without what continues a macro's lines."""
    return re.sub(r"//[^\n]*|/\*.*?\*/|\\\n", "", file.read_text(), flags=re.S)


def _call(text: str, start: int) -> str:
    """The arguments of a call from behind its parenthesis."""
    depth, end = 1, start
    while depth:
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        end += 1
    return text[start : end - 1]


def _parameters(name: str) -> list[str]:
    """Names, of a C++ function's declaration."""
    for file in (SOURCE / "csrc" / "extensions.h", *SOURCE.rglob("common_headers/**/*.h")):
        text = _code(file)
        if declared := re.search(rf"\b{name}\(", text):
            break
    parameters = _call(text, declared.end())
    while "<" in parameters:
        parameters = re.sub(r"<[^<>]*>", "", parameters)
    one_by_one = (re.sub(r"=.*", "", one, flags=re.S).split() for one in parameters.split(","))
    return [words[-1].lstrip("&*") for words in one_by_one if words and words != ["void"]]


@pytest.fixture(scope="module")
def bound() -> dict[str, Callable[[], list[str]]]:
    """For every function that the extension binds, what reads the names of its arguments."""
    text, functions = _code(BINDINGS) + _code(HELPER), {}
    for match in re.finditer(r'\bm\.def\(\s*"(\w+)"\s*,\s*(?:&?(?:\w+::)*(\w+)|\[)', text):
        named = re.findall(r'py::arg\("(\w+)"\)', _call(text, match.start() + len("m.def(")))
        functions[match[1]] = partial(list, named) if named else partial(_parameters, match[2])
    assert len(functions) > 100
    return functions


def test_functions(bound):
    from transformer_engine_torch import functions

    assert len(functions) > 50
    for name, function in functions.items():
        assert name in bound, f"{name} is not bound"
        assert list(inspect.signature(function).parameters) == bound[name](), name


def _enumerators() -> list[dict[str, int]]:
    """Of every enumeration of the C headers."""
    found = []
    for file in [*SOURCE.rglob("*.h")]:
        for body in re.findall(r"\benum\s+(?:class\s+)?\w*\s*(?::\s*\w+\s*)?\{([^{}]*)\}", _code(file)):
            members, number = {}, -1
            for one in filter(None, (part.strip() for part in body.split(","))):
                name, _, value = (part.strip() for part in one.partition("="))
                try:
                    number = int(value, 0) if value else number + 1
                except ValueError:
                    break  # an expression: none of those that are bound
                members[name] = number
            found.append(members)
    return found


def test_enumerations():
    import transformer_engine_torch as extension

    enumerators, seen = _enumerators(), set()
    for text in (_code(HELPER), _code(BINDINGS)):
        for match in re.finditer(r"enum_<[\w:]+>\(\s*m,\s*\"(\w+)\"[^;]*;", text):
            bound = re.findall(r'\.value\(\s*"(\w+)",\s*(?:\w+::)*(\w+)\)', match[0])
            (values,) = {
                tuple(members[c_name] for _, c_name in bound)
                for members in enumerators
                if all(c_name in members for _, c_name in bound)
            }
            kind = getattr(extension, match[1])
            assert {one.name: int(one) for one in kind} == {name: n for (name, _), n in zip(bound, values)}, match[1]
            seen.add(match[1])
    own = {name for name, value in vars(extension).items() if inspect.isclass(value) and issubclass(value, enum.Enum)}
    assert seen == own and len(seen) > 10


def test_a_function_without_a_stand_in_says_its_name():
    import transformer_engine_torch as extension

    with pytest.raises(NotImplementedError, match="moe_permute_fwd has no stand-in"):
        extension.moe_permute_fwd(1, 2)
    assert not hasattr(extension, "_private")


def test_transformer_engine_is_unchanged():
    """Every file of the wheel that was unpacked is as it was released."""
    import base64
    import hashlib
    from importlib.metadata import files

    assert (SOURCE / "PKG-INFO").read_text().count(f"\nVersion: {version('transformer-engine')}\n") == 1
    hashed = [file for file in files("transformer-engine") if file.hash and file.suffix == ".py"]
    assert len(hashed) > 100
    for file in hashed:
        digest = hashlib.new(file.hash.mode, file.locate().read_bytes()).digest()
        assert base64.urlsafe_b64encode(digest).decode().rstrip("=") == file.hash.value, file


def test_megatron_takes_it_for_transformer_engine(mm):
    """As on a GPU machine: no layer of a model of the Transformer Engine spec is Megatron's own linear layer."""
    model = mm.build_model(moe_grouped_gemm=True)
    kinds = {type(module).__name__ for module in model.decoder.modules()}
    assert {"TEGroupedMLP", "TELayerNormColumnParallelLinear", "TERowParallelLinear", "TEDotProductAttention"} <= kinds
    assert not kinds & {"ColumnParallelLinear", "RowParallelLinear", "SequentialMLP", "TorchGroupedLinear"}


def _make(*arguments) -> tuple[int, str]:
    made = subprocess.run([ROOT / ".ci" / "transformer-engine", *arguments], capture_output=True, text=True)
    return made.returncode, made.stdout + made.stderr


def test_environment_is_made_once_and_of_its_own(tmp_path):
    base = ROOT / ".venv"
    assert _make(sys.prefix, base) == (0, "")
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('transformer_engine') is not None)"
    assert subprocess.run([base / "bin" / "python", "-c", look]).returncode == 0
    (tmp_path / "something").touch()
    status, message = _make(tmp_path, base)
    assert status == 1 and "is not a virtual environment" in message and (tmp_path / "something").exists()
    assert _make(tmp_path)[0] == 2
