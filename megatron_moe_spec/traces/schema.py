"""Routing traces: which experts each token went to, in every MoE layer.

On disk, a folder of ``router_trace_rank<r>.jsonl``, one file a rank, in the schema of Megatron-Core 0.19's
``--moe-routing-trace-path``. A record (a line) is one MoE layer and micro-batch of one rank:

    {"step": 50, "stage": "pre_dispatch", "block": "decoder", "layer": 3, "rank": 0, "num_tokens": 4, "topk": 2,
     "top_indices": [[1, 5], [0, -1], [-1, -1], [-2, -2]], "micro_batch": 0, "num_sequences": 2}

``layer`` is the index of the transformer layer in the whole model. ``top_indices`` has a row for each token,
in the order in which the router sees them: [sequence position, sequence]. A row holds the indices of the experts that
the token was dispatched to, ascending; then ``DROPPED`` for each one that it lost to the capacity of experts. The row
of a padding token is ``PADDING`` throughout. Megatron writes neither, nor the last two keys.

Beside them, ``router_trace_model.json`` has what no record says of the model: num_layers, num_experts, topk,
hidden_size.

Suffixes: T tokens, M MoE layers, K experts of a token.
"""

from dataclasses import dataclass
from typing import Optional

from torch import Tensor

DROPPED = -1
PADDING = -2
MODEL_FILE = "router_trace_model.json"


def trace_file(rank: int) -> str:
    """Name of a rank's file."""
    return f"router_trace_rank{rank}.jsonl"


@dataclass(frozen=True)
class Trace:
    """What the routers of a model decided for a number of tokens; the same tokens in every layer.

    Attributes:
        experts_TMK: int16, indices of a token's experts in ascending order, then ``DROPPED``. Padding tokens are
            skipped. Tokens stand in the order of steps, then micro-batches, ranks, sequences and positions.
        layers: indices of the MoE layers in the whole model, ascending; dense layers count.
        num_experts: of each MoE layer.
        batch_T: int32, ascending: tokens of the same step and micro-batch, on all ranks, have the same index.
        sequence_T: int32, ascending: tokens of the same sequence have the same index.
        num_layers: of the whole model, dense ones too; None: not known.
        hidden_size: None: not known.
        num_padding: padding tokens that were skipped.
        notices: what a reader should know, one sentence each.
    """

    experts_TMK: Tensor
    layers: tuple[int, ...]
    num_experts: int
    batch_T: Tensor
    sequence_T: Tensor
    num_layers: Optional[int] = None
    hidden_size: Optional[int] = None
    num_padding: int = 0
    notices: tuple[str, ...] = ()
