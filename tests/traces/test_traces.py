"""Routing traces are read as they were written, and what cannot be read is refused by file, line and remedy."""

import importlib.util
import json
import pickle
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from traces import random_trace, write_trace

from megatron_moe_spec.traces.files import TraceError, read_trace
from megatron_moe_spec.traces.schema import DROPPED, MODEL_FILE, PADDING, trace_file


def _assert_equal(trace, expected):
    for field in fields(expected):
        here, there = getattr(trace, field.name), getattr(expected, field.name)
        if isinstance(there, torch.Tensor):
            assert here.dtype == there.dtype and torch.equal(here, there), field.name
        else:
            assert here == there, field.name


def _record(**changes):
    """A record of 2 tokens, 2 of 4 experts."""
    record = {"step": 0, "stage": "pre_dispatch", "block": "decoder", "layer": 0, "rank": 0, "num_tokens": 2, "topk": 2}
    return {**record, "top_indices": [[0, 1], [2, 3]], "micro_batch": 0, "num_sequences": 1, **changes}


def _write(folder, *records, rank=0, num_experts=4, num_layers=2):
    """Lines of a rank's file: dictionaries, or text as it is."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / trace_file(rank)).write_text("".join(f"{line}\n" for line in lines))
    model = {"num_layers": num_layers, "num_experts": num_experts, "topk": 2, "hidden_size": None}
    (folder / MODEL_FILE).write_text(json.dumps(model))
    return folder


def _refusal(path, **arguments):
    with pytest.raises(TraceError) as error:
        read_trace(path, **arguments)
    return str(error.value)


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("stages", [None, [(2, 3), (4, 5)], [(2, 5), (3,), (4,)]])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("dropped", [0.0, 0.3])
def test_a_trace_is_read_as_it_was_written(tmp_path, num_shards, stages, micro_batches, dropped):
    trace = random_trace(200, 4, 8, 3, 1, num_batches=4, sequences_per_batch=6, dropped=dropped, num_dense=2)
    num_padding = write_trace(tmp_path, trace, num_shards, stages, micro_batches, interval=50)
    assert num_padding > 0 and bool((trace.experts_TMK == DROPPED).any()) == (dropped > 0)
    _assert_equal(read_trace(tmp_path), replace(trace, num_padding=num_padding))


def test_ranks_of_a_token_meet_in_every_order_of_ranks(tmp_path):
    trace = random_trace(60, 4, 8, 2, 0, sequences_per_batch=6)
    write_trace(tmp_path / "stages_last", trace, 3, [(0, 1), (2, 3)])
    folder = tmp_path / "stages_first"
    folder.mkdir()
    for rank in range(6):
        stage, shard = divmod(rank, 3)
        new = shard * 2 + stage
        text = (tmp_path / "stages_last" / trace_file(rank)).read_text()
        (folder / trace_file(new)).write_text(text.replace(f'"rank": {rank}', f'"rank": {new}'))
    found = read_trace(folder, num_experts=8)
    assert torch.equal(found.experts_TMK, read_trace(tmp_path / "stages_last").experts_TMK)


def test_more_than_ten_ranks_stand_in_the_order_of_their_numbers(tmp_path):
    trace = random_trace(100, 2, 8, 2, 0, sequences_per_batch=12)
    num_padding = write_trace(tmp_path, trace, num_shards=12)
    _assert_equal(read_trace(tmp_path), replace(trace, num_padding=num_padding))


def test_rows_are_positions_by_sequences_and_padding_and_drops_are_what_they_are(tmp_path):
    rows = [[0, 1], [2, 3], [3, -1], [-2, -2], [-1, -1], [-2, -2]]  # 3 positions of 2 sequences
    next_rows = [[1, 2], [0, 3], [-1, -1], [-2, -2], [1, 2], [-2, -2]]
    layers = [
        _record(layer=layer, num_tokens=6, num_sequences=2, top_indices=top_indices)
        for layer, top_indices in ((1, next_rows), (0, rows))
    ]
    trace = read_trace(_write(tmp_path, *layers))
    assert trace.experts_TMK.tolist() == [
        [[0, 1], [1, 2]],
        [[3, -1], [-1, -1]],
        [[-1, -1], [1, 2]],
        [[2, 3], [0, 3]],
    ]
    assert trace.sequence_T.tolist() == [0, 0, 0, 1]
    assert trace.batch_T.tolist() == [0, 0, 0, 0]
    assert trace.num_padding == 2 and trace.layers == (0, 1) and trace.num_layers == 2 and trace.hidden_size is None


def test_rows_are_sorted_with_drops_last(tmp_path):
    _write(tmp_path, _record(num_tokens=3, top_indices=[[3, 1], [-1, 2], [-2, -2]]))
    assert read_trace(tmp_path).experts_TMK[:, 0].tolist() == [[1, 3], [2, -1]]
    _write(tmp_path, _record(top_indices=[[-1, 2], [0, 1]]))
    assert read_trace(tmp_path).experts_TMK[:, 0].tolist() == [[2, -1], [0, 1]]


def test_without_sequences_a_micro_batch_of_a_rank_is_one(tmp_path):
    records = [_record(micro_batch=number) for number in range(2)]
    for record in records:
        del record["num_sequences"]
    for rank in range(2):
        _write(tmp_path, *({**record, "rank": rank} for record in records), rank=rank)
    trace = read_trace(tmp_path)
    assert trace.sequence_T.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert trace.batch_T.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_a_micro_batch_without_tokens(tmp_path):
    empty = [_record(layer=layer, num_tokens=0, top_indices=[]) for layer in range(2)]
    _write(tmp_path, *empty, *(_record(layer=layer, step=1) for layer in range(2)))
    assert read_trace(tmp_path).experts_TMK.shape == (2, 2, 2)


def test_one_file_alone(tmp_path):
    trace = random_trace(40, 4, 8, 2, 0, sequences_per_batch=2)
    write_trace(tmp_path, trace, stages=[(0, 1), (2, 3)])
    found = read_trace(tmp_path / trace_file(1))
    assert found.layers == (2, 3) and found.num_experts == 8
    assert torch.equal(found.experts_TMK, trace.experts_TMK[:, 2:])


def test_a_stage_without_moe_layers_is_no_part(tmp_path):
    trace = random_trace(40, 2, 8, 2, 0, num_dense=1)
    write_trace(tmp_path, trace, stages=[(), (1, 2)])
    _assert_equal(read_trace(tmp_path), trace)


def test_arguments_serve_where_there_is_no_model_file(tmp_path):
    _write(tmp_path, _record())
    (tmp_path / MODEL_FILE).unlink()
    message = _refusal(tmp_path)
    assert "--num-experts" in message and "largest number of an expert in the trace is 3" in message
    trace = read_trace(tmp_path, num_experts=8, num_layers=5)
    assert trace.num_experts == 8 and trace.num_layers == 5
    assert read_trace(tmp_path, num_experts=8).num_layers is None


def test_other_blocks_are_left_out_and_named(tmp_path):
    _write(tmp_path, _record(), _record(block="mtp", mtp_idx=0, top_indices="anything"), _record(layer=1))
    trace = read_trace(tmp_path)
    assert trace.layers == (0, 1) and trace.experts_TMK.shape == (2, 2, 2)
    assert [("1 records of the block mtp" in notice) for notice in trace.notices] == [True]


# Megatron's own records


def _megatrons_tracers():
    """The module of Megatron's tracer, which needs torch alone: the rest of Megatron takes seconds to import."""
    megatron = importlib.util.find_spec("megatron")
    folders = [] if megatron is None else megatron.submodule_search_locations
    files = [Path(folder) / "core/transformer/moe/router_trace.py" for folder in folders]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        pytest.skip("megatron-core >= 0.19 is not installed")
    spec = importlib.util.spec_from_file_location("router_trace", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_megatrons_own_tracer(tmp_path):
    tracers = _megatrons_tracers()
    experts_BTMK = torch.rand(4, 10, 3, 8, generator=torch.Generator().manual_seed(0)).topk(2).indices
    tracer = tracers.RouterTracer(str(tmp_path), max_steps=2, rank=0, training_mode=True)
    for step, micro_batches in ((10, experts_BTMK[:2]), (20, experts_BTMK[2:])):
        for experts_TMK in micro_batches:
            tracer.record_indices(experts_TMK, layer_ids=[1, 2, 4])
            tracer.record_indices(experts_TMK[:, :1], layer_ids=[0], block="mtp", mtp_idx=0)
        tracer.advance_step(step)
    trace = read_trace(tmp_path, num_experts=8)
    assert torch.equal(trace.experts_TMK, experts_BTMK.flatten(0, 1).sort(dim=2).values.short())
    assert trace.layers == (1, 2, 4)
    assert trace.batch_T.tolist() == trace.sequence_T.tolist() == [number for number in range(4) for _ in range(10)]
    assert any("block mtp" in notice for notice in trace.notices)
    assert any("Megatron itself" in notice for notice in trace.notices)


def _megatrons(**changes):
    record = _record(**changes)
    return {key: record[key] for key in record if key not in ("micro_batch", "num_sequences")}


def test_a_record_that_megatron_did_not_number_takes_its_whole_step_with_it(tmp_path):
    complete = [_megatrons(step=step, layer=layer) for step in range(2) for _ in range(3) for layer in range(2)]
    for lost in (6, 8):  # micro-batches are numbered by their order, so the first missing one moves the others
        _write(tmp_path, *complete[:lost], *complete[lost + 1 :])
        assert "3 of 6 micro-batches are incomplete" in _refusal(tmp_path)
        assert len(read_trace(tmp_path, drop_incomplete=True).experts_TMK) == 6


# Restarts


def _steps(*steps, rank=0, expert=0, layers=2):
    return [
        _record(step=step, layer=layer, rank=rank, top_indices=[[expert, 3]] * 2)
        for step in steps
        for layer in range(layers)
    ]


def test_after_a_restart_the_later_run_counts(tmp_path):
    for rank in range(2):
        _write(tmp_path, *_steps(0, 10, 20, 30, rank=rank), *_steps(20, rank=rank, expert=1), rank=rank)
    trace = read_trace(tmp_path)
    assert trace.experts_TMK[:, 0, 0].tolist() == [0] * 8 + [1] * 4
    assert [("steps 20 to 30 before a restart" in notice) for notice in trace.notices] == [True]


def test_a_step_that_comes_again_at_once_is_a_restart(tmp_path):
    _write(tmp_path, *_steps(0, 10), *_steps(10, 20, expert=1), *_steps(20, expert=2))
    trace = read_trace(tmp_path)
    assert trace.experts_TMK[:, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert [("steps 10 to 20 before a restart" in notice) for notice in trace.notices] == [True]


def test_a_restart_in_the_middle_of_a_step(tmp_path):
    _write(tmp_path, *_steps(0, 10)[:-1], *_steps(10, expert=1))
    assert read_trace(tmp_path).experts_TMK[:, 1, 0].tolist() == [0, 0, 1, 1]


def test_a_step_of_which_ranks_have_different_runs_is_incomplete(tmp_path):
    _write(tmp_path, *_steps(0, 10), *_steps(10, expert=1), rank=0)
    _write(tmp_path, *_steps(0, 10, rank=1), rank=1)
    message = _refusal(tmp_path)
    assert "Step 10 ran again after a restart in the files of some ranks" in message and "--drop-incomplete" in message
    trace = read_trace(tmp_path, drop_incomplete=True)
    assert trace.experts_TMK[:, 0, 0].tolist() == [0] * 4
    assert any("1 of 2 micro-batches are incomplete" in notice for notice in trace.notices)


# Incomplete traces


def test_a_missing_layer_is_named_and_its_micro_batch_can_be_left_out(tmp_path):
    trace = random_trace(90, 3, 8, 2, 0, num_batches=3, sequences_per_batch=2)
    write_trace(tmp_path, trace, num_shards=2, stages=[(0,), (1, 2)], micro_batches=3)
    file = tmp_path / trace_file(3)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:3] + lines[4:]))  # the second layer of the stage, in the second micro-batch
    message = _refusal(tmp_path)
    assert f"{file} has no layer 2 of step 0, micro-batch 1. 1 of 3 micro-batches" in message
    assert "--drop-incomplete" in message
    found = read_trace(tmp_path, drop_incomplete=True)
    assert torch.equal(found.experts_TMK, trace.experts_TMK[trace.batch_T != 1])
    assert found.batch_T.unique().tolist() == [0, 1] and found.sequence_T.unique().tolist() == [0, 1, 2, 3]
    assert any("1 of 3 micro-batches are incomplete and were left out" in notice for notice in found.notices)


def test_a_line_that_is_cut_off_can_be_left_out(tmp_path):
    _write(tmp_path, *_steps(0, 1), *_steps(2)[:1], json.dumps(_record(step=2, layer=1))[:50])
    message = _refusal(tmp_path)
    assert (
        f"{trace_file(0)}:6 is no JSON" in message and "Delete the line" in message and "--drop-incomplete" in message
    )
    trace = read_trace(tmp_path, drop_incomplete=True)
    assert trace.batch_T.tolist() == [0, 0, 1, 1]
    assert any(f"{trace_file(0)}:6 is no JSON and was left out" in notice for notice in trace.notices)


def test_a_rank_that_lacks_steps(tmp_path):
    _write(tmp_path, *_steps(0, 10, 20), rank=0)
    _write(tmp_path, *_steps(0, 20, rank=1), rank=1)
    message = _refusal(tmp_path)
    assert f"{tmp_path / trace_file(1)} has no layer 0, 1 of step 10, micro-batch 0" in message
    assert "several runs" in message


def test_nothing_complete_is_an_error(tmp_path):
    _write(tmp_path, *_steps(0)[:1], *_steps(1)[1:])
    assert "2 of 2 micro-batches are incomplete" in _refusal(tmp_path, drop_incomplete=True)


# Other refusals


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_tokens": 3}, "num_tokens is 3, but top_indices has 2 rows"),
        ({"top_indices": [[0, 1], [2, 3, 1]]}, "topk is 2, but a row of top_indices has 3 numbers"),
        ({"top_indices": [[0, 1], [2, 4]]}, "expert 4, but the 4 experts of a layer are numbered from 0"),
        ({"top_indices": [[0, 1], [2, 70000]]}, "a number beyond 32767"),
        ({"top_indices": [[0, 1], [2, -3]]}, "-3 is no number of an expert"),
        ({"top_indices": [[0, 1], [2, 2]]}, "expert 2 twice"),
        ({"top_indices": [[0, 1], [2, PADDING]]}, "-2 (padding); it must be all of the row"),
        ({"top_indices": [[0, 1], [2, 1.5]]}, "top_indices must be a list"),
        ({"top_indices": [0, 1, 2, 3]}, "top_indices must be a list"),
        ({"top_indices": None}, "top_indices must be a list"),
        ({"step": "0"}, "step is '0'"),
        ({"step": None}, "step is None"),
        ({"layer": -1}, "layer is -1"),
        ({"layer": 2}, "layer 2, but the model's 2 layers are numbered from 0"),
        ({"micro_batch": 0.5}, "micro_batch is 0.5"),
        ({"num_sequences": 0}, "num_sequences is 0"),
        ({"rank": 1}, "rank 1, but rank 0 in"),
        ({"topk": 1, "top_indices": [[0], [1]]}, "topk is 1, but 2 in"),
        ({"block": 3}, "names no block"),
    ],
)
def test_what_is_no_record_of_this_trace_is_refused_by_its_line(tmp_path, changes, message):
    found = _refusal(_write(tmp_path, _record(), _record(**{"layer": 1, **changes})), drop_incomplete=True)
    assert found.startswith(f"{tmp_path / trace_file(0)}:2") and message in found, found


def test_a_missing_key_and_other_json_are_refused_by_their_line(tmp_path):
    record = _record(layer=1)
    del record["topk"]
    assert f"{trace_file(0)}:2: topk is missing" in _refusal(_write(tmp_path, _record(), record))
    assert f"{trace_file(0)}:2 is no record of a routing trace" in _refusal(_write(tmp_path, _record(), "[1]"))
    assert "only one of them has a micro_batch" in _refusal(_write(tmp_path, _record(), _megatrons(layer=1)))


def test_layers_of_a_micro_batch_that_disagree_are_refused_by_both_lines(tmp_path):
    lines = (f"{trace_file(0)}:1", f"{trace_file(0)}:2")
    for changes, message in (
        ({"num_tokens": 1, "top_indices": [[0, 1]]}, "1 tokens in 1 sequences, but 2 in 1"),
        ({"num_sequences": 2}, "2 tokens in 2 sequences, but 2 in 1"),
        ({"top_indices": [[0, 1], [PADDING] * 2]}, "different tokens are padding"),
    ):
        found = _refusal(_write(tmp_path, _record(), _record(layer=1, **changes)))
        assert message in found and all(line in found for line in lines), found
    found = _refusal(_write(tmp_path, _record(num_sequences=3)))
    assert f"{lines[0]}: 2 tokens cannot be 3 sequences" in found


def test_files_of_several_runs_are_refused(tmp_path):
    def both(folder, first, second):
        (tmp_path / folder).mkdir()
        _write(tmp_path / folder, *first, rank=0)
        return _refusal(_write(tmp_path / folder, *second, rank=1))

    rank_1 = [{**record, "rank": 1} for record in _steps(0)]
    assert "of the same rank" in both("rank", _steps(0), _steps(0))
    assert "some layers in common, but not all" in both("layers", _steps(0), rank_1[1:])
    assert "only one numbers micro-batches" in both(
        "numbers", _steps(0), [_megatrons(rank=1), _megatrons(rank=1, layer=1)]
    )
    other = [{**record, "topk": 1, "top_indices": [[0], [1]]} for record in rank_1]
    assert f"{trace_file(1)}:1: topk is 1, but 2 in" in both("topk", _steps(0), other)
    _write(tmp_path / "rank", *_steps(0, rank=1)[:1], rank=1)
    _write(tmp_path / "rank", *_steps(0, rank=2)[:1], rank=2)
    _write(tmp_path / "rank", *_steps(0)[1:], rank=0)
    assert "1 ranks have the layers of" in _refusal(tmp_path / "rank")


def test_another_model_is_refused(tmp_path):
    _write(tmp_path, _record())
    message = _refusal(tmp_path, num_experts=8)
    assert "--num-experts is 8" in message and f"{tmp_path / MODEL_FILE} says 4" in message
    assert "--num-layers is 3" in _refusal(tmp_path, num_layers=3)
    model = json.loads((tmp_path / MODEL_FILE).read_text())
    (tmp_path / MODEL_FILE).write_text(json.dumps({**model, "topk": 4}))
    assert "topk is 2, but 4 in" in _refusal(tmp_path)
    (tmp_path / MODEL_FILE).write_text(json.dumps({**model, "num_experts": "4"}))
    assert "num_experts is '4'" in _refusal(tmp_path)
    (tmp_path / MODEL_FILE).write_text("{")
    assert f"{tmp_path / MODEL_FILE} is no JSON" in _refusal(tmp_path, num_experts=4)


def test_paths_that_are_no_trace_are_refused(tmp_path):
    assert "does not exist" in _refusal(tmp_path / "nothing")
    assert "neither" in _refusal(tmp_path)
    _write(tmp_path)
    assert "no record of the decoder's MoE layers" in _refusal(tmp_path)
    (tmp_path / "expert_distribution_recorder_1.5_0.pt").touch()
    assert "both" in _refusal(tmp_path)


# SGLang


class _Recorder:
    """Writes what SGLang 0.5.23's recorder writes: ``_DetailSinglePassGatherer`` and ``_DetailAccumulator.dump``."""

    def __init__(self, logical_LP, rank=0):
        self.logical_LP, self.rank, self.records = logical_LP, rank, []

    def forward(self, number, physical_LTK, positions, extend_seq_lens=None):
        num_layers, num_tokens, top_k = physical_LTK.shape
        topk_ids_of_layer = torch.full((num_layers, num_tokens, 8), -1, dtype=torch.int32)
        topk_ids_of_layer[:, :, :top_k] = physical_LTK
        record = {
            "forward_pass_id": number,
            "rank": self.rank,
            "gatherer_key": "primary",
            "input_ids": [100 * self.rank + position for position in positions],
            "positions": positions,
            "extend_seq_lens": extend_seq_lens,
            "forward_mode": 2 if extend_seq_lens is None else 1,
            "topk_ids_of_layer": topk_ids_of_layer,
            "misc_objects": [],
            "global_physical_count": torch.zeros(self.logical_LP.shape, dtype=torch.int32),
        }
        self.records.append(record)

    def dump(self, folder, time):
        path = folder / f"expert_distribution_recorder_{time}_{self.rank}.pt"
        torch.save({"records": self.records, "last_physical_to_logical_map": self.logical_LP}, path)
        self.records = []
        return path


def _physical(num_tokens, seed, num_layers=3, num_physical=6, top_k=2):
    """Random physical experts, of which 4 and 5 are copies of 0 and 1; the first layer is dense."""
    generator = torch.Generator().manual_seed(seed)
    scores_LTP = torch.rand(num_layers, num_tokens, 4, generator=generator)
    logical_LTK = scores_LTP.topk(top_k).indices
    is_copy_LTK = (logical_LTK < 2) & (torch.rand(logical_LTK.shape, generator=generator) < 0.5)
    physical_LTK = torch.where(is_copy_LTK, logical_LTK + 4, logical_LTK)
    physical_LTK[0] = -1
    return physical_LTK


LOGICAL = torch.tensor([0, 1, 2, 3, 0, 1]).repeat(3, 1)


def _rows(physical_LTK):
    """[T, M, K] by loops."""
    num_layers, num_tokens, _ = physical_LTK.shape
    return [
        [sorted(int(LOGICAL[layer, expert]) for expert in physical_LTK[layer, token]) for layer in range(1, num_layers)]
        for token in range(num_tokens)
    ]


def test_a_recording_of_sglang(tmp_path):
    recorder = _Recorder(LOGICAL)
    prefill, decode = _physical(5, seed=0), _physical(2, seed=1)
    recorder.forward(7, prefill, [0, 1, 2, 0, 1], extend_seq_lens=[3, 2])
    recorder.forward(8, _physical(0, seed=2), [])
    recorder.forward(9, decode, [3, 2])
    path = recorder.dump(tmp_path, 1700000000.5)
    for found in (read_trace(path), read_trace(tmp_path, num_experts=4, num_layers=3)):
        assert found.experts_TMK.tolist() == _rows(prefill) + _rows(decode)
        assert found.experts_TMK.dtype == torch.int16
        assert found.layers == (1, 2) and found.num_experts == 4 and found.num_layers == 3
        assert found.batch_T.tolist() == [0, 0, 0, 0, 0, 1, 1]
        assert found.sequence_T.tolist() == [0, 0, 0, 1, 1, 2, 3]
        assert found.batch_T.dtype == found.sequence_T.dtype == torch.int32
        assert found.num_padding == 0 and found.notices == ()


def test_a_request_alone_is_one_sequence_over_forward_passes(tmp_path):
    recorder = _Recorder(LOGICAL)
    recorder.forward(0, _physical(3, seed=0), [0, 1, 2], extend_seq_lens=[3])
    recorder.forward(1, _physical(1, seed=1), [3])
    recorder.forward(2, _physical(1, seed=2), [4])
    recorder.forward(3, _physical(2, seed=3), [0, 1], extend_seq_lens=[2])
    trace = read_trace(recorder.dump(tmp_path, 1))
    assert trace.sequence_T.tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert trace.batch_T.tolist() == [0, 0, 0, 1, 2, 3, 3]


def test_ranks_of_sglang_and_recordings_one_after_the_other(tmp_path):
    """Data-parallel attention: each rank has tokens of its own. Names sort otherwise than times do."""
    expected = []
    recorders = [_Recorder(LOGICAL, rank) for rank in range(2)]
    for recording, time in enumerate((999.9, 1000.1)):
        for number in range(2):
            for recorder in recorders:
                physical_LTK = _physical(2, seed=len(expected))
                recorder.forward(number, physical_LTK, [recording, 5], extend_seq_lens=[1, 1])
                expected += _rows(physical_LTK)
        for recorder in recorders:
            recorder.dump(tmp_path, time)
    trace = read_trace(tmp_path)
    assert trace.experts_TMK.tolist() == expected
    assert trace.batch_T.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert trace.sequence_T.tolist() == list(range(16))


def test_requests_on_different_ranks_are_different_sequences(tmp_path):
    for rank in range(2):
        recorder = _Recorder(LOGICAL, rank)
        recorder.forward(0, _physical(1, seed=rank), [3 + rank])
        recorder.dump(tmp_path, 1)
    assert read_trace(tmp_path).sequence_T.tolist() == [0, 1]


def test_ranks_of_sglang_with_the_same_tokens_count_once(tmp_path):
    recorders = [_Recorder(LOGICAL, rank=rank) for rank in range(2)]
    for recorder in recorders:
        recorder.forward(0, _physical(3, seed=0), [0, 1, 2], extend_seq_lens=[3])
        recorder.records[0]["input_ids"] = [7, 8, 9]
        recorder.dump(tmp_path, 1)
    trace = read_trace(tmp_path)
    assert trace.experts_TMK.tolist() == _rows(_physical(3, seed=0))
    assert any("Rank 1 has the same tokens as rank 0" in notice for notice in trace.notices)


def test_tokens_that_sglang_sent_nowhere_are_padding(tmp_path):
    recorder = _Recorder(LOGICAL)
    physical_LTK = _physical(3, seed=0)
    physical_LTK[:, 1] = -1
    physical_LTK[1, 2, 0] = -1
    recorder.forward(0, physical_LTK, [0, 1, 2], extend_seq_lens=[3])
    trace = read_trace(recorder.dump(tmp_path, 1))
    assert trace.num_padding == 1 and len(trace.experts_TMK) == len(trace.batch_T) == len(trace.sequence_T) == 2
    assert trace.experts_TMK[1, 0].tolist() == [int(LOGICAL[1, physical_LTK[1, 2, 1]]), DROPPED]


def test_a_forward_pass_that_lacks_layers_can_be_left_out(tmp_path):
    recorder = _Recorder(LOGICAL)
    lacking = _physical(2, seed=1)
    lacking[2] = -1
    recorder.forward(0, _physical(2, seed=0), [0, 1], extend_seq_lens=[2])
    recorder.forward(1, lacking, [0, 1], extend_seq_lens=[2])
    path = recorder.dump(tmp_path, 1)
    message = _refusal(path)
    assert f"{path}, forward pass 1 has no experts of layers 2" in message and "--drop-incomplete" in message
    trace = read_trace(path, drop_incomplete=True)
    assert trace.experts_TMK.tolist() == _rows(_physical(2, seed=0))
    assert any("1 of 2 forward passes are incomplete and were left out" in notice for notice in trace.notices)


class _Object:
    def __reduce__(self):
        return (open, ("/nowhere", "w"))


def test_what_is_no_recording_per_token_is_refused(tmp_path):
    path = tmp_path / "expert_distribution_recorder_1.5_0.pt"

    def refused(content):
        torch.save(content, path)
        return _refusal(path)

    recorder = _Recorder(LOGICAL)
    recorder.forward(0, _physical(2, seed=0), [0, 1], extend_seq_lens=[2])
    content = {"records": recorder.records, "last_physical_to_logical_map": LOGICAL}
    record = recorder.records[0]
    per_pass = {key: record[key] for key in ("forward_pass_id", "rank", "gatherer_key", "global_physical_count")}
    mode = "--expert-distribution-recorder-mode per_token"
    found = refused({"rank": 0, "logical_count": torch.zeros(1, 3, 4), "average_utilization_rate_over_window": None})
    assert "mode stat" in found and mode in found
    found = refused({**content, "records": [per_pass]})
    assert "mode per_pass" in found and mode in found
    assert "no recording" in refused({"state": torch.zeros(2)}) and "no recording" in refused([1])
    assert "no positions" in refused({**content, "records": [{k: record[k] for k in record if k != "positions"}]})
    assert "no token" in refused({**content, "records": []})
    assert "3 layers and 2 tokens, but" in refused({**content, "records": [{**record, "input_ids": [1]}]})
    nothing = {**record, "topk_ids_of_layer": torch.full((3, 2, 8), -1, dtype=torch.int32)}
    assert "no experts were recorded" in refused({**content, "records": [nothing]})
    assert "--disable-shared-experts-fusion" in refused({**content, "last_physical_to_logical_map": LOGICAL[:, :2]})
    assert "other than tensors" in refused({**content, "records": [_Object()]})
    path.write_bytes(pickle.dumps(content))
    assert "no whole file of torch.save" in _refusal(path)
    path = recorder.dump(tmp_path, 2)
    assert "--num-experts is 6" in _refusal(path, num_experts=6) and "--num-layers is 2" in _refusal(path, num_layers=2)
    path.write_bytes(path.read_bytes()[:1000])
    assert "no whole file of torch.save" in _refusal(path)


def test_recordings_of_several_servers_are_refused(tmp_path):
    recorders = [_Recorder(LOGICAL), _Recorder(torch.arange(6).repeat(3, 1), rank=1)]
    for recorder in recorders:
        recorder.forward(0, _physical(2, seed=0), [0, 1], extend_seq_lens=[2])
        recorder.dump(tmp_path, 1)
    assert "different models" in _refusal(tmp_path)
    recorders[1].forward(0, _physical(2, seed=0), [0, 1], extend_seq_lens=[2])
    recorders[1].dump(tmp_path, 2)
    assert "more recordings of some ranks" in _refusal(tmp_path)
