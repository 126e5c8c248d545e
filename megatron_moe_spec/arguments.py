"""Command-line flags, generated from SpecConfig."""

import argparse
from dataclasses import fields

from megatron_moe_spec.config import SpecConfig


def _destination(setting) -> str:
    return setting.metadata["flag"].removeprefix("--").replace("-", "_")


def add_moe_spec_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds one flag per field of SpecConfig to a parser; fits Megatron's ``extra_args_provider``.

    Returns:
        The same parser.
    """
    group = parser.add_argument_group("MoE expert specialization")
    for setting in fields(SpecConfig):
        group.add_argument(
            setting.metadata["flag"],
            dest=_destination(setting),
            type=type(setting.default),
            default=setting.default,
            choices=setting.metadata["choices"],
            help=setting.metadata["help"].replace("%", "%%"),
        )
    return parser


def spec_config_from_args(args) -> SpecConfig:
    """Builds the SpecConfig from parsed arguments; a flag the parser did not know keeps its default.

    Raises:
        ValueError: a value is out of range; the message names the flag.
    """
    return SpecConfig(
        **{s.name: getattr(args, _destination(s), s.default) for s in fields(SpecConfig)}
    )
