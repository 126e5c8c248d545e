"""Recordings of SGLang's expert distribution recorder as routing traces.

In mode per_token, each rank writes ``expert_distribution_recorder_<time>_<rank>.pt``, a dictionary of

    records: a list with a dictionary for each forward pass
        forward_pass_id, rank; input_ids and positions of T tokens
        extend_seq_lens: lengths of the sequences that these are; None in decoding, where each is of another request
        topk_ids_of_layer [L, T, 8] int32: indices of physical experts; -1 in dense layers and from the top-k-th column
    last_physical_to_logical_map [L, P]: the expert of which each physical expert is a copy

Suffixes: T tokens, L layers of the whole model, M MoE layers, K experts of a token, P physical experts of a layer.
"""

import re
from collections import Counter, defaultdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from megatron_moe_spec.traces.megatron_records import MIXED, TraceError, agreed, sorted_rows
from megatron_moe_spec.traces.schema import DROPPED, Trace

_TIME = re.compile(r"expert_distribution_recorder_(\d+(?:\.\d+)?)")
_KEYS = {"forward_pass_id", "rank", "input_ids", "positions", "extend_seq_lens", "topk_ids_of_layer"}
_MODE = "Record with --expert-distribution-recorder-mode per_token."


class _Pass(NamedTuple):
    """A forward pass on one rank."""

    recording: int  # of the rank's files
    pass_id: int  # the same on all ranks
    rank: int
    file: Path
    record: dict[str, Any]
    logical_LP: Tensor

    @property
    def place(self) -> str:
        return f"{self.file}, forward pass {self.pass_id}"


def read_recordings(
    files: list[Path], num_experts: Optional[int], num_layers: Optional[int], drop_incomplete: bool
) -> Trace:
    """Read the recordings of a server, of any number of its ranks; see ``files.read_trace``.

    A batch is a forward pass, on all ranks. A sequence is what a forward pass has of one request; where there is one
    rank with one request, its sequence goes on in the next forward pass.
    """
    notices: list[str] = []
    passes = _passes(files, notices)
    num_experts, num_layers = _model(passes, num_experts, num_layers)
    layers, top_k, passes = _complete(passes, drop_incomplete, notices)
    experts, sequences = [], []
    num_sequences = num_padding = 0
    is_one_rank = len({each.rank for each in passes}) == 1
    following = None  # position that would go on with the sequence
    for each in passes:
        experts_TMK = _experts(each, layers, top_k, num_experts)
        positions, lengths = each.record["positions"], each.record["extend_seq_lens"]
        lengths = [] if lengths is None else list(map(int, lengths))
        if sum(lengths) != len(experts_TMK):
            lengths = [1] * len(experts_TMK)
        goes_on = len(lengths) == 1 and positions[0] == following
        following = positions[-1] + 1 if len(lengths) == 1 and is_one_rank else None
        indices = num_sequences - goes_on + torch.arange(len(lengths), dtype=torch.int32)
        num_sequences += len(lengths) - goes_on
        is_token_T = (experts_TMK != DROPPED).flatten(1).any(dim=1)
        experts.append(experts_TMK[is_token_T])
        sequences.append(indices.repeat_interleave(torch.tensor(lengths))[is_token_T])
        num_padding += len(experts_TMK) - len(experts[-1])
    of_passes = torch.tensor([(each.recording, each.pass_id) for each in passes])
    batch_of_pass = torch.unique_consecutive(of_passes, dim=0, return_inverse=True)[1].int()
    return Trace(
        experts_TMK=torch.cat(experts),
        layers=tuple(layers),
        num_experts=num_experts,
        batch_T=batch_of_pass.repeat_interleave(torch.tensor([len(experts_TMK) for experts_TMK in experts])),
        sequence_T=torch.cat(sequences),
        num_layers=num_layers,
        num_padding=num_padding,
        notices=tuple(notices),
    )


def _load(file: Path) -> dict[str, Any]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError:
        raise TraceError(
            f"{file} was not read: it holds objects other than tensors and numbers, and loading those may run code. A "
            "recording of SGLang holds none; record anew."
        ) from None
    except RuntimeError:
        raise TraceError(f"{file} is no whole file of torch.save. Copy it anew.") from None
    if isinstance(content, dict) and "logical_count" in content:
        raise TraceError(f"{file} was recorded in mode stat, which only counts tokens. {_MODE}")
    if not (isinstance(content, dict) and {"records", "last_physical_to_logical_map"} <= content.keys()):
        raise TraceError(f"{file} is no recording of SGLang's expert distribution recorder. {_MODE}")
    for record in content["records"]:
        if "topk_ids_of_layer" not in record:
            raise TraceError(f"{file} was recorded in mode per_pass, which only counts tokens. {_MODE}")
        if not _KEYS <= record.keys():
            missing = ", ".join(sorted(_KEYS - record.keys()))
            raise TraceError(f"{file}: its records have no {missing}, unlike those of SGLang 0.5. {_MODE}")
    return content


def _passes(files: list[Path], notices: list[str]) -> list[_Pass]:
    """Forward passes that have tokens, in the order of the trace."""
    of_rank: dict[int, list[_Pass]] = defaultdict(list)
    recordings: Counter[int] = Counter()
    # By the time in their names.
    for file in sorted(files, key=lambda file: float((_TIME.findall(file.name) or [0.0])[0])):
        content = _load(file)
        logical_LP = content["last_physical_to_logical_map"]
        recordings.update({record["rank"] for record in content["records"]})
        for record in content["records"]:
            rank = record["rank"]
            each = _Pass(recordings[rank], record["forward_pass_id"], rank, file, record, logical_LP)
            shape, expected = record["topk_ids_of_layer"].shape, (len(logical_LP), len(record["input_ids"]))
            if shape[:2] != expected:
                raise TraceError(
                    f"{each.place}: topk_ids_of_layer has {shape[0]} layers and {shape[1]} tokens, but "
                    f"last_physical_to_logical_map has {expected[0]} layers, and input_ids {expected[1]} tokens."
                )
            if expected[1]:
                of_rank[rank].append(each)
    if not of_rank:
        raise TraceError(f"{', '.join(map(str, files))}: no token. Start the recorder before the requests.")
    if len(set(recordings.values())) > 1:
        raise TraceError(f"{files[0].parent} has more recordings of some ranks than of others. {MIXED}")
    inputs: dict[int, list[Any]] = {}
    for rank, passes in sorted(of_rank.items()):
        of_passes = [(each[:2], each.record["input_ids"], each.record["positions"]) for each in passes]
        same = next((other for other, others in inputs.items() if others == of_passes), None)
        if same is None:
            inputs[rank] = of_passes
        else:
            notices.append(f"Rank {rank} has the same tokens as rank {same} (tensor parallelism) and was left out.")
    return sorted((each for rank in inputs for each in of_rank[rank]), key=lambda each: each[:3])


def _model(passes: list[_Pass], num_experts: Optional[int], num_layers: Optional[int]) -> tuple[int, int]:
    """Number of experts of a layer, and of layers."""
    first = passes[0]
    found = int(first.logical_LP.max()) + 1, len(first.logical_LP)
    for file, logical_LP in {each.file: each.logical_LP for each in passes}.items():
        if (int(logical_LP.max()) + 1, len(logical_LP)) != found:
            raise TraceError(f"{first.file} and {file} are of different models. {MIXED}")
    agreed("num_experts", num_experts, found[0], first.file)
    agreed("num_layers", num_layers, found[1], first.file)
    return found


def _complete(passes: list[_Pass], drop: bool, notices: list[str]) -> tuple[list[int], int, list[_Pass]]:
    """Indices of the MoE layers, the top-k, and the forward passes in which all of those layers were recorded."""
    used = torch.stack([(each.record["topk_ids_of_layer"] >= 0).any(dim=1) for each in passes])  # [passes, L, K]
    recorded = used.any(dim=2)
    layers = recorded.any(dim=0).nonzero().flatten().tolist()
    if not layers:
        raise TraceError(f"{passes[0].file}: no experts were recorded.")
    top_k = int(used.any(dim=1).any(dim=0).nonzero().max()) + 1
    complete = recorded[:, layers].all(dim=1)
    if not bool(complete.all()):
        index = int((~complete).nonzero()[0])
        missing = ", ".join(str(layer) for layer in layers if not recorded[index, layer])
        what = f"{int((~complete).sum())} of {len(passes)} forward passes are incomplete"
        first = f"{passes[index].place} has no experts of layers {missing}, which others have."
        if not bool(complete.any()):
            raise TraceError(f"{first} {what}. {_MODE}")
        if not drop:
            raise TraceError(f"{first} {what}. Leave them out with --drop-incomplete.")
        notices.append(f"{what} and were left out. {first}")
    return layers, top_k, [each for each, is_complete in zip(passes, complete) if is_complete]


def _experts(each: _Pass, layers: list[int], top_k: int, num_experts: int) -> Tensor:
    """[T, M, K] int16: experts of the tokens of a forward pass, in rows as a trace has them."""
    physical_MTK = each.record["topk_ids_of_layer"][layers, :, :top_k].long()
    logical_MP = each.logical_LP[layers]
    highest, num_physical = int(physical_MTK.max()), logical_MP.shape[1]
    if highest >= num_physical:
        raise TraceError(
            f"{each.place}: physical expert {highest} of {num_physical}. Are shared experts among them? Record with "
            "--disable-shared-experts-fusion."
        )
    logical_MTK = logical_MP.long().gather(1, physical_MTK.clamp_min(0).flatten(1)).view_as(physical_MTK)
    logical_TMK = logical_MTK.masked_fill(physical_MTK < 0, DROPPED).transpose(0, 1).short()
    return sorted_rows(logical_TMK.flatten(0, 1), num_experts, each.place).view_as(logical_TMK)
