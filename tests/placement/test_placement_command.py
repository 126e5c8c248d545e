"""The command, from a folder of files to a file for an engine, and its errors."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from traces import random_trace, write_trace

from megatron_moe_spec.placement.command import main
from megatron_moe_spec.placement.formats import FORMATS
from megatron_moe_spec.placement.halves import halves
from megatron_moe_spec.placement.measures import measure
from megatron_moe_spec.placement.objectives import OBJECTIVES
from megatron_moe_spec.placement.placement import Cluster
from megatron_moe_spec.traces.schema import MODEL_FILE

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def trace():
    return random_trace(400, 3, 8, 2, seed=0, num_batches=4, sequences_per_batch=2, num_dense=1, hidden_size=512)


@pytest.fixture
def folder(trace, tmp_path):
    write_trace(tmp_path / "trace", trace, num_shards=2)
    return str(tmp_path / "trace")


def _refusal(capsys, *argv):
    assert main(list(map(str, argv))) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_is_written_is_what_was_judged(objective, trace, folder, tmp_path, capsys):
    out = tmp_path / "experts.json"
    argv = [folder, "--devices", "4", "--nodes", "2", "--redundant", "4", "--objective", objective]
    assert main([*argv, "--format", "sglang", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    fitted, judged = halves(trace)
    placement = OBJECTIVES[objective].place(fitted, Cluster(8, 4, 2, 4))
    written = json.loads(out.read_text())["physical_to_logical_map"]
    assert written[1:] == placement.logical_MS.tolist()
    measured = measure(placement, judged)
    row = next(line for line in printed.splitlines() if re.match(rf"{objective} +\d", line))
    expected = [measured.load, measured.batch_load, measured.devices, measured.nodes, measured.rows, measured.hops]
    expected[4] = expected[4] * 512 * 2 / 1024  # KiB of bf16
    assert row.replace("*", "").split()[1:] == [f"{value.mean():.4g}" for value in expected]
    for name in ("contiguous", "random", "EPLB"):
        assert re.search(rf"^{name} +\d", printed, re.MULTILINE)
    assert re.search(rf"^{objective} beats (contiguous|EPLB|neither)", printed, re.MULTILINE)
    assert f"Wrote {out}: sglang.launch_server --ep-size 4 --ep-num-redundant-experts 4" in printed


def test_without_a_file_the_judgement_alone_is_printed(folder, tmp_path, capsys):
    assert main([folder, "--devices", "2", "--prefetch", "3", "--cache-slots", "4"]) == 0
    printed = capsys.readouterr().out
    assert "3 predicted" in printed and "4 cached, LRU" in printed and "Wrote" not in printed
    assert [path.name for path in tmp_path.iterdir()] == ["trace"]


def test_it_says_to_how_many_tokens_it_was_fitted(folder, monkeypatch, capsys):
    few = replace(OBJECTIVES["fanout"], most_tokens=70)
    monkeypatch.setitem(OBJECTIVES, "fanout", few)
    assert main([folder, "--devices", "2", "--objective", "fanout"]) == 0
    assert "Fitted to 65 of the first 195 tokens, judged by 205 of the other 205." in capsys.readouterr().out


def test_one_layer_has_no_hops_and_no_next(tmp_path, capsys):
    write_trace(tmp_path / "trace", replace(random_trace(60, 1, 4, 2, seed=0), hidden_size=None))
    assert main([str(tmp_path / "trace"), "--devices", "2", "--objective", "fanout"]) == 0
    printed = capsys.readouterr().out
    assert "hops" not in printed and "predicted" not in printed and "rows sent" in printed


@pytest.mark.parametrize("name", [name for name, one in FORMATS.items() if not one.needs_checkpoint])
def test_files_are_replaced_with_force_alone(name, folder, tmp_path, capsys):
    out = tmp_path / f"experts{FORMATS[name].suffixes[0]}"
    out.write_text("precious")
    argv = [folder, "--devices", "2", "--format", name, "--out", out]
    assert f"--out {out} exists: name another file, or give --force" in _refusal(capsys, *argv)
    assert out.read_text() == "precious"
    assert main([*map(str, argv), "--force"]) == 0
    assert out.read_bytes() != b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, "trace"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--devices", "3"], "--devices 3 does not divide the 8 slots .*: use --redundant 1, or --devices 2 or 4"),
        (["--devices", "4", "--nodes", "3"], "--nodes 3 does not divide --devices 4: use --nodes 2 or 4"),
        (["--devices", "4", "--groups", "3"], "--groups 3 has to divide the 8 experts"),
        (["--devices", "4", "--nodes", "4", "--groups", "2"], "--nodes 4 has to divide it"),
        (["--devices", "4", "--prefetch", "9"], "--prefetch 9: there are 8 experts"),
        (["--devices", "4", "--cache-slots", "1"], "--cache-slots 1: from 2"),
        (["--devices", "4", "--num-experts", "16"], "--num-experts is 16, but .* says 8"),
        (
            ["--devices", "4", "--format", "trtllm", "--out", "a.json"],
            r"--format trtllm is a file whose name ends in .yaml or .yml",
        ),
        (["--devices", "4", "--format", "sglang", "--out", "nowhere/a.json"], "there is no folder nowhere"),
    ],
)
def test_bad_flags_are_refused_with_the_remedy(flags, message, folder, capsys):
    assert re.search(message, _refusal(capsys, folder, *flags))


def test_flags_that_need_each_other(folder, capsys):
    for flags in (["--format", "sglang"], ["--out", "experts.json"]):
        with pytest.raises(SystemExit):
            main([folder, "--devices", "2", *flags])
        assert "--format and --out need each other" in capsys.readouterr().err


def test_dense_layers_are_asked_for(folder, tmp_path, capsys):
    (tmp_path / "trace" / MODEL_FILE).unlink()
    argv = [folder, "--devices", "2", "--num-experts", "8", "--format", "sglang", "--out", tmp_path / "experts.json"]
    assert "--num-layers" in _refusal(capsys, *argv)
    assert main([*map(str, argv), "--num-layers", "6"]) == 0
    assert len(json.loads((tmp_path / "experts.json").read_text())["physical_to_logical_map"]) == 6


def test_without_scipy_it_says_what_to_install(folder, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("megatron_moe_spec.placement.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    assert "pip install scipy" in _refusal(capsys, folder, "--devices", "2")


def test_a_run_does_not_depend_on_the_state_of_random_numbers(folder, tmp_path):
    written = []
    for seed in range(2):
        torch.manual_seed(seed)
        out = tmp_path / f"{seed}.json"
        assert main([folder, "--devices", "2", "--format", "vllm-ascend", "--out", str(out)]) == 0
        written.append(out.read_text())
    assert written[0] == written[1]
