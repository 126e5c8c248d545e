"""Writes routing traces, in the schema of ``traces/schema.py``, while the next steps train.

Suffixes: T tokens of this rank's micro-batch, E experts, K experts of a token.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Optional

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe_spec.integration.compat.protocols import TransformerConfig
from megatron_moe_spec.integration.step.background import Background
from megatron_moe_spec.integration.step.clock import StepClock
from megatron_moe_spec.integration.step.trace_lines import TraceLines
from megatron_moe_spec.metrics.json_lines import JsonLines
from megatron_moe_spec.traces.schema import DROPPED, MODEL_FILE, PADDING, trace_file


class _Rows(NamedTuple):
    """A layer's routing of a micro-batch."""

    layer: int
    rows_TK: Tensor  # int16, on the host
    copied: Optional[torch.cuda.Event]  # happens when they are there; None: they are
    origin: dict[str, int]


class Tracer:
    """Keeps which experts each of this rank's tokens goes to, in the steps that are traced, and writes it.

    The file is written in the background, a step at a time: the host holds what is traced of the present step, and of
    one before it. A file that cannot be written is a warning there; ``check`` and ``close`` raise what else went wrong.

    Args:
        folder: where each rank has its file; empty: nothing is traced.

    Raises:
        ValueError: the folder cannot be written, or holds a trace of another model.
    """

    def __init__(self, folder: str, clock: StepClock, transformer_config: Optional[TransformerConfig]):
        self._clock = clock
        self._background = Background("moe-spec-trace")
        self.begin_step()
        if folder and transformer_config is not None:
            self._top_k = transformer_config.moe_router_topk
            self._rank = dist.get_rank()
            self._text = TraceLines(transformer_config.num_moe_experts)
            self._file = JsonLines(Path(folder) / trace_file(self._rank))
            if problem := self._file.problem():
                raise ValueError(
                    f"{self._file} cannot be written ({problem}): set --moe-spec-trace-path to another folder"
                )
            if self._rank == 0:
                _write_model(Path(folder) / MODEL_FILE, transformer_config)

    def begin_step(self) -> None:
        self._records: list[_Rows] = []

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
        rows_TK = _rows(active_TE, padding_mask, self._top_k)
        copied = torch.cuda.Event(blocking=True) if rows_TK.is_cuda else None
        rows_TK = rows_TK.to("cpu", non_blocking=copied is not None)  # pinned, if not blocking
        if copied is not None:
            copied.record()  # on this layer's stream, which need not be the one of others
        self._records.append(_Rows(layer, rows_TK, copied, origin))

    def write(self, step: int) -> None:
        """Begins to write the step's trace, once that of the step before is written. Does not wait for the device."""
        if self._records:
            records, self._records = self._records, []
            self._background.start(self._write, step, records)

    def check(self) -> None:
        """Raises RuntimeError, with the name of the file, if a step could not be traced."""
        self._background.check()

    def close(self) -> None:
        """Waits until all is written; then the same."""
        self._background.wait()

    def _write(self, step: int, records: list[_Rows]) -> None:
        try:
            self._file.extend(self._lines(step, records))
        except Exception as error:
            raise RuntimeError(f"{self._file} has no whole trace of step {step}: {error}") from error

    def _lines(self, step: int, records: list[_Rows]) -> Iterator[bytes]:
        for layer, rows_TK, copied, origin in records:
            if copied is not None:
                torch.cuda.set_device(copied.device)  # of this thread, which else gets a context on device 0
                copied.synchronize()
            record = {
                "step": step,
                "stage": "pre_dispatch",
                "block": "decoder",
                "layer": layer,
                "rank": self._rank,
                "num_tokens": len(rows_TK),
                "topk": self._top_k,
                "top_indices": None,
                **origin,
            }
            yield self._text.line(record, rows_TK.numpy())


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
