"""Writes the values of training steps to a file of JSON lines, to TensorBoard and to W&B."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Optional, Union

import torch.distributed as dist

from megatron_moe_spec.metrics.json_lines import JsonLines

METRICS_FILE = "moe_spec_metrics.jsonl"  # python -m megatron_moe_spec.report finds it by this name


class MetricsWriter:
    """Writes what ``handle.end_step()`` returns, to any of a file, TensorBoard and W&B.

    Losses go to TensorBoard and W&B in every step. In every ``metrics_interval``-th step, the file gets a line with
    losses and diagnostics, and the loggers get ``moe_spec/<measure>/layer_<i>`` or ``.../layers_<i>_<j>``.

    Create it on every rank, with the same file, once torch.distributed is initialized: all ranks learn from rank 0
    whether the file can be written, by a collective.

    Args:
        jsonl: the file, which rank 0 appends to; None: none.
        tensorboard: a ``SummaryWriter``; None where there is none, as on all of Megatron's ranks but the last.
        wandb: a run of W&B, or the module ``wandb``; None likewise.
        wandb_metrics: "brief": W&B gets the measures' means over the layers, ``moe_spec/<measure>``, and of
            ``max_violation`` and ``dead_experts`` the largest; "full": those of every layer.
        log_losses: whether TensorBoard and W&B get the losses; False for a program that logs them itself.

    Raises:
        OSError: rank 0 cannot write the file; on every rank.
    """

    def __init__(
        self,
        jsonl: Union[str, Path, None] = None,
        tensorboard: Any = None,
        wandb: Any = None,
        wandb_metrics: str = "brief",
        log_losses: bool = True,
    ):
        self._file = None if jsonl is None else _checked(JsonLines(Path(jsonl)))
        self._tensorboard, self._wandb = tensorboard, wandb
        self._brief, self._log_losses = wandb_metrics == "brief", log_losses

    def write(
        self, iteration: int, values: Mapping[str, Any], of_layers: Optional[Mapping[str, Mapping[int, float]]] = None
    ) -> None:
        """Writes the values of a step.

        Args:
            iteration: index of the step, from 1.
            values: from ``handle.end_step()``.
            of_layers: ``handle.losses_of_layers``, to be logged under the names that Megatron gives its own losses with
                ``--moe-per-layer-logging``, ``moe/<loss>_layer_<i>``.
        """
        diagnostics = values.get("diagnostics")
        losses = {name: value for name, value in values.items() if name != "diagnostics"}
        if self._file is not None and diagnostics is not None:
            losses = {name: float(loss) for name, loss in losses.items()}
            self._file.append({"iteration": iteration, **losses, **diagnostics})
        if self._tensorboard is None and self._wandb is None:
            return
        each_layer = {f"moe/{name}_layer_{i}": v for name, of in (of_layers or {}).items() for i, v in of.items()}
        scalars = {**(losses if self._log_losses else {}), **each_layer}
        measures = [] if diagnostics is None else list(_measures(diagnostics))
        measured = {
            f"moe_spec/{name}/{'layers' if len(layers) > 1 else 'layer'}_{'_'.join(map(str, layers))}": value
            for name, layers, value in measures
        }
        if self._tensorboard is not None:
            for tag, value in {**scalars, **measured}.items():
                self._tensorboard.add_scalar(tag, value, iteration)
        if self._wandb is not None and (scalars or measured):
            self._wandb.log({**scalars, **(_brief(measures) if self._brief else measured)}, iteration)


def _checked(file: JsonLines) -> Optional[JsonLines]:
    """The file on rank 0, None on the others; raises OSError on all where rank 0 cannot write it. A collective."""
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    problem = [file.problem() if is_first else ""]
    if dist.is_initialized():
        dist.broadcast_object_list(problem)
    if problem[0]:
        raise OSError(
            f"{file} cannot be written ({problem[0]}): give MetricsWriter another file; with the launcher, set "
            "--tensorboard-dir, or --save, to another folder, or --moe-spec-metrics-interval to 0"
        )
    return file if is_first else None


def _brief(measures: list[tuple[str, list[int], float]]) -> dict[str, float]:
    """Of all layers together, so that the number of keys does not grow with the model."""
    values: dict[str, list[float]] = defaultdict(list)
    for name, _, value in measures:
        values[name].append(value)
    means = {f"moe_spec/{name}": sum(found) / len(found) for name, found in values.items()}
    largest = [name for name in ("max_violation", "dead_experts") if name in values]
    return {**means, **{f"moe_spec/{name}_largest": max(values[name]) for name in largest}}


def _measures(diagnostics: dict) -> Iterator[tuple[str, list[int], float]]:
    """(measure, layer or pair of layers, value) of what was measured and is a number."""
    for row in (*diagnostics["layers"], *diagnostics["pairs"]):
        layers = row["layers"] if "layers" in row else [row["layer"]]
        for name, value in row.items():
            if isinstance(value, (int, float)) and name not in ("layer", "layer_index"):
                yield name, layers, value
