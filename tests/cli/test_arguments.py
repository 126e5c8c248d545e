"""Settings from a command line, by flags and by Megatron's --yaml-cfg."""

import argparse
import sys
from types import SimpleNamespace

import pytest
from processes import needs_training_loop

from megatron_moe_spec import SpecConfig
from megatron_moe_spec.arguments import add_moe_spec_args, spec_config_from_args, spec_config_from_command_line

# What Megatron's parse_args reads of a YAML file's namespace.
YAML = "disable_msc_deprecated: false\nenable_msc: false\nmicro_batch_size: 2\nglobal_batch_size: 4\n"
CONFIGS = {
    "top level": "moe_specialization_loss_coeff: 0.02\n",
    "without a dot": "moe_specialization_loss_coeff: 2e-2\n",
    "in a section": "language_model:\n  moe_aux_loss_coeff: 0.01\n  moe_specialization_loss_coeff: 0.02\n",
    "dashes": "moe-specialization-loss-coeff: 0.02\n",
    "twice the same": "moe_specialization_loss_coeff: 0.02\nlanguage_model:\n  moe-specialization-loss-coeff: 0.02\n",
}


def _yaml(folder, text):
    file = folder / "config.yaml"
    file.write_text(YAML + text)
    return ["--yaml-cfg", str(file)]


def _parsed_by_megatron(flags, monkeypatch) -> SpecConfig:
    from megatron.training import arguments

    monkeypatch.setattr(sys, "argv", ["script.py", *flags])
    return spec_config_from_args(arguments.parse_args(add_moe_spec_args))


@needs_training_loop
@pytest.mark.parametrize("text", CONFIGS.values(), ids=CONFIGS)
def test_yaml_file(megatron, text, tmp_path, monkeypatch):
    flags = _yaml(tmp_path, text)
    wanted = SpecConfig(specialization_loss_coeff=0.02)
    assert _parsed_by_megatron(flags, monkeypatch) == wanted
    assert spec_config_from_command_line(flags) == wanted


@needs_training_loop
def test_flags_beside_a_yaml_file(megatron, tmp_path, monkeypatch):
    text = "language_model:\n  moe_coupling_type: pathway\n  moe_specialization_loss_coeff: 3e-1\n"
    flags = [*_yaml(tmp_path, text), "--moe-specialization-loss-coeff", "2e-2", "--moe-spec-metrics-interval=5"]
    wanted = SpecConfig(specialization_loss_coeff=0.02, coupling_type="pathway", metrics_interval=5)
    assert _parsed_by_megatron(flags, monkeypatch) == wanted
    assert spec_config_from_command_line(flags) == wanted
    # As Megatron's validate_yaml leaves it: the section's keys at the top level, too.
    section = SimpleNamespace(moe_coupling_type="pathway")
    args = SimpleNamespace(yaml_cfg="config.yaml", language_model=section, **vars(section))
    assert spec_config_from_args(args, flags[2:]) == SpecConfig(
        specialization_loss_coeff=0.02, coupling_type="pathway", metrics_interval=5
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("moe_coupling_loss_coeff: small", "--moe-coupling-loss-coeff.* must be a number; got 'small'"),
        ("moe_coupling_loss_coeff: -2e-3", "--moe-coupling-loss-coeff.* not negative; got -0.002"),
        ("moe-coupling-loss-coeff:", "--moe-coupling-loss-coeff.* must be a number; got None"),
        ("moe_spec_metrics_interval: 2.5", "--moe-spec-metrics-interval.* whole number"),
        ("moe_erc_alpha: 1\nlanguage_model:\n  moe_erc_alpha: 2", "--yaml-cfg sets moe_erc_alpha to 1 and to 2"),
        ("moe_erc_alpha: [", "--yaml-cfg .*config.yaml cannot be read"),
    ],
)
def test_bad_yaml_is_named(text, message, tmp_path):
    pytest.importorskip("yaml", reason="PyYAML is not installed")
    with pytest.raises(ValueError, match=message):
        spec_config_from_command_line(_yaml(tmp_path, text))


def test_missing_yaml_file_is_named(tmp_path):
    pytest.importorskip("yaml", reason="PyYAML is not installed")
    with pytest.raises(ValueError, match="--yaml-cfg .*none.yaml cannot be read"):
        spec_config_from_command_line(["--yaml-cfg", str(tmp_path / "none.yaml")])


def test_command_line_of_others():
    flags = ["--lr", "-1", "--moe-coupling-loss-coeff", "1e-3", "-x", "--moe-router-topk=2", "rest"]
    assert spec_config_from_command_line(flags) == SpecConfig(coupling_loss_coeff=1e-3)
    with pytest.raises(ValueError, match="--moe-coupling-type.*invalid choice"):
        spec_config_from_command_line(["--moe-coupling-type", "path"])


NUMBERS = ["specialization-loss-coeff", "coupling-loss-coeff", "orthogonality-loss-coeff", "score-variance-loss-coeff"]


@pytest.mark.parametrize("flag", [f"--moe-{name}" for name in (*NUMBERS, "erc-loss-coeff", "erc-alpha")])
@pytest.mark.parametrize("value", ["-2e-3", "-.5", "-1", "-inf"])
def test_negative_number(flag, value):
    message = f"{flag}.* must be finite and not negative; got -"
    with pytest.raises(ValueError, match=message):
        spec_config_from_args(add_moe_spec_args(argparse.ArgumentParser()).parse_args([flag, value]))
    with pytest.raises(ValueError, match=message):
        spec_config_from_command_line([flag, value])


@needs_training_loop
def test_negative_number_through_megatrons_parser(megatron, monkeypatch):
    with pytest.raises(ValueError, match="--moe-erc-loss-coeff.* not negative; got -0.002"):
        _parsed_by_megatron(["--moe-erc-loss-coeff", "-2e-3"], monkeypatch)
