"""Reports of runs with more measured steps than a figure shows: a sample of bounded size, with exact final values."""

import json
import re

import pytest
from test_report import record, write_run

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from megatron_moe_spec.report import events, figures, lines, measurements
from megatron_moe_spec.report.command import main
from megatron_moe_spec.report.contents import sections
from megatron_moe_spec.report.runs import RunError, read_run
from megatron_moe_spec.report.sampling import blocks, evenly
from megatron_moe_spec.report.table import summary

pytestmark = pytest.mark.once

MOST = 20
SPIKE = 137  # a step that is in no sample


@pytest.fixture
def sampled(monkeypatch):
    monkeypatch.setattr(measurements, "MOST_STEPS", MOST)


def _record(iteration):
    """Varies from step to step, with a spike of one loss."""
    one = record(iteration, scale=1.0 + (iteration * 7 % 13) / 50)
    return {**one, "coupling_loss": 9.0 if iteration == SPIKE else one["coupling_loss"]}


def _write(folder, steps):
    return write_run(folder, map(_record, range(1, steps + 1)))


@pytest.mark.parametrize("number", [0, 1, 2, 5, 6, 7, 99, 1000])
def test_a_sample_has_the_first_and_the_last(number):
    items = list(range(number))
    found = evenly(items, 5)
    assert len(found) == min(number, 5) and found[:1] == items[:1] and found[-1:] == items[-1:]
    distances = {b - a for a, b in zip(found, found[1:])}
    assert not distances or max(distances) - min(distances) <= 1


@pytest.mark.parametrize("number", [0, 1, 4, 5, 11, 1000])
def test_blocks_hold_each_point_once(number):
    points = [(10 * i, i * i) for i in range(number)]
    found = blocks(points, 5)
    assert len(found) <= 5 and [point for block in found for point in block] == points


def test_blocks_are_of_the_same_width_where_points_are_not():
    """As are series of a sample and of all steps at the end."""
    points = [(x, 0.0) for x in (*range(0, 900, 10), *range(900, 1000))]
    widths = [block[-1][0] - block[0][0] for block in blocks(points, 10)]
    assert max(widths) <= 2 * 1000 / 10


def test_extremes_and_ends_are_drawn():
    points = [(x, 1.0) for x in range(1, 10001)]
    points[4320] = (4321, 50.0)
    points[7000] = (7001, -3.0)
    axis = figures.Figure("", "", [lambda axis: figures.draw_curves("", {"loss": points}, {}, axis)]).draw().axes[0]
    (band,) = axis.collections
    corners = band.get_paths()[0].vertices
    assert (corners[:, 0].min(), corners[:, 0].max()) == (1, 10000)
    assert (corners[:, 1].min(), corners[:, 1].max()) == (-3.0, 50.0)
    assert len(axis.get_lines()[0].get_xdata()) <= figures.MOST_POINTS
    figures.pyplot().close("all")


def test_what_is_kept_and_drawn_does_not_grow_with_the_steps(tmp_path, sampled, monkeypatch):
    monkeypatch.setattr(figures, "MOST_LINES", 2)  # more layers are a heat map
    kept = []
    for steps in (600, 1200):
        run = read_run(_write(tmp_path / str(steps), steps))
        layers = [values for of_layers in run.layers.values() for values in of_layers.values()]
        assert all(len(values) == MOST and values[0][0] == 1 and values[-1][0] == steps for values in layers)
        assert len(run.loads) == MOST and len(run.series["coupling_loss"]) == steps
        kept.append(sum(map(len, layers)))
        found = {figure.name: figure for section in sections(run, None) for figure in section.figures}
        names = ("coupling_loss", "routing_entropy", "load_over_time")
        axes = [axis for name in names for axis in found[name].draw().axes if axis.get_title()]
        tables = [image.get_array().shape for axis in axes for image in axis.get_images()]
        assert tables == [(3, MOST), (4, MOST)]  # layers, experts
        assert all(len(line.get_xdata()) <= figures.MOST_POINTS for axis in axes for line in axis.get_lines())
        figures.pyplot().close("all")
    assert kept[0] == kept[1] > 0


def test_final_values_and_losses_are_those_of_all_steps(tmp_path, monkeypatch):
    folder = _write(tmp_path / "run", 400)
    whole = read_run(folder)
    monkeypatch.setattr(measurements, "MOST_STEPS", MOST)
    run = read_run(folder)
    assert run.window == 40 and len(run.series["routing_entropy"]) == MOST + 40 - 2  # two of the sample are there
    assert summary(run, None) == summary(whole, None) and len(summary(run, None)) > 5
    assert run.series["coupling_loss"] == whole.series["coupling_loss"]
    assert dict(run.series["coupling_loss"])[SPIKE] == 9.0
    assert run.measured_iterations == whole.measured_iterations and run.lists == whole.lists
    for name, of_layers in run.layers.items():
        assert all(set(values) <= set(whole.layers[name][layer]) for layer, values in of_layers.items())


def test_a_line_outside_of_the_sample_is_not_parsed(tmp_path, sampled, monkeypatch):
    folder = _write(tmp_path / "run", 400)
    parsed = []
    loads = json.loads
    monkeypatch.setattr(lines.json, "loads", lambda text: parsed.append(len(text)) or loads(text))
    read_run(folder)
    whole = len(json.dumps(_record(1))) // 2
    assert sum(length > whole for length in parsed) <= MOST + 40


def test_the_page_says_that_it_shows_a_sample(tmp_path):
    few = ("layer", "layer_index", "routing_entropy")
    written = []
    for steps in (measurements.MOST_STEPS, 1200):
        records = map(record, range(1, steps + 1))
        records = (
            {**one, "pairs": [], "layers": [{k: row[k] for k in few} for row in one["layers"]]} for one in records
        )
        out = tmp_path / f"{steps}.html"
        assert main([str(write_run(tmp_path / str(steps), records)), "--out", str(out)]) == 0
        written.append(out.read_text())
    whole, sample = written
    assert "sample" not in whole.split("<section>")[0]
    assert "by a sample: 500 of 1,200 steps" in sample and "all of the last 120 iterations" in sample


def test_after_a_restart_the_last_line_of_a_step_counts(tmp_path, sampled):
    folder = _write(tmp_path / "run", 200)
    again = [record(i, scale=5.0) for i in range(151, 301)]
    with (folder / "moe_spec_metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(one) + "\n" for one in again))
    run = read_run(folder)
    assert run.measured_iterations == list(range(1, 301))
    for iteration, value in run.layers["mean_abs_cos"]["2"]:
        expected = record(iteration, scale=5.0) if iteration > 150 else _record(iteration)
        assert value == expected["layers"][1]["mean_abs_cos"]
    assert [value for i, value in run.series["coupling_loss"] if i > 150] == [4.0] * 150


@pytest.mark.parametrize("cut", [30, 200, 900])
def test_a_line_that_was_cut_off_before_a_restart_is_named(tmp_path, sampled, cut):
    """Where another follows it without a line break; it is in no sample."""
    folder = _write(tmp_path / "run", 400)
    file = folder / "moe_spec_metrics.jsonl"
    text = file.read_text().splitlines()
    text[SPIKE - 1] = text[SPIKE - 1][:cut] + text[SPIKE - 1]
    file.write_text("\n".join(text) + "\n")
    with pytest.raises(
        RunError, match=f"moe_spec_metrics.jsonl:{SPIKE} is no record of an iteration: delete this line"
    ):
        read_run(folder)


def test_a_last_line_that_is_cut_off_is_not_the_last_of_the_sample(tmp_path, sampled):
    folder = _write(tmp_path / "run", 400)
    with (folder / "moe_spec_metrics.jsonl").open("a") as file:
        file.write(json.dumps(record(401))[:-1])
    run = read_run(folder)
    assert run.measured_iterations[-1] == 400 and list(run.loads)[-1] == 400
    assert any("cut off" in notice for notice in run.notices)


def test_lines_in_another_form_are_read(tmp_path, sampled):
    records = [{"layers": one["layers"], **one} for one in map(_record, range(1, 101))]
    assert next(iter(records[0])) == "layers"
    other = read_run(write_run(tmp_path / "other", records))
    own = read_run(_write(tmp_path / "own", 100))
    assert (other.series, other.layers, other.lists) == (own.series, own.layers, own.lists)


@pytest.fixture
def event_folder(tmp_path):
    """Event files as training leaves them, with series of each layer, in two parts."""
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter
    for part, steps in enumerate((range(1, 31), range(21, 41))):
        with writer(tmp_path / "events", filename_suffix=f".{part}") as opened:
            for step in steps:
                opened.add_scalar("lm loss", 10.0 * part + step, step)
                opened.add_scalar("coupling_loss", 0.5, step, new_style=True)
                opened.add_scalar("moe_spec/coupling_loss/layers_1_2", 0.25, step)
                opened.add_text("lm loss of", "text", step)
    return tmp_path / "events"


def test_events_are_those_that_tensorboard_reads(event_folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reference = EventAccumulator(str(event_folder), size_guidance={"scalars": 0, "tensors": 0})
    reference.Reload()
    found = list(events.read_scalars(event_folder, {"lm loss", "coupling_loss"}))
    losses = [(step, value) for tag, step, value in found if tag == "lm loss"]
    assert losses == [(one.step, one.value) for one in reference.Scalars("lm loss")] and len(losses) == 50
    others = [(step, value) for tag, step, value in found if tag == "coupling_loss"]
    assert others == [(one.step, 0.5) for one in reference.Tensors("coupling_loss")] and len(others) == 50
    assert len(found) == 100


def test_events_of_layers_are_not_parsed(event_folder, monkeypatch):
    from tensorboard.compat.tensorflow_stub import pywrap_tensorflow

    checked = []
    real = pywrap_tensorflow.masked_crc32c
    monkeypatch.setattr(pywrap_tensorflow, "masked_crc32c", lambda data: checked.append(data) or real(data))
    found = list(events.read_scalars(event_folder, {"lm loss", "coupling_loss"}))
    assert len(checked) == len(found) == 100


def test_an_event_file_that_is_cut_off_or_damaged(event_folder):
    last = sorted(event_folder.iterdir())[-1]
    before = list(events.read_scalars(event_folder, {"lm loss"}))
    data = last.read_bytes()
    at = data.rindex(b"lm loss\x15")
    last.write_bytes(data[: at + 4])
    assert list(events.read_scalars(event_folder, {"lm loss"})) == before[:-1]
    last.write_bytes(data[: at + 9] + b"?" + data[at + 10 :])
    with pytest.raises(RunError, match="is damaged: cut it off there, by truncate -s ") as refused:
        list(events.read_scalars(event_folder, {"lm loss"}))
    size = int(re.search(r"-s (\d+)", str(refused.value))[1])
    last.write_bytes(data[:size])
    assert list(events.read_scalars(event_folder, {"lm loss"})) == before[:-1]
