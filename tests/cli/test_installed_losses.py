"""Losses of other packages: by extra_losses, and, with flags, by the entry-point group of installed packages."""

import argparse

import pytest
from example_loss import RoutingInformation
from forks import ranks
from other_losses import LengthSpread, RouterLength
from processes import HELPERS, ROOT, needs_training_loop
from test_pretrain import MODEL, scalars

from megatron_moe_spec import SpecConfig, doctor
from megatron_moe_spec.arguments import add_moe_spec_args, spec_config_from_args, spec_config_from_command_line
from megatron_moe_spec.losses import LOSSES, RowsLoss, ScoresLoss
from megatron_moe_spec.losses.coupling import Coupling
from megatron_moe_spec.losses.installed import GROUP, installed_losses

FLAG = "--moe-routing-information-loss-coeff"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs packages with entry points: name -> "module:class", and the source of a module."""

    def run(points: dict[str, str], source: str = (HELPERS / "example_loss.py").read_text()):
        (tmp_path / "installed_example.py").write_text(source)
        folder = tmp_path / "example-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: example\nVersion: 1.0\n")
        lines = "".join(f"{name} = {value}\n" for name, value in points.items())
        (folder / "entry_points.txt").write_text(f"[{GROUP}]\n{lines}")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(__import__("sys").modules, "installed_example", raising=False)
        installed_losses.cache_clear()
        return tmp_path

    yield run
    monkeypatch.undo()
    installed_losses.cache_clear()


def test_a_loss_of_an_installed_package_has_its_flag(install):
    install({"routing-information": "installed_example:RoutingInformation"})
    parser = add_moe_spec_args(argparse.ArgumentParser())
    assert FLAG in parser.format_help()
    config = spec_config_from_args(parser.parse_args([FLAG, "0.5", "--moe-erc-loss-coeff", "2"]))
    assert config.trained_losses == ("erc_loss", "routing_information_loss")
    (loss,) = config.extra_losses
    assert loss.coeff == 0.5 and str(loss) == "routing information x 0.5"
    assert spec_config_from_command_line([FLAG, "0.5"]).enabled
    assert spec_config_from_args(parser.parse_args([])) == SpecConfig()
    with pytest.raises(ValueError, match=f"routing_information_loss_coeff .{FLAG}.*not negative"):
        spec_config_from_command_line([f"{FLAG}=-1"])


@needs_training_loop
def test_the_doctor_knows_it(install, megatron, capsys):
    install({"routing-information": "installed_example:RoutingInformation"})
    assert doctor.main([*map(str, MODEL), FLAG, "0.5"]) == 0
    assert "routing information x 0.5" in capsys.readouterr().out


@pytest.mark.slow
@needs_training_loop
def test_the_launcher_trains_with_it_and_logs_it(install, megatron, tmp_path):
    folder = install({"routing-information": "installed_example:RoutingInformation"})
    launcher = ["-m", "megatron_moe_spec.launch", "--cpu", ROOT / "examples" / "pretrain_gpt.py"]
    output = ranks(
        1, *launcher, *MODEL, "--train-iters", 2, "--tensorboard-dir", tmp_path, FLAG, "0.5", folders=[folder]
    )
    assert "MoE specialization: routing information x 0.5" in output
    # Megatron's console leaves out what is negative. Of 4 experts, the information is at most log 4.
    values = scalars(tmp_path)["routing_information_loss"]
    assert list(values) == [1, 2] and all(-1.39 < value < 0 for value in values.values())


@needs_training_loop
def test_the_doctor_names_one_that_cannot_be_used(install, megatron, capsys):
    install({"broken": "no_such_module:Loss"})
    assert doctor.main(list(map(str, MODEL))) == 1
    assert "broken = no_such_module:Loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    "points, source, problem",
    [
        ({"broken": "no_such_module:Loss"}, None, "broken = no_such_module:Loss.*cannot be imported.*no_such_module"),
        ({"broken": "installed_example:NoSuchLoss"}, None, "broken.*cannot be imported.*NoSuchLoss"),
        ({"other": "installed_example:dataclass"}, None, "other.*is not derived from RowsLoss, ScoresLoss"),
        ({"other": "megatron_moe_spec.losses:Coupling"}, None, "other.*is not derived from"),
        ({"again": "megatron_moe_spec.losses:Specialization"}, None, "again.*the name of another loss"),
        (
            {"one": "installed_example:RoutingInformation", "two": "installed_example:RoutingInformation"},
            None,
            "two.*the name of another loss, routing_information_loss",
        ),
        (
            {"taken": "installed_example:RoutingInformation"},
            ("routing-information", "erc"),
            "taken.*the flag of another loss, --moe-erc-loss-coeff",
        ),
        ({"flagless": "other_losses:LengthSpread"}, None, "flagless.*has no flag"),
    ],
)
def test_what_cannot_be_used_is_named(install, points, source, problem):
    text = (HELPERS / "example_loss.py").read_text()
    install(points, text.replace(*source) if source else text)
    with pytest.raises(ValueError, match=problem):
        add_moe_spec_args(argparse.ArgumentParser())


@pytest.mark.parametrize(
    "losses, problem",
    [
        ((Coupling(1.0),), "derived from RowsLoss, ScoresLoss, RouterWeightLoss"),
        (("routing_information_loss",), "derived from"),
        ((RoutingInformation(1.0), RoutingInformation(0.5)), "another loss of the name routing_information_loss"),
    ],
)
def test_extra_losses_that_do_not_fit(losses, problem):
    with pytest.raises(ValueError, match=problem):
        SpecConfig(extra_losses=losses)


def test_coefficients_of_extra_losses_are_checked():
    with pytest.raises(ValueError, match="coeff of length_spread_loss must be finite and not negative"):
        LengthSpread(-1.0)
    with pytest.raises(ValueError, match="coeff of router_length_loss must be a number"):
        RouterLength("1")


def test_a_loss_says_its_name_and_what_it_reads():
    class Nameless(ScoresLoss):
        pass

    class OfNothing(RowsLoss):
        name = "of_nothing_loss"

    class OfATypo(ScoresLoss):
        name, reads = "of_a_typo_loss", "score"

    for loss, problem in (
        (Nameless, "Nameless needs a name"),
        (OfNothing, "OfNothing must have reads = 'activations' or 'outputs'; got None"),
        (OfATypo, "OfATypo must have reads = 'scores'; got 'score'"),
    ):
        with pytest.raises(ValueError, match=problem):
            loss(1.0)


class MeanOfScores(ScoresLoss):
    name = "mean_of_scores_loss"

    def token_losses(self, scores_TE, active_TE, mean):
        return scores_TE.square().mean()


class MeanOfCosines(RowsLoss):
    name, reads, uses_lengths = "mean_of_cosines_loss", "activations", False

    def token_losses(self, cosines_TKK, lengths_TK, active_TK):
        return cosines_TKK.square().mean(dim=(1, 2), keepdim=True)


@pytest.mark.parametrize("loss", [MeanOfScores, MeanOfCosines])
def test_a_loss_that_is_not_of_each_token_is_an_error(mm, loss):
    from megatron_moe_spec import attach

    model = mm.build_model()
    attach(model, SpecConfig(extra_losses=(loss(1.0),)))
    with pytest.raises(ValueError, match=f"{loss.__name__}.token_losses must return the loss of each token, .24.; got"):
        mm.run_model(model, mm.micro_batches(1)[0])


def test_a_router_without_enough_experts_is_refused(mm):
    from megatron_moe_spec import attach

    model = mm.build_model(moe_router_topk=1, moe_router_pre_softmax=True)
    with pytest.raises(ValueError, match="length spread compares.*length_spread_loss's coeff to 0"):
        attach(model, SpecConfig(extra_losses=(LengthSpread(1.0),)))


def test_names_and_flags_are_one_for_each_loss():
    from megatron_moe_spec.losses.base import options_of

    names = [loss.name for loss in LOSSES]
    flags = [one.metadata["flag"] for loss in LOSSES for one in options_of(loss)]
    assert len(set(names)) == len(names) and len(set(flags)) == len(flags)
    assert all(flag.startswith("--moe-") for flag in flags)
