"""Random routing traces, and traces as files."""

import json
from pathlib import Path

import torch

from megatron_moe_spec.traces.schema import DROPPED, MODEL_FILE, PADDING, Trace, trace_file


def random_trace(
    num_tokens,
    num_layers,
    num_experts,
    top_k,
    seed,
    num_batches=1,
    sequences_per_batch=1,
    dropped=0.0,
    num_dense=0,
    hidden_size=16,
):
    """A trace of ``num_layers`` MoE layers, after ``num_dense`` dense ones, in which some experts are liked more.

    Args:
        num_batches, sequences_per_batch: the tokens are cut at random into as many batches of as many sequences, each
            of at least one token.
        dropped: probability that a token loses an expert.
    """
    generator = torch.Generator().manual_seed(seed)
    preferences_M1E = torch.randn(num_layers, 1, num_experts, generator=generator)
    scores_MTE = preferences_M1E + torch.randn(num_layers, num_tokens, num_experts, generator=generator)
    experts_TMK = scores_MTE.topk(top_k).indices.transpose(0, 1).short()
    lost_TMK = torch.rand(experts_TMK.shape, generator=generator) < dropped
    experts_TMK = experts_TMK.masked_fill(lost_TMK, num_experts).sort(dim=2).values
    num_sequences = num_batches * sequences_per_batch
    starts = 1 + torch.randperm(num_tokens - 1, generator=generator)[: num_sequences - 1]
    sequence_T = torch.zeros(num_tokens, dtype=torch.int32).index_fill_(0, starts, 1).cumsum(0, dtype=torch.int32)
    return Trace(
        experts_TMK=experts_TMK.masked_fill(experts_TMK == num_experts, DROPPED),
        layers=tuple(range(num_dense, num_dense + num_layers)),
        num_experts=num_experts,
        batch_T=sequence_T // sequences_per_batch,
        sequence_T=sequence_T,
        num_layers=num_dense + num_layers,
        hidden_size=hidden_size,
    )


def write_trace(folder, trace, num_shards=1, stages=None, micro_batches=1, interval=1):
    """Write the files that a run leaves, and return the number of padding tokens.

    Args:
        num_shards: ranks of each stage, among which the sequences of a batch are divided, one after the other. A rank's
            sequences are padded at their ends to the longest of them.
        stages: numbers of the layers of each pipeline stage; None: one stage. The first stage has the first ranks.
        micro_batches: batches of a step.
        interval: steps from one that is traced to the next.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stages = [trace.layers] if stages is None else stages
    top_k = trace.experts_TMK.shape[2]
    num_padding = 0
    lines: dict[int, list[str]] = {rank: [] for rank in range(num_shards * len(stages))}
    for batch in trace.batch_T.unique().tolist():
        sequences = trace.sequence_T[trace.batch_T == batch].unique().tolist()
        assert len(sequences) % num_shards == 0, "each shard gets as many sequences"
        size = len(sequences) // num_shards
        for shard in range(num_shards):
            numbers = sequences[shard * size : (shard + 1) * size]
            rows = [trace.experts_TMK[trace.sequence_T == number] for number in numbers]
            rows_SBMK = torch.nn.utils.rnn.pad_sequence(rows, padding_value=PADDING)
            num_padding += rows_SBMK.shape[0] * rows_SBMK.shape[1] - sum(map(len, rows))
            for stage, layers in enumerate(stages):
                rank = stage * num_shards + shard
                for layer in layers:
                    rows_TK = rows_SBMK[:, :, trace.layers.index(layer)].flatten(0, 1)
                    record = {
                        "step": batch // micro_batches * interval,
                        "stage": "pre_dispatch",
                        "block": "decoder",
                        "layer": layer,
                        "rank": rank,
                        "num_tokens": len(rows_TK),
                        "topk": top_k,
                        "top_indices": rows_TK.tolist(),
                        "micro_batch": batch % micro_batches,
                        "num_sequences": size,
                    }
                    lines[rank].append(json.dumps(record) + "\n")
    for rank, of_rank in lines.items():
        (folder / trace_file(rank)).write_text("".join(of_rank))
    model = {
        "num_layers": trace.num_layers,
        "num_experts": trace.num_experts,
        "topk": top_k,
        "hidden_size": trace.hidden_size,
    }
    (folder / MODEL_FILE).write_text(json.dumps(model))
    return num_padding
