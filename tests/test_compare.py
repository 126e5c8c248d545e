"""The comparison's arithmetic, its plan, its running of several runs at a time, and its report."""

import argparse
import csv
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT, needs_training_loop

for package in ("psutil", "scipy", "tqdm"):
    pytest.importorskip(package, reason=f"{package} is not installed")

from examples.compare import arms, comparison, report, runs, schedule  # noqa: E402
from examples.compare.paired import difference  # noqa: E402
from examples.quickstart.training import Machine, make_data, megatron_steps  # noqa: E402
from megatron_moe_spec.arguments import add_moe_spec_args  # noqa: E402

LOSS = "validation_loss"


# Statistics


def test_difference_is_paired_by_seed():
    found = difference({1: 11.0, 2: 22.0, 3: 33.0, 4: 9.0}, {3: 30.0, 2: 20.0, 1: 10.0, 5: 0.0})
    assert found.values == (1.0, 2.0, 3.0) and found.mean == 2.0
    # The standard deviation is 1, and t of 2 degrees of freedom 4.3027.
    assert found.half_width == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert not found.excludes_zero
    assert difference({1: 2.0, 2: 2.1}, {1: 1.0, 2: 1.1}).excludes_zero
    assert difference({1: 2.0}, {1: 1.0}).half_width == math.inf
    with pytest.raises(ValueError, match="no seed"):
        difference({1: 2.0}, {2: 1.0})


# Plan


def test_arms_differ_in_their_losses_only(tmp_path):
    runner = runs.Runner(Machine("megatron.training", "CPU", 1, cpu=True), schedule.CPU, 40, tmp_path / "text", 2)
    scales = {"specialization": 10, "coupling-mass": 100}
    commands = {
        arm.name: runner.command(runs.Run(arm.name, scales.get(arm.name, 1), 7), scales, tmp_path) for arm in arms.ARMS
    }
    baseline = commands[arms.BASELINE]
    assert not any("loss-coeff" in flag and "aux" not in flag for flag in baseline)
    for name, command in commands.items():
        assert command[: len(baseline)] == baseline and (len(command) > len(baseline) or name == arms.BASELINE)
    assert commands["both"][len(baseline) :] == [
        "--moe-specialization-loss-coeff=0.02",
        "--moe-coupling-loss-coeff=0.1",
    ]
    parser = add_moe_spec_args(argparse.ArgumentParser())
    for command in commands.values():
        own = [flag for flag in command[len(baseline) :] if not flag.startswith("--moe-z-loss")]
        parser.parse_args(own)


@pytest.mark.parametrize("minutes", [30, 60, 120])
def test_planned_runs_fit_the_budget(minutes):
    iterations = comparison.iterations_for(minutes * 60, 57, workers=2, start_up=12.0, step=0.2)
    taken = 29 * (12.0 + (iterations + comparison.EVALUATION_STEPS) * 0.2)
    assert 0.8 * minutes * 60 < taken <= 0.9 * minutes * 60


def test_too_small_a_budget_says_what_to_change():
    with pytest.raises(SystemExit, match="57 runs.*about 2[0-9] minutes.*--no-sweep"):
        comparison.iterations_for(60, 57, workers=2, start_up=12.0, step=0.2)


def test_a_comparison_of_other_settings_is_not_gone_on_with(tmp_path):
    machine = Machine("megatron.training", "CPU", 1, cpu=True)
    arguments = ["--iterations", "8", "--seeds", "2", "--no-sweep", "--output", str(tmp_path)]
    options = comparison.parse_options(arguments)
    plan = comparison.plan_of(options, machine, schedule.CPU, 2, tmp_path / "text")
    assert plan["iterations"] == 8 and plan["seeds"] == [1, 2]
    assert comparison.plan_of(options, machine, schedule.CPU, 2, tmp_path / "text") == plan
    for change in (["--seeds", "1"], ["--iterations", "9"], ["--arms", "erc"]):
        with pytest.raises(SystemExit, match=f"other settings \\({change[0][2:]}\\)"):
            comparison.plan_of(
                comparison.parse_options([*arguments, *change]), machine, schedule.CPU, 2, tmp_path / "text"
            )


def test_seeds_and_arms_may_be_added_to_a_comparison(tmp_path):
    def plan(*changes):
        options = comparison.parse_options(["--iterations", "8", "--no-sweep", "--output", str(tmp_path), *changes])
        machine = Machine("megatron.training", "CPU", 1, cpu=True)
        return comparison.plan_of(options, machine, schedule.CPU, 2, tmp_path / "text")

    first = plan("--seeds", "2", "--arms", "erc")
    assert plan("--seeds", "3", "--arms", "erc") == {**first, "seeds": [1, 2, 3]}
    longer = {**first, "seeds": [1, 2, 3], "arms": ["baseline", "both", "erc"]}
    assert plan("--seeds", "3", "--arms", "both", "erc") == longer
    assert json.loads((tmp_path / "plan.json").read_text()) == longer
    with pytest.raises(SystemExit, match="other settings \\(arms\\)"):
        plan("--seeds", "3", "--arms", "erc")


def test_sweep_uses_a_seed_of_its_own():
    seeds = list(range(comparison.FIRST_SEED, comparison.FIRST_SEED + 50))
    assert not {run.seed for run in runs.sweep(comparison.SWEEP_SEED, arms.ARMS)} & set(seeds)
    wanted = runs.final(seeds[:2], {"erc": 0.1}, arms.ARMS)
    assert [run.seed for run in wanted] == [1] * len(arms.ARMS) + [2] * len(arms.ARMS)
    assert {run.name for run in wanted if run.arm == "erc"} == {"erc-x0.1-seed1", "erc-x0.1-seed2"}


# Running

TRAINING = """
import json, pathlib, sys, time
folder, loss = pathlib.Path(sys.argv[1]), float(sys.argv[2])
others = len(list(folder.parent.glob("*/running")))
(folder / "running").touch()
time.sleep(0.3)
with (folder / "log.jsonl").open("w") as file:
    for i in range(1, 11):
        print(json.dumps({"iteration": i, "lm_loss": 2.0, "step_time_s": 0.5}), file=file)
    print(json.dumps({"iteration": 10, "validation_loss": loss}), file=file)
(folder / "concurrent").write_text(str(others + 1))
(folder / "running").unlink()
sys.exit("no such luck" if loss < 0 else 0)
"""


class FakeRunner:
    """Builds a Runner whose runs are tiny scripts, each leaving the loss that ``losses`` gives it by arm."""

    def __new__(cls, folder, losses):
        class Runner(runs.Runner):
            def command(self, run, scales, folder):
                return [sys.executable, "-c", TRAINING, str(folder), str(losses[run.arm])]

        return Runner(Machine("fake", "CPU", 1, cpu=True), None, 10, folder / "text", 2, io.StringIO())


def test_runs_go_on_after_what_is_finished(tmp_path):
    wanted = [runs.Run(arm, 1, seed) for seed in (1, 2) for arm in ("baseline", "erc")]
    runner = FakeRunner(tmp_path, {"baseline": 2.0, "erc": 1.5})
    runner.run_all(wanted[:3], tmp_path, {})
    stamps = {run: os.stat(tmp_path / "runs" / run.name / runs.RESULT_FILE).st_mtime_ns for run in wanted[:3]}
    runner.run_all(wanted, tmp_path, {})
    printed = runner.stream.getvalue()
    assert "3 of 4 runs are finished already" in printed and "erc-x1-seed2: validation loss 1.5000" in printed
    assert "finished: 1/1 runs, 00:00 left" in printed
    for run, stamp in stamps.items():
        assert os.stat(tmp_path / "runs" / run.name / runs.RESULT_FILE).st_mtime_ns == stamp
    result = runs.result_of(tmp_path, wanted[3])
    assert result["values"][LOSS] == 1.5 and result["values"]["step_time_s"] == 0.5
    assert result["series"][LOSS] == [[10, 1.5]] and "lm_loss" not in result["series"]
    concurrent = [int(path.read_text()) for path in tmp_path.glob("runs/*/concurrent")]
    assert len(concurrent) == 4 and max(concurrent) <= 2


def test_a_failed_run_stops_the_comparison_and_shows_its_log(tmp_path):
    runner = FakeRunner(tmp_path, {"baseline": 2.0, "erc": -1.0})
    wanted = [runs.Run("erc", 1, 1), runs.Run("baseline", 1, 1), runs.Run("baseline", 1, 2)]
    with pytest.raises(SystemExit, match="erc-x1-seed1 run failed(.|\n)*no such luck(.|\n)*log.txt"):
        runner.run_all(wanted, tmp_path, {})
    assert runs.result_of(tmp_path, wanted[0]) is None


# Report

SEEDS = [1, 2, 3]


def write_comparison(folder, names, difference_of):
    """Fabricated results: the loss of an arm is the baseline's plus ``difference_of(arm, seed)``."""
    plan = {
        "iterations": 100,
        "arms": names,
        "seeds": SEEDS,
        "sweep_seed": None,
        "tokens_per_step": 2048,
        "shape": "a tiny model",
        "workers": 2,
        "machine": {"loop": "megatron.training", "device": "CPU, 2 cores", "processes": 1, "cpu": True},
        "versions": {"python": "3.12"},
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    for name in names:
        for seed in SEEDS:
            loss = 2.0 + 0.1 * seed + difference_of(name, seed)
            path = folder / "runs" / runs.Run(name, 1, seed).name
            path.mkdir(parents=True)
            values = {LOSS: loss, "mean_abs_cos": 0.5 * loss, "coupling_loss": 0.9, "step_time_s": 0.25}
            series = {LOSS: [[50, loss + 1], [100, loss]], "routing_entropy": [[100, 2.0]]}
            (path / "result.json").write_text(json.dumps({"values": values, "series": series, "seconds": 60.0}))


def test_report_tells_differences_from_chance(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    shifts = {
        "baseline": (0, 0, 0),
        "specialization": (-0.1000, -0.1010, -0.0990),
        "coupling-pathway": (0.1, -0.1, 0.03),
        "erc": (0.02, 0.03, 0.025),
    }
    write_comparison(tmp_path, list(shifts), lambda name, seed: shifts[name][seed - 1])
    report.write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert capsys.readouterr().out.count("differs") == 2
    # 4.3027 * 0.001 / sqrt(3)
    assert "| + specialization | 0.002 | 2.1000 | -0.1000 ± 0.0025 | 3 of 3 | differs |" in text
    assert "| + coupling (pathway) | 0.001 | 2.2100 | +0.0100 ± " in text
    assert "1 of 3 | no difference found |" in text
    assert "| + expert-router coupling (ERC) | 1 | 2.2250 | +0.0250 ± 0.0124 | 0 of 3 | differs" in text
    assert "| expert overlap, mean abs(cos) | 1.1000 | 1.0500 * | 1.1050 | 1.1125 * |" in text
    assert "| coupling loss | 0.9000 | 0.9000 | (0.9000) | 0.9000 |" in text
    assert "| time of a step, median (ms) | 250.0 |" in text
    assert "0.2 million tokens by more than about 0.0124 nats" in text and "seeds are 0.2000 nats apart" in text
    lines = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert [(line["arm"], line["seed"]) for line in lines] == [(arm, f"{seed}") for seed in SEEDS for arm in shifts]
    assert lines[1]["validation_loss"] == "2" and lines[1]["mean_abs_cos"] == "1" and lines[1]["seconds"] == "60"
    for picture in ("differences.png", "curves.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG") and picture in text


def test_report_uses_the_seeds_that_every_arm_has(tmp_path):
    pytest.importorskip("matplotlib")
    write_comparison(tmp_path, ["baseline", "erc"], lambda name, seed: -0.01 * seed * (name == "erc"))
    for seed in (2, 3):
        (tmp_path / f"runs/erc-x1-seed{seed}/result.json").unlink()
    report.write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| load balancing alone |  | 2.1000 |" in text
    assert "| -0.0100 | 1 of 1 | one seed: cannot be told |" in text and "inf" not in text
    (tmp_path / "runs/erc-x1-seed1/result.json").unlink()
    with pytest.raises(SystemExit, match="No seed has run in every arm yet.*make compare"):
        report.write(tmp_path)


def test_report_shows_how_coefficients_were_chosen(tmp_path):
    pytest.importorskip("matplotlib")
    write_comparison(tmp_path, ["baseline", "specialization"], lambda name, seed: 0.0)
    plan = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**plan, "sweep_seed": 1000}))
    swept = {("baseline", 1): 2.5}
    swept.update({("specialization", scale): loss for scale, loss in ((1, 2.4), (10, 2.3), (100, 2.6))})
    of_seeds = {("specialization", 10, seed): 2.0 for seed in SEEDS}
    for (arm, scale, *seed), loss in {**swept, **of_seeds}.items():
        path = tmp_path / "runs" / runs.Run(arm, scale, *(seed or [1000])).name
        path.mkdir()
        (path / "result.json").write_text(json.dumps({"values": {LOSS: loss}, "series": {}, "seconds": 1}))
    report.write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| + specialization | 0.02 | 2.0000 | -0.2000" in text
    assert "| load balancing alone |  | 2.5000 |  |  |" in text
    assert "| + specialization | 0.002 | 2.4000 | -0.1000 |  |" in text
    assert "| + specialization | 0.02 | 2.3000 | -0.2000 | chosen |" in text
    lines = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert [line["seed"] for line in lines] == ["1000"] * 4 + ["1", "1", "2", "2", "3", "3"]
    assert [line["multiple"] for line in lines] == ["1", "1", "10", "100"] + ["1", "10"] * 3


def test_report_without_a_comparison_says_what_to_do(tmp_path):
    with pytest.raises(SystemExit, match="No comparison .*make compare"):
        report.write(tmp_path)


def test_published_report_agrees_with_its_runs():
    """The table in docs/comparison, computed once more from the values of the runs."""
    published = ROOT / "docs/comparison"
    text = (published / "report.md").read_text()
    lines = list(csv.DictReader((published / "runs.csv").open()))
    final = [line for line in lines if int(line["seed"]) != 1000]
    losses = {}
    for line in final:
        losses.setdefault(line["arm"], {})[int(line["seed"])] = float(line[LOSS])
    assert len(losses) == 9 and {len(by_seed) for by_seed in losses.values()} == {5}
    for arm, by_seed in losses.items():
        mean = sum(by_seed.values()) / len(by_seed)
        row = f"| {mean:.4f} |"
        if arm != "baseline":
            found = difference(by_seed, losses["baseline"])
            better = sum(value < 0 for value in found.values)
            row += f" {found.mean:+.4f} ± {found.half_width:.4f} | {better} of 5 |"
        assert row in text, arm


# The whole


@pytest.mark.slow
@needs_training_loop
def test_runs_are_timed_before_their_length_is_chosen(tmp_path, monkeypatch):
    """Real runs, one beside the other, as ``make compare`` begins."""
    monkeypatch.setattr(comparison, "CALIBRATION_ITERATIONS", 6)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    machine, prefix = Machine("megatron.training", "CPU", 1, cpu=True), tmp_path / "data/text"
    make_data(prefix)
    start_up, step = comparison.calibrate(machine, schedule.CPU, prefix, tmp_path, workers=2)
    assert 1 < start_up < 300 and 0.01 < step < 30
    assert len(list(tmp_path.rglob("result.json"))) == 2


@pytest.mark.slow
@needs_training_loop
def test_a_comparison_cut_short(tmp_path):
    """Real training of one arm beside the baseline, four steps each, and its report."""
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "examples.compare", "--arms", "erc", "--iterations", "4"]
    command += ["--seeds", "1", "--no-sweep", "--output", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    results = {p.parent.name: json.loads(p.read_text()) for p in Path(tmp_path).rglob("result.json")}
    assert set(results) == {"baseline-x1-seed1", "erc-x1-seed1"}
    baseline, erc = (results[f"{name}-x1-seed1"] for name in ("baseline", "erc"))
    assert erc["values"][LOSS] != baseline["values"][LOSS]
    # The loss of the first step is taken before anything has changed: same weights, same data.
    logs = [(tmp_path / f"out/runs/{name}-x1-seed1/log.txt").read_text() for name in ("baseline", "erc")]
    first, other_first = (megatron_steps(log)[0] for log in logs)
    assert first == other_first and first[0] == 1
    assert baseline["values"]["peak_memory_mb"] > 100
    assert "expert-router coupling" in (tmp_path / "out/report.md").read_text()
