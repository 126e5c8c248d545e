"""The experiments: their arms, the runner, the tables of results, the statistics and the report."""

import argparse
import csv
import io
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from processes import ROOT, needs_training_loop

pytestmark = pytest.mark.once

for package in ("psutil", "scipy", "tqdm"):
    pytest.importorskip(package, reason=f"{package} is not installed")

from examples.compare import arms, command, report  # noqa: E402
from examples.compare.experiments import EXPERIMENTS, Hypothesis  # noqa: E402
from examples.compare.paired import family, holm  # noqa: E402
from examples.compare.runs import Run, Runner, wanted  # noqa: E402
from examples.compare.table import Table  # noqa: E402
from examples.quickstart.training import Machine, megatron_steps  # noqa: E402
from megatron_moe_spec.arguments import add_moe_spec_args  # noqa: E402

LOSS = "validation_loss"
CPU = Machine("megatron.training", "CPU", 1, cpu=True)
of_each_experiment = pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)


# Plan


@of_each_experiment
def test_arms_differ_in_their_losses_only(experiment, tmp_path):
    runner = Runner(experiment, CPU, tmp_path / "text", tmp_path, 2)
    parser = add_moe_spec_args(argparse.ArgumentParser())
    parser.add_argument("--moe-z-loss-coeff", type=float)
    for one in experiment.all_arms:
        without = tuple(flag for flag in one.flags if "loss-coeff=" not in flag and flag != arms.PATHWAY)
        plain = runner.command(Run(replace(one, flags=without), 7))
        losses = [flag for flag in runner.command(Run(one, 7)) if flag not in plain]
        parser.parse_args(losses)
        assert (one.name.split("-noise")[0] in (arms.BASELINE, "dense")) == (not losses), one.name


@of_each_experiment
def test_hypotheses_are_of_the_experiment_s_arms_and_measures(experiment):
    names = [one.name for one in experiment.all_arms]
    assert len(set(names)) == len(names)
    for hypotheses in experiment.families.values():
        assert len(set(hypotheses)) == len(hypotheses)
        for one in hypotheses:
            assert {one.arm, one.against} <= set(names) and one.arm != one.against and one.measure in report.TITLES


def test_coefficients_are_multiples_of_the_papers():
    assert arms.arm("both", 10).flags == (
        "--moe-specialization-loss-coeff=0.02",
        "--moe-coupling-loss-coeff=0.01",
    )
    assert arms.arm("pathway", 1).flags == ("--moe-coupling-loss-coeff=0.001", "--moe-coupling-type=pathway")
    # 2e-3 k (k - 1)
    assert arms.summed(10, top_k=4).flags == ("--moe-specialization-loss-coeff=0.24", "--moe-coupling-loss-coeff=0.01")


def test_the_protocol_names_what_runs():
    protocol = (ROOT / "docs/evidence/protocol.md").read_text()
    for name, heading in {
        "text": "Text (E1)",
        "domains": "Domains (E1",
        "upcycling": "Upcycling (E3)",
        "clusters": "Clusters (E4)",
    }.items():
        experiment = EXPERIMENTS[name]
        (section,) = re.findall(rf"^## {re.escape(heading)}.*?(?=^## )", protocol, re.S | re.M)
        steps = f"{experiment.iterations} steps"
        seeds = f"seeds {experiment.seeds[0]} to {experiment.seeds[-1]}"
        words = " ".join(section.split())
        assert steps in words and seeds in words, name
        for hypotheses in experiment.families.values():
            assert all(one.measure == LOSS or f"`{one.measure}`" in words for one in hypotheses), name


def test_a_group_of_arms_runs_with_all_seeds_before_the_next():
    names = {"baseline", "erc-1x", "both-10x"}
    found = wanted(EXPERIMENTS["text"], names, [101, 102])
    first = [("baseline", 101), ("both-10x", 101), ("baseline", 102), ("both-10x", 102)]
    assert [(run.arm.name, run.seed) for run in found] == [*first, ("erc-1x", 101), ("erc-1x", 102)]


# Running

TRAINING = """
import json, pathlib, sys, time
folder, loss = pathlib.Path(sys.argv[1]), float(sys.argv[2])
others = len(list(folder.parent.glob("*/running")))
(folder / "running").touch()
time.sleep(0.3)
with (folder / "log.jsonl").open("w") as file:
    for i in range(1, 11):
        print(json.dumps({"iteration": i, "mean_abs_cos": 0.1 * i, "step_time_s": 0.5}), file=file)
(folder / "found.json").write_text(json.dumps({"validation_loss": loss}))
(folder / "weights.pt").touch()
(folder / "concurrent").write_text(str(others + 1))
(folder / "running").unlink()
sys.exit("no such luck" if loss < 0 else 0)
"""


class FakeRunner(Runner):
    """Its runs are tiny scripts, each leaving the loss that ``losses`` gives it by arm."""

    losses: dict
    stream = None

    def command(self, run):
        return [sys.executable, "-c", TRAINING, str(self.work / run.name), str(self.losses[run.arm.name])]


def fake(folder, experiment="text", **losses):
    runner = FakeRunner(EXPERIMENTS[experiment], CPU, folder / "text", folder / "runs", 2)
    runner.losses = {name.replace("_", "-"): loss for name, loss in losses.items()}
    runner.stream = io.StringIO()
    return runner


def test_runs_go_on_after_what_is_finished(tmp_path):
    names = ("baseline", "both-10x")
    runs, table = wanted(EXPERIMENTS["text"], names, (101, 102)), Table(tmp_path / "runs.csv")
    runner = fake(tmp_path, baseline=2.0, both_10x=1.5)
    assert runner.run_all(runs[:3], table)
    stamps = {run: os.stat(runner.work / run.name / "found.json").st_mtime_ns for run in runs[:3]}
    table = Table(tmp_path / "runs.csv")  # as another process would read it
    assert runner.run_all(runs, table) and runner.run_all(runs, table)
    printed = runner.stream.getvalue()
    assert "3 of 4 runs are finished already" in printed and "both-10x-seed102: validation loss 1.5000" in printed
    assert "finished: 1/1 runs, 00:00 left" in printed
    assert {run: os.stat(runner.work / run.name / "found.json").st_mtime_ns for run in runs[:3]} == stamps
    concurrent = [int(path.read_text()) for path in tmp_path.glob("runs/*/concurrent")]
    assert len(concurrent) == 4 and max(concurrent) <= 2
    read = Table(tmp_path / "runs.csv")
    assert read.of("both-10x", LOSS) == {101: 1.5, 102: 1.5}
    assert read.of("baseline", "step_time_s") == {101: 0.5, 102: 0.5}


def test_a_failed_run_stops_the_experiment_and_shows_its_log(tmp_path):
    runs, table = wanted(EXPERIMENTS["text"], ("baseline", "erc-1x"), (101,)), Table(tmp_path / "runs.csv")
    with pytest.raises(SystemExit, match="erc-1x-seed101 run failed(.|\n)*no such luck(.|\n)*log.txt"):
        fake(tmp_path, baseline=2.0, erc_1x=-1.0).run_all(runs[::-1], table)
    assert ("erc-1x", 101) not in Table(tmp_path / "runs.csv")


def test_no_run_is_started_that_would_end_after_the_budget(tmp_path, monkeypatch):
    now, sleep = [0.0], time.sleep

    def wait(seconds):  # five seconds of a clock that only waiting moves
        sleep(seconds)
        now[0] += 5

    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=wait)
    monkeypatch.setattr("examples.compare.runs.time", clock)
    runs, table = wanted(EXPERIMENTS["text"], ("baseline", "both-10x"), (101, 102)), Table(tmp_path / "runs.csv")
    runner = fake(tmp_path, baseline=2.0, both_10x=1.5)
    assert not runner.run_all(runs, table, seconds=5)
    assert len(table.rows) == 2 and len(runner.missing(runs, table)) == 2
    assert runner.run_all(runs, table, seconds=5) and len(table.rows) == 4


def test_what_a_run_starts_from_runs_before_it(tmp_path):
    experiment = EXPERIMENTS["upcycling"]
    runs, table = wanted(experiment, {"baseline-noise-0"}, (101, 102)), Table(tmp_path / "runs.csv")
    assert [run.name for run in runs][:2] == ["dense-seed101", "dense-seed102"] and len(runs) == 4
    runner = fake(tmp_path, "upcycling", dense=3.0, baseline_noise_0=2.0)
    assert runner._next(runs[2:]) is None
    assert runner.run_all(runs, table)
    # Results came from elsewhere, without the weights: what is to start from them needs them again.
    del table.rows["baseline-noise-0", 102]
    os.remove(runner.weights("dense", 102))
    assert [run.name for run in runner.missing(runs, table)] == ["dense-seed102", "baseline-noise-0-seed102"]
    real = Runner(experiment, CPU, tmp_path / "text", tmp_path / "runs", 2)
    assert real.command(runs[0])[real.command(runs[0]).index("--keep-weights") + 1] == str(runner.weights("dense", 101))
    assert real.command(runs[2])[real.command(runs[2]).index("--upcycle") + 1] == str(runner.weights("dense", 101))


def test_folders_hold_runs_of_the_same_settings(tmp_path):
    path = tmp_path / "settings.json"
    command.keep({"iterations": 4, "corpus": "a"}, path)
    command.keep({"iterations": 4, "corpus": "a"}, path)
    with pytest.raises(SystemExit, match=r"other settings \(corpus\): remove it, or choose another --output"):
        command.keep({"iterations": 4, "corpus": "b"}, path)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--arms", "specialisation"], "--arms specialisation: text has baseline, control"),
        (["--seeds", "13"], "--seeds must be 1 to 12"),
        (["--seeds", "0"], "--seeds must be 1 to 12"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--budget-minutes", "0"], "--budget-minutes must be positive"),
    ],
)
def test_bad_options_are_named(flags, message, capsys):
    with pytest.raises(SystemExit):
        command.parse_options(flags)
    assert message in capsys.readouterr().err


# Statistics


def tabled(path, values):
    """A table with {arm: {seed: loss}}."""
    table = Table(path)
    for arm, by_seed in values.items():
        for seed, value in by_seed.items():
            table.add({"arm": arm, "seed": seed, LOSS: value})
    return table


def test_differences_are_paired_by_seed(tmp_path):
    table = tabled(
        tmp_path / "runs.csv",
        {"both-10x": {1: 11.0, 2: 22.0, 3: 33.0, 4: 9.0}, "baseline": {3: 30.0, 2: 20.0, 1: 10.0, 5: 0.0}},
    )
    (found,) = family(table, [Hypothesis("both-10x")])
    assert found.values == (1.0, 2.0, 3.0) and found.mean == 2.0 and found.lower == 0
    # The standard deviation is 1, and t of 2 degrees of freedom 4.3027; t = 2 sqrt(3).
    assert found.high - found.mean == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert found.p == found.corrected == pytest.approx(0.0742, rel=1e-3)
    assert found.signed_rank == pytest.approx(0.25)
    assert family(table, [Hypothesis("mass-10x")]) == []


def test_hypotheses_without_runs_yet_count_in_the_correction(tmp_path):
    values = {"both-10x": {1: 1.1, 2: 2.0, 3: 3.0}, "baseline": {1: 2.0, 2: 3.0, 3: 4.2}}
    table = tabled(tmp_path / "runs.csv", values)
    (found,) = family(table, [Hypothesis("both-10x"), Hypothesis("mass-10x"), Hypothesis("pathway-10x")])
    assert found.corrected == pytest.approx(3 * found.p)


def test_holm():
    # The step-down factors are 4, 3, 2, 1, and no value falls below the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005], 4) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9], 2) == [1.0, 1.0]
    assert holm([], 3) == []


# Report


def shifted(folder):
    """A table of three seeds: one arm far from the baseline, one near it, one with no interval that excludes 0."""
    shifts = {"baseline": (0, 0, 0), "both-10x": (-0.1000, -0.1010, -0.0990), "mass-10x": (0.02, 0.03, 0.025)}
    shifts |= {"pathway-10x": (0.1, -0.1, 0.03)}
    values = {arm: {100 + i: 2.0 + 0.1 * i + shift for i, shift in enumerate(s, 1)} for arm, s in shifts.items()}
    versions = {"python": "3.12"}
    (folder / "settings.json").write_text(
        json.dumps(
            {
                "experiment": "text",
                "versions": versions,
                "machine": {"loop": "megatron.training", "device": "CPU, 2 cores"},
            }
        )
    )
    return tabled(folder / "runs.csv", values)


def test_report_tells_differences_from_chance(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    experiment = replace(EXPERIMENTS["text"], seeds=(101, 102, 103))
    report.write(experiment, shifted(tmp_path), tmp_path)
    text, printed = (tmp_path / "report.md").read_text(), capsys.readouterr().out
    # 4.3027 * 0.001 / sqrt(3)
    row = "| 2.2000 | 2.1000 | **-0.1000 ± 0.0025** | 3 of 3 | < 0.0001 | 0.0001 | 0.2500 |"
    assert row in text and row in printed
    assert "| 2.2000 | 2.2250 | **+0.0250 ± 0.0124** | 0 of 3 | 0.0131 | 0.0392 | 0.2500 |" in text
    assert "| 2.2000 | 2.2100 | +0.0100 ± " in text and "**a part: 12** of 57 runs" in text
    assert (tmp_path / "differences.png").read_bytes().startswith(b"\x89PNG") and "differences.png" in text
    # Nothing is found by a part of the seeds.
    report.write(EXPERIMENTS["text"], Table(tmp_path / "runs.csv"), tmp_path)
    assert row.replace("**", "") in (tmp_path / "report.md").read_text() and "**-" not in capsys.readouterr().out


def test_pictures_hold_the_labels_of_their_axes(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    kept = []
    table = Table(report.EVIDENCE / "text" / "runs.csv")
    with monkeypatch.context() as patched:
        patched.setattr(pyplot, "close", kept.append)
        report.draw(EXPERIMENTS["text"], report.judged(EXPERIMENTS["text"], table), tmp_path / "differences.png")
    (figure,) = kept
    assert len(figure.axes) == 3
    for axis in figure.axes:
        label = axis.xaxis.label.get_window_extent()
        assert figure.bbox.x0 <= label.x0 and label.x1 <= figure.bbox.x1
        low, high = axis.get_xlim()
        shown = [
            tick.label1.get_window_extent() for tick in axis.xaxis.get_major_ticks() if low <= tick.get_loc() <= high
        ]
        assert len(shown) > 2 and all(left.x1 < right.x0 for left, right in zip(shown, shown[1:]))
    pyplot.close(figure)


def test_gains_in_inference_count_where_validation_loss_stays_within_the_bound(tmp_path):
    experiment, table = EXPERIMENTS["domains"], shifted(tmp_path)
    hypotheses = [Hypothesis("both-10x", LOSS), Hypothesis("mass-10x", LOSS)]
    said = report.within_bound(experiment, table, family(table, hypotheses))
    assert "below +0.01." in said and "both-10x -0.0975 (counts), mass-10x +0.0374 (does not count)." in said
    # Nothing is said of a part of the seeds, nor of a part of the arms.
    settings = json.loads((tmp_path / "settings.json").read_text())
    part = replace(experiment, families={report.INFERENCE: hypotheses})
    whole = replace(part, seeds=(101, 102, 103))
    families = report.judged(whole, table)
    assert said in report.text(whole, table, families, settings)
    assert "A gain counts" not in report.text(part, table, families, settings)
    more = replace(whole, families={report.INFERENCE: [*hypotheses, Hypothesis("erc-10x", LOSS)]})
    assert "A gain counts" not in report.text(more, table, families, settings)


def test_report_of_one_seed_has_no_interval(tmp_path):
    pytest.importorskip("matplotlib")
    table = shifted(tmp_path)
    for key in [key for key in table.rows if key[1] != 101]:
        del table.rows[key]
    report.write(EXPERIMENTS["text"], table, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| -0.1000 | 1 of 1 |  |  |  |" in text and "inf" not in text and "nan" not in text


def test_summary_shows_every_hypothesis_of_a_family_that_has_run(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(report, "save", lambda panels, columns, path: saved.extend(panels))
    cost = "cost_of_1_experts"
    table = Table(tmp_path / "runs.csv")
    for arm, shift in (("baseline", 0.0), ("both-10x", 0.5), ("erc-10x", 0.1)):
        for seed in (1, 2, 3):
            table.add({"arm": arm, "seed": seed, LOSS: 2 + shift * seed, cost: shift * seed})
    families = {
        "Costs": (Hypothesis("both-10x", cost),),
        "Ours": (Hypothesis("both-10x", LOSS),),
        "Others": (Hypothesis("erc-10x", LOSS),),
        "Without runs": (Hypothesis("erc-10x", cost), Hypothesis("mass-10x", cost)),
    }
    experiment = replace(EXPERIMENTS["text"], seeds=(1, 2, 3), families=families)
    monkeypatch.setitem(report.EXPERIMENTS, "text", experiment)
    report.summary({"text": table}, tmp_path / "summary.png")
    shown = [(measure, [name for name, _ in named]) for _, _, measure, named in saved]
    assert shown == [(LOSS, ["both-10x", "erc-10x"]), (cost, ["both-10x"])]


def test_published_reports_agree_with_their_runs(tmp_path):
    """Every report in docs/evidence is what its runs.csv gives."""
    folders = [path.parent for path in report.EVIDENCE.glob("*/runs.csv")]
    assert folders
    overview = (report.EVIDENCE / "README.md").read_text()
    for folder in folders:
        settings = json.loads((folder / "settings.json").read_text())
        experiment, table = EXPERIMENTS[settings["experiment"]], Table(folder / "runs.csv")
        assert not settings["tiny"] and settings["flags"] == " ".join(experiment.flags("SEED"))
        families = report.judged(experiment, table)
        assert (folder / "report.md").read_text() == report.text(experiment, table, families, settings)
        names = {one.name for one in experiment.all_arms}
        assert all(arm in names and seed in experiment.seeds for arm, seed in table.rows)
        expected = len(names) * len(experiment.seeds)
        assert re.search(rf"^\| `{folder.name}` \| .* \| {len(table.rows)} of {expected} \|$", overview, re.M)


def test_another_cpu_changes_no_verdict():
    """What docs/evidence says of the arms of the text experiment that ran on another CPU than their baselines."""
    experiment, folder = EXPERIMENTS["text"], report.EVIDENCE / "text"
    table, baselines = Table(folder / "runs.csv"), Table(folder / "baseline-another-cpu.csv")

    def verdicts():
        families = report.judged(experiment, table).items()
        return {title: [report.is_found(experiment, one) for one in found] for title, found in families}

    table.rows.update({("again", seed): row for (_, seed), row in baselines.rows.items()})
    again, control = family(table, [Hypothesis("again"), Hypothesis(arms.CONTROL)])
    assert len(again.values) == len(experiment.seeds)
    said = " ".join((report.EVIDENCE / "README.md").read_text().split())
    assert f"differ by {report.interval(again, 4)} nats" in said
    assert f"control by {report.interval(control, 4)}" in said
    with_published = verdicts()
    table.rows.update(baselines.rows)
    assert verdicts() == with_published
    assert sum(next(found for title, found in with_published.items() if title.startswith("Secondary"))) == 1


# The whole


@pytest.mark.slow
@needs_training_loop
def test_an_experiment_cut_short(tmp_path):
    """Real training of one arm beside the baseline, four steps each, and its report."""
    pytest.importorskip("matplotlib")
    flags = ["--arms", "erc-10x", "--seeds", "1", "--tiny", "--output", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "examples.compare", *flags]
    found = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    (baseline, erc) = csv.DictReader((tmp_path / "out/runs.csv").open())
    assert (baseline["arm"], erc["arm"]) == ("baseline", "erc-10x")
    assert erc[LOSS] != baseline[LOSS] and float(baseline["peak_memory_mb"]) > 100
    # Of the last steps of training, and of held-out text.
    assert baseline["load_imbalance"] != baseline["held_out_load_imbalance"] and baseline["held_out_dead_experts"]
    # The loss of the first step is taken before anything has changed: same weights, same data.
    logs = [
        (ROOT / f"build/compare/runs/text-tiny/{name}-seed101/log.txt").read_text() for name in ("baseline", "erc-10x")
    ]
    first, other_first = (megatron_steps(log)[0] for log in logs)
    assert first == other_first
    assert "expert-router coupling" in (tmp_path / "out/report.md").read_text()
    again = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)
    assert "2 of 2 runs are finished already" in again.stdout
