"""The quickstart's data set, its reading of the runs, its table and its progress line."""

import io
import json
import math
import re

import pytest
from forks import program

pytest.importorskip("tqdm", reason="tqdm is not installed")

from examples.quickstart import data, report, run, training
from examples.quickstart.progress import Progress
from megatron_moe_spec.report import runs as results

ITERATIONS = 120
WINDOW = 12
RUN = {
    "iterations": ITERATIONS,
    "seed": 1,
    "tokens_per_step": 1024,
    "coefficients": {
        "baseline": {"specialization": 0.0, "coupling": 0.0},
        "specialized": {"specialization": 0.02, "coupling": 0.01},
    },
    "machine": {"loop": "megatron.core", "device": "CPU, 2 cores", "processes": 2, "cpu": True},
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "seconds": 12,
}


def loss_at(iteration, arm):
    return 5.0 / iteration + (0.5 if arm == "specialized" else 0.25)


def metrics_at(iteration, arm):
    specialized = 0.5 if arm == "specialized" else 1.0
    return {
        "iteration": iteration,
        "specialization_loss": specialized * 0.02,
        "coupling_loss": specialized * 0.9 + iteration / 1000,
        "layers": [
            {"layer": 0, "routing_entropy": 2.0 * specialized, "max_abs_cos": 0.3},
            {"layer": 1, "routing_entropy": 3.0 * specialized, "max_abs_cos": 0.7 * specialized},
        ],
        "pairs": [{"layers": [0, 1], "conditional_entropy": 1.5 * specialized, "normalized_mutual_information": None}],
    }


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_core_run(folder, arm):
    records = []
    for iteration in range(1, ITERATIONS + 1):
        record = {"iteration": iteration, "lm_loss": loss_at(iteration, arm), "step_time_s": 0.1}
        if iteration % 20 == 0:
            record["validation_loss"] = loss_at(iteration, arm) + 0.1
        records.append(record)
    write_lines(folder / "log.jsonl", records)
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"iteration": 121, "lm_')
    write_lines(folder / "moe_spec_metrics.jsonl", [metrics_at(i, arm) for i in range(10, ITERATIONS + 1, 10)])


def write_megatron_run(folder, arm):
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter(folder / "tensorboard")
    for iteration in range(1, ITERATIONS + 1):
        writer.add_scalar("lm loss", loss_at(iteration, arm), iteration)
        writer.add_scalar("iteration-time", 0.1, iteration)
        writer.add_scalar("load_balancing_loss", 1.0 if iteration > ITERATIONS - WINDOW else 2.0, iteration)
        # What Megatron logs of a loss that is not trained on must not win over what was measured.
        writer.add_scalar("specialization_loss", 9.0, iteration)
    for offset in (0.0, 0.2):
        writer.add_scalar("lm loss validation", loss_at(ITERATIONS, arm) + offset, ITERATIONS)
    writer.close()
    path = folder / "tensorboard/moe_spec_metrics.jsonl"
    write_lines(path, [metrics_at(i, arm) for i in range(10, ITERATIONS + 1, 10)])


def table_of(folder, write_run):
    runs = {}
    for arm in ("baseline", "specialized"):
        write_run(folder / arm, arm)
        runs[arm] = results.read_run(folder / arm).series
    return {row[0]: row[1:] for row in report.table(runs, ITERATIONS)}


@pytest.mark.parametrize("write_run", [write_core_run, write_megatron_run])
def test_table_has_the_values_of_both_kinds_of_run(tmp_path, write_run):
    rows = table_of(tmp_path, write_run)

    def expected(baseline, specialized, digits):
        return f"{baseline:.{digits}f}", f"{specialized:.{digits}f}", f"{specialized / baseline - 1:+.1%}"

    validation = [loss_at(ITERATIONS, arm) + 0.1 for arm in ("baseline", "specialized")]
    last_steps = range(ITERATIONS - WINDOW + 1, ITERATIONS + 1)
    train = [sum(loss_at(i, arm) for i in last_steps) / WINDOW for arm in ("baseline", "specialized")]
    assert rows["validation loss (nats per byte)"] == expected(*validation, 4)
    assert rows["validation perplexity"] == expected(*map(math.exp, validation), 4)
    assert rows["training loss"] == expected(*train, 4)
    assert rows["specialization loss"] == expected(0.02, 0.01, 5)
    assert rows["coupling loss"] == expected(0.9 + 0.115, 0.45 + 0.115, 4)
    assert rows["routing entropy of a token (nats)"] == expected(2.5, 1.25, 4)
    assert rows["expert overlap, largest abs(cos)"] == expected(0.7, 0.35, 4)
    assert rows["time of a step, median (ms)"] == expected(100, 100, 1)
    assert not any("mutual information" in name for name in rows), "a metric without values has no row"


def test_logged_losses_are_means_over_the_last_tenth(tmp_path):
    rows = table_of(tmp_path, write_megatron_run)
    assert rows["load-balancing loss"][:2] == ("1.0000", "1.0000")


def test_report_is_written(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for arm in ("baseline", "specialized"):
        write_core_run(tmp_path / arm, arm)
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    report.write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    printed = capsys.readouterr().out
    assert "coefficient 0.02" in text and "(curves.png)" in text
    baseline, specialized = (loss_at(ITERATIONS, arm) + 0.1 for arm in ("baseline", "specialized"))
    change = specialized / baseline - 1
    assert f"| validation loss (nats per byte) | {baseline:.4f} | {specialized:.4f} | {change:+.1%} |" in text
    assert f"{baseline:.4f}" in printed and str(tmp_path / "report.md") in printed
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_report_of_a_run_without_losses_says_what_to_do(tmp_path):
    with pytest.raises(SystemExit, match="No finished quickstart .*make quickstart"):
        report.write(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    with pytest.raises(SystemExit, match="No training loss .*make quickstart"):
        report.write(tmp_path)


def test_dataset_gives_the_bytes_back(megatron, tmp_path):
    from megatron.core.datasets import indexed_dataset

    documents = [b"def f():\n    pass\n", b"", "caf\u00e9 \u2014 \u03c0".encode(), bytes(range(256))]
    prefix = tmp_path / "folder" / "text"
    assert data.write_dataset(documents, prefix) == (3, sum(map(len, documents)) + 3)
    dataset = indexed_dataset.IndexedDataset(str(prefix))
    written = [dataset[index] for index in range(len(dataset))]
    assert [bytes(tokens[:-1].astype("uint8")) for tokens in written] == [text for text in documents if text]
    assert all(tokens[-1] == data.EOD and (tokens[:-1] < data.EOD).all() for tokens in written)
    assert list(dataset.document_indices) == [0, 1, 2, 3]
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["text.bin", "text.idx"]


def test_files_are_sources_in_an_order_of_their_names(tmp_path):
    names = ["a.py", "b/c.py", "b/tests/d.py", "test/e.py", "b/f.txt", "g.py"]
    for folder in ("here", "there"):
        for name in names if folder == "here" else reversed(names):
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
    found = [
        [path.relative_to(tmp_path / folder).as_posix() for path in data.text_files(tmp_path / folder)]
        for folder in ("here", "there")
    ]
    assert found[0] == found[1]
    assert sorted(found[0]) == ["a.py", "b/c.py", "g.py"]


def test_steps_are_read_from_both_kinds_of_log():
    console = (
        "noise\n [2026-01-01 00:00:00.000000] iteration       10/     600 | consumed samples: 80 |"
        " elapsed time per iteration (ms): 99.9 | lm loss: 2.500000E+00 | load_balancing_loss: 1.1E+00 |\n"
    )
    assert training.megatron_steps(console) == [(10, 2.5)]
    lines = '{"iteration": 1, "lm_loss": 5.5}\n{"iteration": 2, "validation_loss": 3.0}\n{"iteration": 3, "lm_lo'
    assert run.core_steps(lines) == [(1, 5.5)]


def test_both_arms_differ_in_the_coefficients_only(tmp_path):
    options = run.parse_options(["--iterations", "8", "--output", str(tmp_path)])
    coefficients = run.coefficients_of(options)
    for loop in ("megatron.training", "megatron.core"):
        machine = training.Machine(loop, "CPU", 2, cpu=True)
        commands = [
            run.command(machine, options, tmp_path / "text", tmp_path / "arm", arm) for arm in coefficients.values()
        ]
        different = [pair for pair in zip(*commands) if pair[0] != pair[1]]
        assert different == [
            ("--moe-specialization-loss-coeff=0.0", "--moe-specialization-loss-coeff=0.02"),
            ("--moe-coupling-loss-coeff=0.0", "--moe-coupling-loss-coeff=0.01"),
        ]
        assert "--cpu" in commands[0]


def test_progress_is_a_line_now_and_then_in_a_log():
    stream = io.StringIO()
    with Progress(200, "step", stream, seconds_between_lines=0) as progress:
        progress.set_description_str("baseline")
        progress.advance(1, "loss 6.000")
        progress.advance(100, "loss 2.000")
    lines = stream.getvalue().splitlines()
    assert any(re.fullmatch(r"baseline: 100/200 steps, \d\d:\d\d left, loss 2.000", line) for line in lines)
    assert "\r" not in stream.getvalue()


def test_progress_is_one_line_of_a_terminal():
    stream = io.StringIO()
    stream.isatty = lambda: True
    with Progress(200, "step", stream) as progress:
        progress.set_description_str("baseline")
        progress.advance(200, "loss 2.000")
    assert stream.getvalue().count("\n") == 1 and "200/200" in stream.getvalue()


@pytest.mark.parametrize("example", ["quickstart", "compare"])
def test_folder_that_cannot_be_written_is_one_clear_line(example, tmp_path):
    """Below a file: permissions do not bind root, as whom the tests may run."""
    (tmp_path / "file").write_text("")
    failed = program("-m", f"examples.{example}", "--output", tmp_path / "file" / "report")
    assert failed.returncode == 1 and not failed.stdout
    (line,) = failed.stderr.splitlines()
    assert line.startswith(f"Cannot write to {tmp_path / 'file' / 'report'} (Not a directory). Name another folder")
    assert '_ARGS="--output DIR"' in line


def test_folder_without_permission_is_explained(tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(training.tempfile, "TemporaryFile", refuse)
    with pytest.raises(SystemExit, match=r"^Cannot write to .*\(Permission denied\)"):
        training.make_output(tmp_path, "QUICKSTART_ARGS")
