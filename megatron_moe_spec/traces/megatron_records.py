"""Records of a routing trace, as ``schema.py`` describes them. Suffixes: T tokens, K experts of a token."""

import json
from array import array
from collections import Counter
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from megatron_moe_spec.traces.schema import DROPPED, PADDING

MIXED = "Are these files of several runs? Keep those of one."
_MOST = 2**15 - 1  # experts of a layer; as an index, it stands for DROPPED while rows are sorted


class TraceError(ValueError):
    """A trace that cannot be read. The message names the file, the line where there is one, and the remedy."""


@dataclass(frozen=True)
class Record:
    """One MoE layer and micro-batch of one rank."""

    place: str  # file and line
    rank: int
    step: int
    numbered: bool  # whether it says its micro-batch; Megatron's own does not, and ``read_rank`` counts them
    micro_batch: int  # index in the step
    layer: int
    num_sequences: int  # 1 where the record does not say
    experts_TK: Tensor  # int16, as ``sorted_rows`` returns them


@dataclass(frozen=True)
class RankRecords:
    """What a rank's file holds of the decoder's layers."""

    file: Path
    layers: tuple[int, ...]  # their indices, ascending
    records: list[Record]  # at least one; steps ascending
    superseded: Counter[int]  # how often each step was skipped, as a run before a restart wrote it


def read_rank(
    file: Path, num_experts: Optional[int], num_layers: Optional[int], drop_incomplete: bool, notices: list[str]
) -> Optional[RankRecords]:
    """Read a file; what is skipped is added to ``notices``. None: it has no record of the decoder's layers."""
    records: list[Record] = []
    other_blocks: Counter[str] = Counter()
    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{file}:{number}"
            try:
                fields = json.loads(line)
            except ValueError:
                if not drop_incomplete:
                    raise TraceError(
                        f"{place} is no JSON. Was the run cut off while it wrote this line? Delete the line, or leave "
                        "out what is incomplete with --drop-incomplete."
                    ) from None
                notices.append(f"{place} is no JSON and was left out.")
                continue
            if not isinstance(fields, dict) or not isinstance(fields.get("block"), str):
                raise TraceError(f"{place} is no record of a routing trace: it names no block.")
            if fields["block"] != "decoder":
                other_blocks[fields["block"]] += 1
                continue
            record = _record(fields, place, num_experts, num_layers)
            records.append(record)
            first = records[0]
            if record.rank != first.rank:
                raise TraceError(f"{place}: rank {record.rank}, but rank {first.rank} in {first.place}. {MIXED}")
            check_top_k(record, first)
            if record.numbered != first.numbered:
                raise TraceError(f"{place} and {first.place}: only one of them has a micro_batch. {MIXED}")
    for block, count in other_blocks.items():
        notices.append(f"{file}: {count} records of the block {block} were left out; only the decoder's are read.")
    if not records:
        return None
    last_run, superseded = _last_run(records)
    return RankRecords(file, tuple(sorted({record.layer for record in last_run})), last_run, superseded)


def _record(fields: dict[str, Any], place: str, num_experts: Optional[int], num_layers: Optional[int]) -> Record:
    def number(key: str, least: int = 0) -> int:
        value = fields.get(key)
        if type(value) is not int or value < least:
            found = f"{value!r:.40}" if key in fields else "missing"
            raise TraceError(f"{place}: {key} is {found}; in a routing trace it is a number of at least {least}.")
        return value

    layer, num_tokens, top_k = number("layer"), number("num_tokens"), number("topk", least=1)
    if num_layers is not None and layer >= num_layers:
        raise TraceError(
            f"{place}: layer {layer}, but the model's {num_layers} layers are numbered from 0. Is this a trace of "
            "another model, or --num-layers wrong?"
        )
    experts_TK = _rows(fields.get("top_indices"), num_tokens, top_k, place)
    return Record(
        place=place,
        rank=number("rank"),
        step=number("step"),
        numbered="micro_batch" in fields,
        micro_batch=number("micro_batch") if "micro_batch" in fields else 0,
        layer=layer,
        num_sequences=number("num_sequences", least=1) if "num_sequences" in fields else 1,
        experts_TK=sorted_rows(experts_TK, num_experts, place),
    )


def _rows(rows: Any, num_tokens: int, top_k: int, place: str) -> Tensor:
    """[T, K] int16 of lists."""
    try:
        lengths = set(map(len, rows))
        numbers = array("h", list(chain.from_iterable(rows)))
    except TypeError:
        raise TraceError(f"{place}: top_indices must be a list of the numbers of each token's experts.") from None
    except OverflowError:
        raise TraceError(f"{place}: top_indices has a number beyond {_MOST}.") from None
    if len(rows) != num_tokens:
        raise TraceError(f"{place}: num_tokens is {num_tokens}, but top_indices has {len(rows)} rows.")
    if not lengths <= {top_k}:
        raise TraceError(f"{place}: topk is {top_k}, but a row of top_indices has {min(lengths - {top_k})} numbers.")
    if num_tokens == 0:
        return torch.empty(0, top_k, dtype=torch.int16)
    return torch.frombuffer(numbers, dtype=torch.int16).view(num_tokens, top_k)


def sorted_rows(experts_TK: Tensor, num_experts: Optional[int], place: str) -> Tensor:
    """The rows, int16, with the experts ascending, then ``DROPPED``; rows of ``PADDING`` stay."""
    if len(experts_TK) == 0:
        return experts_TK
    lowest, highest = (int(number) for number in experts_TK.aminmax())
    num_experts = _MOST if num_experts is None else num_experts
    if highest >= num_experts:
        raise TraceError(
            f"{place}: expert {highest}, but the {num_experts} experts of a layer are numbered from 0. Is this a trace "
            "of another model, or --num-experts wrong?"
        )
    if lowest < PADDING:
        raise TraceError(
            f"{place}: {lowest} is no number of an expert, nor {DROPPED} (dropped) or {PADDING} (padding)."
        )
    if lowest >= 0 and bool((experts_TK[:, 1:] > experts_TK[:, :-1]).all()):
        return experts_TK
    padding_TK = experts_TK == PADDING
    if bool((padding_TK.any(dim=1) != padding_TK.all(dim=1)).any()):
        raise TraceError(f"{place}: a part of a token's row is {PADDING} (padding); it must be all of the row or none.")
    rows_TK = experts_TK.masked_fill(experts_TK == DROPPED, _MOST).sort(dim=1).values
    twice_TK = (rows_TK[:, 1:] == rows_TK[:, :-1]) & (rows_TK[:, 1:] >= 0) & (rows_TK[:, 1:] < _MOST)
    if bool(twice_TK.any()):
        raise TraceError(f"{place}: a token has expert {int(rows_TK[:, 1:][twice_TK][0])} twice.")
    return rows_TK.masked_fill(rows_TK == _MOST, DROPPED)


def agreed(name: str, given: Optional[int], found: Optional[int], file: Path) -> Optional[int]:
    """What an argument or the file says, and refuse the one that differs from the other; None: not known."""
    if given is not None and found not in (None, given):
        raise TraceError(
            f"--{name.replace('_', '-')} is {given}, but {file} says {found}. Is this a trace of another model? If "
            "not, leave the flag out."
        )
    return found if given is None else given


def check_top_k(record: Record, first: Record) -> None:
    """Refuse a record of another top-k than the first one's."""
    top_k, first_top_k = record.experts_TK.shape[1], first.experts_TK.shape[1]
    if top_k != first_top_k:
        raise TraceError(f"{record.place}: topk is {top_k}, but {first_top_k} in {first.place}. {MIXED}")


def _last_run(records: list[Record]) -> tuple[list[Record], Counter[int]]:
    """Index micro-batches, and skip what was written before a restart from a checkpoint.

    A restart is where steps go backwards, or where a record of the step comes again. Whatever stands before it of that
    step or later ones is skipped; the counts say how often each step was.
    """
    kept: list[Record] = []
    superseded: Counter[int] = Counter()
    counts: Counter[int] = Counter()  # records of each layer in the step at hand
    seen: set[tuple[int, int]] = set()  # layers and micro-batches of the step at hand
    for record in records:
        if kept and record.step != kept[-1].step:
            counts.clear()
            seen.clear()
        if not record.numbered:  # Megatron's own: by their order
            record = replace(record, micro_batch=counts[record.layer])
            counts[record.layer] += 1
        key = record.layer, record.micro_batch
        if kept and (record.step < kept[-1].step or key in seen):
            seen.clear()
            superseded.update({other.step for other in kept if other.step >= record.step})
            kept = [other for other in kept if other.step < record.step]
        seen.add(key)
        kept.append(record)
    return kept, superseded
