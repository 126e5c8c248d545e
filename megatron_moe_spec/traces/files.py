"""Routing traces as files. Suffixes: T tokens, M MoE layers, K experts of a token, S positions, B sequences."""

import json
from collections import defaultdict
from itertools import combinations, groupby
from pathlib import Path
from typing import Optional, Union

import torch
from torch import Tensor

from megatron_moe_spec.traces.megatron_records import (
    MIXED,
    RankRecords,
    Record,
    TraceError,
    agreed,
    check_top_k,
    read_rank,
)
from megatron_moe_spec.traces.schema import MODEL_FILE, PADDING, Trace
from megatron_moe_spec.traces.sglang_records import read_recordings

_Model = dict[str, Optional[int]]


def read_trace(
    path: Union[str, Path],
    num_experts: Optional[int] = None,
    num_layers: Optional[int] = None,
    drop_incomplete: bool = False,
) -> Trace:
    """Read a trace.

    Args:
        path: a folder of ``router_trace_rank<r>.jsonl``, one such file, or what SGLang's expert distribution recorder
            wrote in mode per_token: a .pt file, or a folder of those of all ranks.
        num_experts, num_layers: of the model; None: what the files say.
        drop_incomplete: skip micro-batches that lack layers, and lines that are cut off; notices say how many.

    Raises:
        TraceError: the files are no trace, are incomplete, or belong to several runs or to another model.
    """
    path = Path(path)
    if not path.exists():
        raise TraceError(f"{path} does not exist.")
    files, recordings = ([], [path]) if path.suffix == ".pt" else ([path], [])
    if path.is_dir():
        files = sorted(path.glob("router_trace_rank*.jsonl"))
        recordings = sorted(path.glob("expert_distribution_recorder_*.pt"))
    if bool(files) == bool(recordings):
        raise TraceError(
            f"{path} must hold either router_trace_rank<r>.jsonl or expert_distribution_recorder_*.pt; it holds "
            + ("both. Name one of the files, or move the others away." if files else "neither.")
        )
    if recordings:
        return read_recordings(recordings, num_experts, num_layers, drop_incomplete)
    return _read_jsonl(files, num_experts, num_layers, drop_incomplete)


def _read_jsonl(files: list[Path], num_experts: Optional[int], num_layers: Optional[int], drop: bool) -> Trace:
    notices: list[str] = []
    model = _model(files[0].parent / MODEL_FILE, num_experts, num_layers)
    ranks = _read_ranks(files, model, drop, notices)
    if (known_experts := model["num_experts"]) is None:
        rows = [record.experts_TK for rank in ranks for record in rank.records]
        largest = max((int(experts_TK.max()) for experts_TK in rows if len(experts_TK)), default=0)
        raise TraceError(
            f"{files[0].parent} has no {MODEL_FILE} with the number of experts. Give --num-experts; the largest number "
            f"of an expert in the trace is {largest}."
        )
    notices += _restarts(ranks)
    layers, shards = _shards(ranks)
    experts, batches, sequences = [], [], []
    num_padding = num_sequences = 0
    for batch, of_shards in enumerate(_complete(layers, shards, drop, notices)):
        for records in of_shards:
            experts_TMK, sequence_T = _tokens(records)
            experts.append(experts_TMK)
            batches.append(torch.full_like(sequence_T, batch))
            sequences.append(sequence_T + num_sequences)
            num_padding += len(records[0].experts_TK) - len(experts_TMK)
            num_sequences += records[0].num_sequences
    return Trace(
        experts_TMK=torch.cat(experts),
        layers=layers,
        num_experts=known_experts,
        batch_T=torch.cat(batches),
        sequence_T=torch.cat(sequences),
        num_layers=model["num_layers"],
        hidden_size=model["hidden_size"],
        num_padding=num_padding,
        notices=tuple(notices),
    )


def _model(file: Path, num_experts: Optional[int], num_layers: Optional[int]) -> _Model:
    """What the arguments, or the file where there is one, say of the model; None: not known."""
    model: _Model = dict.fromkeys(("num_experts", "num_layers", "topk", "hidden_size"))
    if file.exists():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            model = {key: found.get(key) for key in model}
        except (ValueError, AttributeError):
            raise TraceError(f"{file} is no JSON object. Delete it, and give --num-experts.") from None
    for key, value in model.items():
        if not (value is None or type(value) is int):
            raise TraceError(f"{file}: {key} is {value!r:.40}; it must be a whole number.")
    model["num_experts"] = agreed("num_experts", num_experts, model["num_experts"], file)
    model["num_layers"] = agreed("num_layers", num_layers, model["num_layers"], file)
    return model


def _read_ranks(files: list[Path], model: _Model, drop: bool, notices: list[str]) -> list[RankRecords]:
    """Each rank that has records, ascending, checked to be of one model."""
    ranks: dict[int, RankRecords] = {}
    for file in files:
        found = read_rank(file, model["num_experts"], model["num_layers"], drop, notices)
        if found is not None:  # else a pipeline stage without MoE layers
            other = ranks.setdefault(found.records[0].rank, found)
            if other is not found:
                raise TraceError(f"{other.file} and {file} are of the same rank. {MIXED}")
    if not ranks:
        raise TraceError(f"{', '.join(map(str, files))}: no record of the decoder's MoE layers.")
    first = ranks[min(ranks)]
    for rank in ranks.values():
        check_top_k(rank.records[0], first.records[0])
        if rank.records[0].numbered != first.records[0].numbered:
            raise TraceError(f"Of {first.file} and {rank.file}, only one numbers micro-batches. {MIXED}")
    top_k = first.records[0].experts_TK.shape[1]
    if model["topk"] not in (None, top_k):
        raise TraceError(
            f"{first.records[0].place}: topk is {top_k}, but {model['topk']} in {MODEL_FILE}. Is this a trace of "
            "another model?"
        )
    if not first.records[0].numbered:
        notices.append(
            "Megatron itself wrote this trace. In training it numbers the layers of each pipeline stage from 0, in "
            "inference all layers from 1: with several stages, or from inference, a layer is not the one of its number."
        )
    return [ranks[rank] for rank in sorted(ranks)]


def _restarts(ranks: list[RankRecords]) -> list[str]:
    """A sentence for each range of steps of which something was skipped."""
    skipped = set().union(*(rank.superseded for rank in ranks))
    steps = sorted(skipped.union(record.step for rank in ranks for record in rank.records))
    ranges = [list(group) for out, group in groupby(steps, key=lambda step: step in skipped) if out]
    spans = [f"step {r[0]}" if len(r) == 1 else f"steps {r[0]} to {r[-1]}" for r in ranges]
    return [f"What was written of {span} before a restart from a checkpoint was left out." for span in spans]


def _shards(ranks: list[RankRecords]) -> tuple[tuple[int, ...], list[tuple[RankRecords, ...]]]:
    """All layers, and the ranks that have the same tokens in different layers.

    In every order of ranks, these stand at the same place among the ranks of their pipeline stage.
    """
    stages: dict[tuple[int, ...], list[RankRecords]] = defaultdict(list)
    for rank in ranks:
        stages[rank.layers].append(rank)
    for (layers, here), (other_layers, others) in combinations(stages.items(), 2):
        if set(layers) & set(other_layers):
            raise TraceError(f"{here[0].file} and {others[0].file} have some layers in common, but not all. {MIXED}")
        if len(here) != len(others):
            raise TraceError(
                f"{len(here)} ranks have the layers of {here[0].file}, and {len(others)} those of {others[0].file}. Is "
                f"a file missing? {MIXED}"
            )
    return tuple(sorted(layer for layers in stages for layer in layers)), list(zip(*stages.values()))


def _complete(
    layers: tuple[int, ...], shards: list[tuple[RankRecords, ...]], drop: bool, notices: list[str]
) -> list[list[list[Record]]]:
    """Records of all layers, by shard and micro-batch, of the micro-batches that every shard has from the same run."""
    tables = [{(r.step, r.micro_batch, r.layer): r for rank in shard for r in rank.records} for shard in shards]
    # Step, and index in the step.
    micro_batches = sorted({(step, index) for table in tables for step, index, _ in table})
    problems: dict[tuple[int, int], str] = {}
    for step, index in micro_batches:
        for shard, table in zip(shards, tables):
            missing = [layer for layer in layers if (step, index, layer) not in table]
            if missing:
                file = next(rank.file for rank in shard if missing[0] in rank.layers)
                names = ", ".join(map(str, missing))
                problems[step, index] = f"{file} has no layer {names} of step {step}, micro-batch {index}."
        if len({rank.superseded[step] for shard in shards for rank in shard}) > 1:
            problems[step, index] = f"Step {step} ran again after a restart in the files of some ranks, but not of all."
    if not shards[0][0].records[0].numbered:  # indices that follow the order say nothing where a record is missing
        of_step = {step: problem for (step, _), problem in problems.items()}
        problems = {(step, index): of_step[step] for step, index in micro_batches if step in of_step}
    if problems:
        what = f"{len(problems)} of {len(micro_batches)} micro-batches are incomplete"
        first = problems[min(problems)]
        if len(problems) == len(micro_batches):
            raise TraceError(f"{first} {what}. {MIXED}")
        if not drop:
            raise TraceError(
                f"{first} {what}. Was the run cut off? Then leave them out with --drop-incomplete. {MIXED}"
            )
        notices.append(f"{what} and were left out. {first}")
    complete = [micro_batch for micro_batch in micro_batches if micro_batch not in problems]
    return [[[table[step, index, layer] for layer in layers] for table in tables] for step, index in complete]


def _tokens(records: list[Record]) -> tuple[Tensor, Tensor]:
    """[T, M, K] int16 and [T] int32: experts and sequence of the tokens of a shard's micro-batch, without padding."""
    first = records[0]
    num_tokens, num_sequences = len(first.experts_TK), first.num_sequences
    if num_tokens % num_sequences:
        raise TraceError(f"{first.place}: {num_tokens} tokens cannot be {num_sequences} sequences of the same length.")
    for record in records:
        if (len(record.experts_TK), record.num_sequences) != (num_tokens, num_sequences):
            raise TraceError(
                f"{record.place}: {len(record.experts_TK)} tokens in {record.num_sequences} sequences, but "
                f"{num_tokens} in {num_sequences} in {first.place}, another layer of the same micro-batch. {MIXED}"
            )
    length = num_tokens // num_sequences
    experts_SBMK = torch.stack([record.experts_TK for record in records], dim=1).unflatten(0, (length, num_sequences))
    experts_TMK = experts_SBMK.transpose(0, 1).flatten(0, 1)
    sequence_T = torch.arange(num_sequences, dtype=torch.int32).repeat_interleave(length)
    padding_TM = experts_TMK[:, :, 0] == PADDING
    for record, padding_T in zip(records, padding_TM.unbind(dim=1)):
        if not torch.equal(padding_T, padding_TM[:, 0]):
            raise TraceError(f"{first.place} and {record.place}: different tokens are padding in two layers. {MIXED}")
    is_token_T = ~padding_TM[:, 0]
    return experts_TMK[is_token_T], sequence_T[is_token_T]
