"""Command-line flags, made from SpecConfig and from the losses of other installed packages."""

import argparse
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import Field
from types import SimpleNamespace
from typing import Any, NoReturn, Optional

from megatron_moe_spec.config import SpecConfig
from megatron_moe_spec.losses import Loss
from megatron_moe_spec.losses.base import config_field, options_of
from megatron_moe_spec.losses.installed import installed_losses


def _settings() -> dict[str, tuple[Field, Optional[type[Loss]]]]:
    """Every flag by its destination in parsed arguments: its option, and the loss of another package that has it."""
    found: list[tuple[Field, Optional[type[Loss]]]] = [(one, None) for one in options_of(SpecConfig)]
    found += [(one, loss) for loss in installed_losses() for one in options_of(loss)]
    return {one.metadata["flag"].removeprefix("--").replace("-", "_"): (one, loss) for one, loss in found}


def add_moe_spec_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds one flag per field of SpecConfig, and those of installed losses, to a parser.

    Fits Megatron's ``extra_args_provider``.

    Returns:
        The same parser.

    Raises:
        ValueError: an installed loss cannot be used; the message names it.
    """
    _add_flags(parser, with_defaults=True)
    return parser


def _add_flags(parser: argparse.ArgumentParser, with_defaults: bool) -> None:
    # Before Python 3.14, argparse takes -2e-3 for a flag and asks for a value; SpecConfig says what is wrong with it.
    parser._negative_number_matcher = re.compile(r"-(\.?\d|inf$|nan$)")
    group = parser.add_argument_group("auxiliary losses for MoE experts (megatron_moe_spec)")
    for name, (option, _) in _settings().items():
        paper = f" Paper: {option.metadata['paper']}." if option.metadata["paper"] else ""
        group.add_argument(
            option.metadata["flag"],
            dest=name,
            type=type(option.default),
            default=option.default if with_defaults else argparse.SUPPRESS,
            choices=option.metadata["choices"],
            help=(option.metadata["help"] + paper).replace("%", "%%"),
        )


def spec_config_from_args(args: Any, command_line: Optional[Sequence[str]] = None) -> SpecConfig:
    """Builds the SpecConfig from parsed arguments; a flag the parser did not know keeps its default.

    With Megatron's ``--yaml-cfg`` all parsed arguments are replaced by the file's. Then the file's keys count in any
    section, with underscores or dashes, and the flags on the command line before them.

    Args:
        args: parsed arguments.
        command_line: the flags that were parsed; those of this process if not given.

    Raises:
        ValueError: a value is out of range, or the YAML file has two of them; the message names the flag.
    """
    if getattr(args, "yaml_cfg", None):
        given, _ = _parse(command_line)
        return _config({**_in_sections(vars(args)), **given})
    return _config({name: getattr(args, name) for name in _settings() if hasattr(args, name)})


def spec_config_from_command_line(command_line: Optional[Sequence[str]] = None) -> SpecConfig:
    """Builds the SpecConfig from a command line and its ``--yaml-cfg``; other flags are passed over.

    Args:
        command_line: the flags; those of this process if not given.

    Raises:
        ValueError: a flag has no fitting value, or the YAML file cannot be read; the message names the flag.
    """
    given, yaml_file = _parse(command_line)
    return _config({**(_in_sections(_load(yaml_file)) if yaml_file else {}), **given})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parse(command_line: Optional[Sequence[str]]) -> tuple[dict, Optional[str]]:
    """The flags that were given, by destination, and the YAML file."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--yaml-cfg")
    _add_flags(parser, with_defaults=False)
    given = vars(parser.parse_known_args(sys.argv[1:] if command_line is None else command_line)[0])
    return given, given.pop("yaml_cfg")


def _load(yaml_file: str) -> dict:
    import yaml  # Megatron needs it for this flag, too.

    try:
        with open(yaml_file) as file:
            content = yaml.safe_load(file)
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--yaml-cfg {yaml_file} cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}


def _in_sections(tree: dict) -> dict:
    """The settings in a YAML file's keys, by destination, in whichever section they stand."""
    found: dict = {}
    for key, value in tree.items():
        if isinstance(value, SimpleNamespace):
            value = vars(value)
        name = str(key).replace("-", "_")
        section = value if isinstance(value, dict) else {}
        inner = {name: value} if name in _settings() else _in_sections(section)
        for name, value in inner.items():
            if found.setdefault(name, value) != value:
                raise ValueError(f"--yaml-cfg sets {name} to {found[name]!r} and to {value!r}: keep one of them")
    return found


def _config(values: dict) -> SpecConfig:
    """SpecConfig of values by destination. Installed losses with a coefficient are among its extra losses."""
    settings = _settings()
    fields: dict = {}
    options: dict[type[Loss], dict] = {loss: {} for loss in installed_losses()}
    for name, value in values.items():
        option, loss = settings[name]
        # PyYAML reads 2e-3, without a dot, as a string.
        if isinstance(value, str) and not option.metadata["choices"]:
            with suppress(ValueError):  # SpecConfig says what it must be.
                value = option.type(value)  # type: ignore[operator]
        if loss is None:
            fields[config_field(option)] = value
        else:
            options[loss][option.name] = value
    extra = [loss(**values) for loss, values in options.items()]
    return SpecConfig(**fields, extra_losses=tuple(loss for loss in extra if loss.is_trained or loss.measured))
