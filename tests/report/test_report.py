"""The report of a run: one page that needs nothing else, with what the files say, and errors that name them."""

import json
import re
import shutil
import sys
from html.parser import HTMLParser

import pytest
import torch
from traces import random_trace, write_trace

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from megatron_moe_spec.report import figures
from megatron_moe_spec.report.command import main
from megatron_moe_spec.report.contents import _transitions, lift, sections
from megatron_moe_spec.report.runs import RunError, read_run
from megatron_moe_spec.report.table import summary

pytestmark = pytest.mark.once

ITERATIONS = range(10, 110, 10)
NUM_LAYERS, NUM_EXPERTS = 3, 4


def record(iteration, scale=1.0, num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS):
    def layer(number):
        return {
            "layer": number,
            "layer_index": number + 1,
            "routing_entropy": scale * (2.0 + number - iteration / 100),
            "mean_abs_cos": 0.1 * scale,
            "max_abs_cos": scale * (0.3 + 0.1 * number),
            "max_violation": 0.5 * number * scale,
            "load": [iteration + expert * number for expert in range(num_experts)],
            "mass_of_best": [0.6, 0.8],
            "router_singular_values": [4.0, 3.0, 2.0, 1.0][:num_experts],
            "router_mean_abs_cos": None,
            "specialization_loss": 0.01 * scale * (number + 1),
        }

    pairs = [
        {
            "layers": [number, number + 1],
            "conditional_entropy": 1.0,
            "normalized_mutual_information": 0.2 * scale,
            "null_normalized_mutual_information": 0.01,
        }
        for number in range(num_layers - 1)
    ]
    return {
        "iteration": iteration,
        "specialization_loss": 0.02 * scale,
        "coupling_loss": 0.8 * scale,
        "layers": [layer(number) for number in range(num_layers)],
        "pairs": pairs,
    }


def write_run(folder, records, trace=None):
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(one) + "\n" for one in records)
    (folder / "moe_spec_metrics.jsonl").write_text(lines)
    log = [{"iteration": i, "lm_loss": 5.0 - i / 50} for i in range(1, 101)]
    (folder / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in log))
    if trace is not None:
        write_trace(folder / "traces", trace)
    return folder


@pytest.fixture
def short(tmp_path):
    """A run whose report has one figure."""
    return write_run(tmp_path / "run", [])


@pytest.fixture
def folder(tmp_path):
    trace = random_trace(200, NUM_LAYERS, NUM_EXPERTS, 2, seed=0, num_batches=2, dropped=0.1, num_dense=1)
    return write_run(tmp_path / "run", map(record, ITERATIONS), trace)


class _Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.headings, self.addresses, self.alts, self.cells, self._inside = [], [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self._inside = tag
        for name, value in attributes:
            if name in ("src", "srcset", "href"):
                self.addresses.append(value)
            if name == "alt":
                self.alts.append(value)

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "h2":
            self.headings.append(data)
        if self._inside in ("td", "th"):
            self.cells.append(data)


def _page(path):
    return _Page(path.read_text())


def _refusal(capsys, *argv):
    assert main([str(one) for one in argv]) == 2
    return capsys.readouterr().err


def test_the_page_needs_nothing_else(folder, tmp_path):
    out = tmp_path / "out" / "report.html"
    assert main([str(folder), "--out", str(out)]) == 0
    found = _page(out)
    assert len(found.addresses) == len(found.alts) == 2 * len(set(found.alts)) > 20  # light and dark
    assert all(address.startswith("data:image/png;base64,") for address in found.addresses)
    assert "http" not in re.sub(r"base64,[^']*", "", out.read_text())
    assert found.headings == [
        *["Overview", "Final values", "Training", "Auxiliary losses", "Routing", "Balance", "Overlap of experts"],
        *["Co-activation", "Pathways", "Geometry of routers", "Fewer experts"],
    ]
    pictures = {file.name for file in (tmp_path / "out" / "report_figures").iterdir()}
    assert {
        "overview.png",
        "load.png",
        "mutual_information.png",
        "transitions_1_2.png",
        "coactivation_1.png",
    } <= pictures
    assert len(pictures) == len(set(found.alts))
    assert "1 of 2 experts carry 75.0%" in out.read_text()


def test_what_is_not_there_has_no_section(tmp_path):
    folder = write_run(tmp_path / "run", [])
    assert main([str(folder), "--out", str(tmp_path / "report.html")]) == 0
    assert _page(tmp_path / "report.html").headings == ["Final values", "Training"]


def test_final_values_are_those_of_the_files(folder, tmp_path):
    baseline = write_run(tmp_path / "baseline", [record(i, scale=2.0) for i in ITERATIONS])
    rows = {row[0]: row[1:] for row in summary(read_run(folder), read_run(baseline))}
    # The last tenth: iteration 100, three layers.
    entropy = sum(2.0 + layer - 1.0 for layer in range(3)) / 3
    assert rows["routing entropy of a token (nats)"] == (f"{2 * entropy:.4f}", f"{entropy:.4f}", "-50.0%")
    assert rows["expert overlap, largest abs(cos)"] == ("1.0000", "0.5000", "-50.0%")
    assert rows["specialization loss"] == ("0.04000", "0.02000", "-50.0%")
    assert rows["max violation of the load, of a step"][1] == "0.500"
    loss = sum(5.0 - i / 50 for i in range(91, 101)) / 10
    assert rows["training loss"] == (f"{loss:.4f}", f"{loss:.4f}", "+0.0%")
    assert "router rows, mean abs(cos)" not in rows


def test_the_baseline_is_in_the_table(short, tmp_path):
    out = tmp_path / "report.html"
    assert main([str(short), "--baseline", str(short), "--out", str(out)]) == 0
    loss = f"{sum(5.0 - i / 50 for i in range(91, 101)) / 10:.4f}"
    header = ["baseline", "this run", "change"]
    assert _page(out).cells == [*header, "training loss", loss, loss, "+0.0%"]


def test_layers_are_numbered_as_in_the_model(folder):
    run = read_run(folder)
    assert list(run.layers["routing_entropy"]) == ["1", "2", "3"]
    assert run.layers["routing_entropy"]["2"][0] == (10, pytest.approx(2.9))
    assert list(run.layers["conditional_entropy"]) == ["1-2", "2-3"]
    assert run.names == ["1", "2", "3"] and run.model == "3 MoE layers of 4 experts, 2 for each token"
    assert run.loads[100].tolist()[2] == [100, 102, 104, 106]


def test_a_step_that_was_run_again_counts_once(folder):
    lines = [record(100, scale=3.0), record(110)]
    with (folder / "moe_spec_metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(one) + "\n" for one in lines))
    values = dict(read_run(folder).series["coupling_loss"])
    assert values[100] == pytest.approx(2.4) and values[110] == pytest.approx(0.8) and len(values) == 11


def test_lines_after_a_restart_count_in_logs_too(short):
    lines = [{"iteration": i, "lm_loss": 40.0 + i, "validation_loss": 7.0} for i in (99, 100, 101)]
    lines.append({"iteration": 101, "validation_loss": 9.0})
    with (short / "log.jsonl").open("a") as file:
        file.write("".join(json.dumps(one) + "\n" for one in lines))
    series = read_run(short).series
    losses = dict(series["lm_loss"])
    assert losses[98] == 5.0 - 98 / 50 and [losses[i] for i in (99, 100, 101)] == [139.0, 140.0, 141.0]
    assert series["validation_loss"][-1] == (101, 8.0)  # two evaluations of the last iteration


def test_measurements_are_in_order_after_a_restart(folder):
    with (folder / "moe_spec_metrics.jsonl").open("a") as file:
        file.write(json.dumps(record(55)) + "\n")
    assert list(read_run(folder).loads) == [10, 20, 30, 40, 50, 55, 60, 70, 80, 90, 100]


def test_the_end_of_a_measure_is_its_own(folder):
    with (folder / "log.jsonl").open("a") as file:
        file.write("".join(json.dumps({"iteration": i, "lm_loss": 1.0}) + "\n" for i in range(101, 1001)))
    rows = {row[0]: row[1] for row in summary(read_run(folder), None)}
    assert rows["coupling loss"] == "0.8000" and rows["training loss"] == "1.0000"


def test_a_line_that_is_cut_off(short, tmp_path, capsys):
    file = short / "moe_spec_metrics.jsonl"
    with file.open("a") as lines:
        lines.write('{"iteration": 110, "lay')
    out = tmp_path / "report.html"
    assert main([str(short), "--out", str(out)]) == 0
    assert "The last line of moe_spec_metrics.jsonl is cut off" in out.read_text()
    with file.open("a") as lines:
        lines.write("\n" + json.dumps(record(120)) + "\n")
    assert f"{file}:1 is no record of an iteration: delete this line" in _refusal(
        capsys, short, "--out", out, "--force"
    )


def test_errors_name_what_to_do(folder, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "train with --moe-spec-metrics-interval and --tensorboard-dir" in _refusal(capsys, empty)
    assert "does not exist" in _refusal(capsys, tmp_path / "nothing")
    other = write_run(tmp_path / "other", [record(i, num_experts=3) for i in ITERATIONS])
    message = "3 MoE layers of 3 experts, .* 3 MoE layers of 4 experts.*: name a baseline of the same model"
    assert re.search(message, _refusal(capsys, folder, "--baseline", other, "--out", tmp_path / "a.html"))
    bare = [{**one, "layers": [{"layer": row["layer"]} for row in one["layers"]]} for one in map(record, ITERATIONS)]
    bare = write_run(tmp_path / "bare", [{**one, "layers": one["layers"][:2], "pairs": []} for one in bare])
    message = _refusal(capsys, folder, "--baseline", bare, "--out", tmp_path / "a.html")
    assert "bare has 2 MoE layers, " in message and "3 MoE layers of 4 experts" in message
    shutil.rmtree(bare)
    assert "holds several runs (other/moe_spec_metrics.jsonl, run/moe_spec_metrics.jsonl)" in _refusal(capsys, tmp_path)
    assert "ends in .html" in _refusal(capsys, folder, "--out", tmp_path / "report.pdf")
    (folder / "traces" / "router_trace_rank0.jsonl").write_text("{")
    assert "router_trace_rank0.jsonl: no record" in _refusal(capsys, folder, "--out", tmp_path / "a.html")
    assert not list(tmp_path.glob("*.html"))


def test_lines_of_another_model_are_refused(folder):
    with (folder / "moe_spec_metrics.jsonl").open("a") as file:
        file.write(json.dumps(record(110, num_layers=2)) + "\n")
    with pytest.raises(RunError, match="moe_spec_metrics.jsonl:11 is of another model"):
        read_run(folder)


@pytest.mark.parametrize(
    "broken",
    [
        {"layers": 3},
        {"layers": [{"routing_entropy": 1.0}]},
        {"layers": [{"layer": 0, "routing_entropy": "high"}]},
        {"layers": [{"layer": 0, "mass_of_best": [0.5, "x"]}]},
        {"layers": [{"layer": 0, "load": [1]}, {"layer": 1, "load": [1, 2]}]},
        {"layers": [], "pairs": [{"layers": [0, 1], "conditional_entropy": 1.0}]},
    ],
)
def test_a_line_of_another_kind_is_named(tmp_path, broken):
    folder = write_run(tmp_path / "run", [{"iteration": 1}, {"iteration": 2, **broken}])
    with pytest.raises(RunError, match="moe_spec_metrics.jsonl:2 is not what --moe-spec-metrics-interval writes"):
        read_run(folder)


def test_a_trace_alone_has_a_report(folder):
    (folder / "moe_spec_metrics.jsonl").unlink()
    (folder / "log.jsonl").unlink()
    run = read_run(folder, folder / "traces")
    assert run.model == "3 MoE layers of 4 experts, 2 for each token"
    assert [section.title for section in sections(run, None)] == ["Balance", "Co-activation", "Pathways"]


def test_a_trace_of_another_model_is_refused(folder, tmp_path):
    for model, words in (((5, 4, 2), "5 MoE layers of 4 experts"), ((3, 6, 2), "3 MoE layers of 6 experts")):
        traces = tmp_path / f"traces of {model[1]}"
        write_trace(traces, random_trace(50, *model, seed=1))
        with pytest.raises(RunError, match=f"{traces} has {words}.*metrics of .* 3 MoE layers of 4.*--traces"):
            read_run(folder, traces)


def test_a_trace_that_is_being_written_is_read_and_noted(folder):
    file = folder / "traces" / "router_trace_rank0.jsonl"
    file.write_text(file.read_text()[:-20])
    run = read_run(folder, folder / "traces")
    assert 0 < len(run.trace.experts_TMK) < 200
    assert any("is no JSON and was left out" in notice for notice in run.notices)
    assert any("1 of 2 micro-batches are incomplete and were left out" in notice for notice in run.notices)


def test_the_remedy_for_a_trace_that_does_not_say_its_experts_works(folder, tmp_path, capsys):
    (folder / "traces" / "router_trace_model.json").unlink()
    out = tmp_path / "report.html"
    assert "Give --num-experts" in _refusal(capsys, folder, "--out", out)
    assert read_run(folder, folder / "traces", num_experts=4).trace.num_experts == 4
    assert "has 3 MoE layers of 6 experts" in _refusal(capsys, folder, "--out", out, "--num-experts", 6)


@pytest.mark.parametrize("library", ["matplotlib", "tensorboard"])
def test_a_library_that_is_missing_is_named(short, tmp_path, capsys, monkeypatch, library):
    (short / "events.out.tfevents.1").touch()
    monkeypatch.setitem(sys.modules, library, None)
    for module in [name for name in sys.modules if name.startswith("tensorboard.")]:
        monkeypatch.delitem(sys.modules, module)
    message = _refusal(capsys, short, "--out", tmp_path / "report.html")
    assert f"reports need {library}: install it" in message and ".[report]" in message


def test_the_overview_has_six_panels_with_the_loss_first(folder, monkeypatch):
    overview = next(sections(read_run(folder, folder / "traces"), None)).figures[0]
    axes = [axis for axis in overview.draw().axes if axis.get_title()]
    assert [axis.get_title() for axis in axes] == [
        *["training loss", "auxiliary losses, over their first value", "expert overlap, mean abs(cos)"],
        *["routing entropy of a token (nats)", "load of experts, over the mean", "mutual information, normalised"],
    ]
    figures.pyplot().close("all")


def test_layers_are_drawn_with_their_mean_and_the_baseline(folder, tmp_path):
    baseline = read_run(write_run(tmp_path / "baseline", [record(i, scale=2.0) for i in ITERATIONS]))
    run = read_run(folder)
    found = {figure.name: figure for section in sections(run, baseline) for figure in section.figures}
    (axis,) = found["routing_entropy"].draw().axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axis.get_lines()}
    assert list(lines) == ["layer 1", "layer 2", "layer 3", "all layers", "all, baseline"]
    assert lines["all layers"] == pytest.approx([3.0 - i / 100 for i in ITERATIONS])
    assert lines["all, baseline"] == pytest.approx([2 * (3.0 - i / 100) for i in ITERATIONS])
    figures.pyplot().close("all")


def test_the_load_is_that_of_the_last_measured_steps(folder):
    found = {figure.name: figure for section in sections(read_run(folder), None) for figure in section.figures}
    axis = found["load"].draw().axes[0]
    last = [[100 + expert * layer for expert in range(4)] for layer in range(3)]  # a tenth: iteration 100
    expected = [[value / (sum(row) / 4) for value in row] for row in last]
    assert axis.get_images()[0].get_array().tolist() == [pytest.approx(row) for row in expected]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["1", "2", "3"]
    figures.pyplot().close("all")


def test_nothing_is_replaced_without_being_told(short, tmp_path, capsys):
    out = tmp_path / "report.html"
    out.write_text("mine")
    assert "give --force" in _refusal(capsys, short, "--out", out)
    assert out.read_text() == "mine"
    assert main([str(short), "--out", str(out), "--force"]) == 0
    assert out.read_text().startswith("<!DOCTYPE html>")
    kept, stale = tmp_path / "report_figures" / "notes.txt", tmp_path / "report_figures" / "stale.png"
    kept.touch()
    stale.touch()
    assert main([str(short), "--out", str(out), "--force"]) == 0
    assert kept.exists() and not stale.exists()


def test_names_are_escaped(tmp_path):
    folder = write_run(tmp_path / "a<b>&'c", [])
    out = tmp_path / "report.html"
    assert main([str(folder), "--out", str(out)]) == 0
    assert "a&lt;b&gt;&amp;&#x27;c" in out.read_text() and "a<b>" not in out.read_text()


def test_many_layers_become_heat_maps_of_bounded_size(tmp_path):
    def few(one):
        kept = ("layer", "layer_index", "routing_entropy", "load")
        layers = [{name: row[name] for name in kept} for row in one["layers"]]
        return {"iteration": one["iteration"], "layers": layers}

    records = (few(record(i, num_layers=16)) for i in range(1, 600))
    folder = write_run(tmp_path / "run", records)
    out = tmp_path / "report.html"
    assert main([str(folder), "--out", str(out)]) == 0
    assert len(out.read_text()) < 2e6


def test_coactivation_by_chance_is_one():
    for counts in (torch.ones(4, 4), torch.full((7, 7), 3)):
        panel = lift(counts.long().fill_diagonal_(0), 0)
        drawn = figures.Figure("", "", [panel]).draw().axes[0].get_images()[0].get_array()
        assert drawn.mask.sum() == len(counts) and drawn.compressed() == pytest.approx(1.0)
    figures.pyplot().close("all")


def test_pairs_with_the_strongest_pathways_are_drawn():
    """Layer 3 repeats layer 2, so that pair must be among the four of eight, with its true counts."""
    trace = random_trace(3000, 9, 6, 2, seed=3)
    trace.experts_TMK[:, 3] = trace.experts_TMK[:, 2]
    found = {figure.name: figure for figure in _transitions(trace)}
    assert len(found) == 4 and "transitions_2_3" in found
    joint = [[0] * 6 for _ in range(6)]
    for here, there in trace.experts_TMK[:, 2:4].tolist():
        for i in here:
            for j in there:
                joint[i][j] += 1
    axis = found["transitions_2_3"].draw().axes[0]
    order = pytest.importorskip("scipy.optimize").linear_sum_assignment(joint, maximize=True)[1].tolist()
    drawn = axis.get_images()[0].get_array()
    for expert, row in enumerate(joint):
        assert drawn[expert].tolist() == pytest.approx([row[j] / sum(row) for j in order])
    assert [label.get_text() for label in axis.get_xticklabels()] == [str(j) for j in order]
    figures.pyplot().close("all")
