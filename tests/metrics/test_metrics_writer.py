"""What MetricsWriter writes, and where. Its file: strict JSON lines, checked before training; it ends no run."""

import errno
import json
import math
import os
import warnings
from pathlib import Path

import pytest

from megatron_moe_spec import MetricsWriter
from megatron_moe_spec.metrics.json_lines import JsonLines

REMEDY = "set --tensorboard-dir, or --save, to another folder, or --moe-spec-metrics-interval to 0"


def _lines(path: Path) -> list:
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_lines_are_strict_json(tmp_path):
    file = JsonLines(tmp_path / "metrics.jsonl")
    layers = [{"layer": 0, "routing_entropy": math.nan}, {"layer": 1, "routing_entropy": 1.5}]
    file.append({"iteration": 2, "coupling_loss": math.inf, "layers": layers, "pair": (0, -math.inf)})
    file.append({"iteration": 4})
    layers[0]["routing_entropy"] = None
    first = {"iteration": 2, "coupling_loss": None, "layers": layers, "pair": [0, None]}
    assert _lines(tmp_path / "metrics.jsonl") == [first, {"iteration": 4}]


@pytest.mark.parametrize("case", ["is a directory", "below a file", "not permitted"])
def test_check_says_what_to_change(megatron, tmp_path, monkeypatch, case):
    path = tmp_path / "logs" / "metrics.jsonl"
    if case == "is a directory":
        path.mkdir(parents=True)
    elif case == "below a file":
        path.parent.write_text("")
    else:
        # The tests may run as root, whom permissions do not bind.
        def refuse(*args, **kwargs):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OSError) as refused:
        MetricsWriter(path)
    assert str(refused.value).startswith(f"{path} cannot be written (") and REMEDY in str(refused.value)


def test_check_makes_the_folder_and_keeps_the_lines(megatron, tmp_path):
    path = tmp_path / "new" / "logs" / "metrics.jsonl"
    MetricsWriter(path).write(1, {"diagnostics": {"layers": [], "pairs": []}})
    MetricsWriter(path)
    assert _lines(path) == [{"iteration": 1, "layers": [], "pairs": []}]


def test_full_disk_warns_once_and_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    file = JsonLines(path)
    file.append({"iteration": 1})
    open_file = Path.open

    class Full:
        """A file on a disk with room for a few bytes."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.file.close()

        def write(self, text):
            self.file.write(text[:5])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "open", lambda self, *args: Full(open_file(self, *args)))
    with pytest.warns(UserWarning, match="metrics.jsonl cannot be written .No space left on device.") as warned:
        file.append({"iteration": 2})
        file.append({"iteration": 3})
    assert len(warned) == 1
    monkeypatch.setattr(Path, "open", open_file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file.append({"iteration": 4})
    assert _lines(path) == [{"iteration": 1}, {"iteration": 4}]


class Logger:
    """A SummaryWriter, and a run of W&B: what they are given, by iteration."""

    def __init__(self):
        self.scalars, self.rows = {}, {}

    def add_scalar(self, tag, value, iteration):
        assert tag not in self.scalars.setdefault(iteration, {})
        self.scalars[iteration][tag] = value

    def log(self, values, iteration):
        assert iteration not in self.rows
        self.rows[iteration] = values


def _diagnostics(num_layers):
    layers = [
        {"layer": i, "layer_index": 3 + i, "load": [1, 2], "routing_entropy": 1.0 + i, "max_violation": i / 2}
        for i in range(num_layers)
    ]
    layers[0]["topk_mass"] = None
    pairs = [{"layers": [i, i + 1], "conditional_entropy": 2.0} for i in range(num_layers - 1)]
    return {"layers": layers, "pairs": pairs}


def test_keys_for_wandb_do_not_grow_with_the_model():
    brief, full = Logger(), Logger()
    MetricsWriter(wandb=brief).write(1, {"diagnostics": _diagnostics(3)})
    MetricsWriter(wandb=brief).write(2, {"diagnostics": _diagnostics(60)})
    assert brief.rows[1] == {
        "moe_spec/routing_entropy": 2.0,
        "moe_spec/max_violation": 0.5,
        "moe_spec/max_violation_largest": 1.0,
        "moe_spec/conditional_entropy": 2.0,
    }
    assert brief.rows[1].keys() == brief.rows[2].keys()
    MetricsWriter(tensorboard=full, wandb=full, wandb_metrics="full").write(1, {"diagnostics": _diagnostics(3)})
    assert full.rows == full.scalars
    assert full.rows[1]["moe_spec/routing_entropy/layer_2"] == 3.0
    assert full.rows[1]["moe_spec/conditional_entropy/layers_1_2"] == 2.0
    assert len(full.rows[1]) == 2 * 3 + 2


def test_each_logger_gets_its_share(tmp_path):
    """Loggers get the losses of every step, unless the program logs them itself; the file, those of measured steps."""
    file, logger, other = tmp_path / "metrics.jsonl", Logger(), Logger()
    writers = [MetricsWriter(file, logger, logger), MetricsWriter(tensorboard=other, wandb=other, log_losses=False)]
    losses, of_layers = {"coupling_loss": 0.5, "erc_loss": math.nan}, {"coupling_loss": {3: 0.25}}
    for writer in writers:
        writer.write(1, {"coupling_loss": 1.0})
        writer.write(2, {**losses, "diagnostics": _diagnostics(2)}, of_layers)
    assert logger.scalars[1] == logger.rows[1] == {"coupling_loss": 1.0} and not {1} & {*other.scalars, *other.rows}
    layer = {"moe/coupling_loss_layer_3": 0.25}
    assert logger.rows[2] == {**losses, **other.rows[2]} and layer.items() <= other.rows[2].items()
    assert logger.scalars[2] == {**losses, **other.scalars[2]} and layer.items() <= other.scalars[2].items()
    assert other.scalars[2]["moe_spec/routing_entropy/layer_1"] == 2.0
    assert _lines(file) == [{"iteration": 2, "coupling_loss": 0.5, "erc_loss": None, **_diagnostics(2)}]


def test_writers_of_several_ranks(megatron, tmp_path, monkeypatch):
    """Rank 0 alone opens the file; what it meets stops all."""
    import torch.distributed as dist

    file = tmp_path / "metrics.jsonl"
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda problem: None)
    MetricsWriter(file).write(1, {"diagnostics": _diagnostics(2)})
    assert not file.exists()
    monkeypatch.setattr(dist, "broadcast_object_list", lambda problem: problem.__setitem__(0, "No space"))
    with pytest.raises(OSError, match="No space"):
        MetricsWriter(file)
