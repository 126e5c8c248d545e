"""The file of metrics: strict JSON lines, checked before training, and no reason to end a run."""

import errno
import json
import math
import os
import warnings
from pathlib import Path

import pytest

from megatron_moe_spec.integration.training import MetricsFile, _brief, _scalars

REMEDY = "set --tensorboard-dir, or --save, to another folder, or --moe-spec-metrics-interval to 0"


def _lines(path: Path) -> list:
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_lines_are_strict_json(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
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
        MetricsFile(path).check()
    assert str(refused.value).startswith(f"{path} cannot be written (") and REMEDY in str(refused.value)


def test_check_makes_the_folder_and_keeps_the_lines(megatron, tmp_path):
    path = tmp_path / "new" / "logs" / "metrics.jsonl"
    file = MetricsFile(path)
    file.check()
    file.append({"iteration": 1})
    MetricsFile(path).check()
    assert _lines(path) == [{"iteration": 1}]


def test_full_disk_warns_once_and_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
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


def test_keys_for_wandb_do_not_grow_with_the_model():
    def diagnostics(num_layers):
        layers = [
            {"layer": i, "layer_index": 3 + i, "load": [1, 2], "routing_entropy": 1.0 + i, "max_violation": i / 2}
            for i in range(num_layers)
        ]
        layers[0]["topk_mass"] = None
        pairs = [{"layers": [i, i + 1], "conditional_entropy": 2.0} for i in range(num_layers - 1)]
        return {"layers": layers, "pairs": pairs}

    assert _brief(diagnostics(3)) == {
        "moe_spec/routing_entropy": 2.0,
        "moe_spec/max_violation": 0.5,
        "moe_spec/max_violation_largest": 1.0,
        "moe_spec/conditional_entropy": 2.0,
    }
    assert _brief(diagnostics(3)).keys() == _brief(diagnostics(60)).keys()
    full = _scalars(diagnostics(3))
    assert full["moe_spec/routing_entropy/layer_2"] == 3.0 and full["moe_spec/conditional_entropy/layers_1_2"] == 2.0
    assert len(full) == 2 * 3 + 2
