"""Writes routing traces, in the schema of ``traces/schema.py``.

Suffixes: T tokens of this rank's micro-batch, E experts, K experts of a token.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe_spec.integration.compat.protocols import TransformerConfig
from megatron_moe_spec.integration.step.clock import StepClock
from megatron_moe_spec.metrics.json_lines import JsonLines
from megatron_moe_spec.traces.schema import DROPPED, MODEL_FILE, PADDING, trace_file


class Tracer:
    """Keeps which experts each of this rank's tokens goes to, in the steps that are traced, and writes it.

    Args:
        folder: where each rank has its file; empty: nothing is traced.

    Raises:
        ValueError: the folder cannot be written, or holds a trace of another model.
    """

    def __init__(self, folder: str, clock: StepClock, transformer_config: Optional[TransformerConfig]):
        self._clock = clock
        self.begin_step()
        if folder and transformer_config is not None:
            self._top_k = transformer_config.moe_router_topk
            self._rank = dist.get_rank()
            self._file = JsonLines(Path(folder) / trace_file(self._rank))
            if problem := self._file.problem():
                raise ValueError(
                    f"{self._file} cannot be written ({problem}): set --moe-spec-trace-path to another folder"
                )
            if self._rank == 0:
                _write_model(Path(folder) / MODEL_FILE, transformer_config)

    def begin_step(self) -> None:
        self._records: list[tuple[int, Tensor, dict[str, int]]] = []

    def add(
        self,
        layer: int,
        micro_batch: int,
        active_TE: Tensor,
        padding_mask: Optional[Tensor],
        num_sequences: Optional[int],
    ) -> None:
        """Adds a layer's routing of a micro-batch. On a GPU, the copy to the host is not waited for.

        Args:
            layer: layer index, among all layers of the model.
            active_TE: bool, the experts that each token was dispatched to.
            padding_mask: True for padding, in any shape of T elements; None: no padding.
        """
        if not self._clock.tracing:
            return
        origin = {"micro_batch": micro_batch}
        if num_sequences is not None:
            origin["num_sequences"] = num_sequences
        rows_TK = _rows(active_TE, padding_mask, self._top_k).to("cpu", non_blocking=True)
        self._records.append((layer, rows_TK, origin))

    def write(self, step: int) -> None:
        if self._records:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # copies to the host
            self._file.extend(self._lines(step))
            self._records = []

    def _lines(self, step: int) -> Iterator[dict]:
        for layer, rows_TK, origin in self._records:
            yield {
                "step": step,
                "stage": "pre_dispatch",
                "block": "decoder",
                "layer": layer,
                "rank": self._rank,
                "num_tokens": len(rows_TK),
                "topk": self._top_k,
                "top_indices": rows_TK.tolist(),
                **origin,
            }


def _rows(active_TE: Tensor, padding_mask: Optional[Tensor], top_k: int) -> Tensor:
    """[T, K] int16: a token's experts, ascending; then DROPPED. Rows of padding tokens are PADDING."""
    num_experts = active_TE.shape[1]
    numbers_E = torch.arange(num_experts, device=active_TE.device)
    numbers_TE = torch.where(active_TE, numbers_E, num_experts)
    rows_TK = numbers_TE.topk(top_k, dim=1, largest=False, sorted=True).values
    rows_TK = rows_TK.masked_fill(rows_TK == num_experts, DROPPED)
    if padding_mask is not None:
        rows_TK = rows_TK.masked_fill(padding_mask.reshape(-1, 1), PADDING)
    return rows_TK.to(torch.int16)


def _write_model(path: Path, transformer_config: TransformerConfig) -> None:
    model = {
        "num_layers": transformer_config.num_layers,
        "num_experts": transformer_config.num_moe_experts,
        "topk": transformer_config.moe_router_topk,
        "hidden_size": transformer_config.hidden_size,
    }
    if path.exists():
        found = path.read_text()
        try:
            known = json.loads(found)
        except json.JSONDecodeError:
            known = None  # a run that was cut off, before it wrote all of it: it says what this one does
        if known not in (None, model):
            raise ValueError(
                f"{path} is of another model ({found.strip()}): set --moe-spec-trace-path to another folder"
            )
    # All of it or nothing, whenever the run is cut off.
    written = path.with_suffix(".written")
    written.write_text(json.dumps(model) + "\n")
    written.replace(path)
