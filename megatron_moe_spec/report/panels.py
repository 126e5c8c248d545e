"""The panels of a report's figures: what each draws of a run or a trace, on the axis that is its last argument.

A ``baseline`` without values is not drawn.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Optional

import torch
from torch import Tensor

from megatron_moe_spec.report import figures
from megatron_moe_spec.report.runs import Run
from megatron_moe_spec.report.table import title_of
from megatron_moe_spec.traces.counts import loads

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def curve(run: Run, baseline: Run, name: str, axis: "Axes", label: str = "this run") -> None:
    before = {label: baseline.series.get(name, [])}
    figures.draw_curves(axis, title_of(name), {label: run.series[name]}, before)


def layers(run: Run, baseline: Run, name: str, axis: "Axes") -> None:
    title, mean, before = title_of(name), run.series[name], baseline.series.get(name, [])
    figures.draw_layers(axis, title, run.layers[name], mean, before)


def layers_as_heat(run: Run, name: str, axis: "Axes") -> None:
    figures.draw_layers_as_heat(axis, title_of(name), run.layers[name])


def auxiliary(run: Run, baseline: Run, names: Sequence[str], axis: "Axes") -> None:
    """Losses of unlike size in one panel: each over its first value in this run."""
    first = {name: abs(run.series[name][0][1]) or 1.0 for name in names}
    curves, before = (
        {title_of(name): [(x, y / first[name]) for x, y in one.series.get(name, [])] for name in names}
        for one in (run, baseline)
    )
    figures.draw_curves(axis, "auxiliary losses, over their first value", curves, before)


def information(run: Run, baseline: Run, axis: "Axes") -> None:
    names = {
        "adjacent layers": "normalized_mutual_information",
        "shuffled tokens": "null_normalized_mutual_information",
    }
    curves, before = ({label: one.series.get(name, []) for label, name in names.items()} for one in (run, baseline))
    figures.draw_curves(axis, "mutual information, normalised", curves, before)


def relative_loads(run: Run) -> Optional[Tensor]:
    """[M, E] load over its layer's mean, of the last tenth of measured steps, or of the trace; None without either."""
    if run.loads:
        measured = list(run.loads.values())
        loads_ME = torch.stack(measured[-math.ceil(len(measured) / 10) :]).double().sum(dim=0)
    elif run.trace is not None:
        loads_ME = loads(run.trace).double()
    else:
        return None
    return loads_ME / loads_ME.mean(dim=1, keepdim=True).clamp_min(1e-12)


def load(relative_ME: Tensor, names: Sequence[str], axis: "Axes") -> None:
    title, experts = "load of experts, over the mean", range(relative_ME.shape[1])
    figures.draw_heat(axis, title, relative_ME.numpy(), ("expert", experts), ("layer", names), vmin=0)


def load_over_time(run: Run, layer: int, axis: "Axes") -> None:
    iterations = figures.thinned_columns(list(run.loads))
    load = torch.stack([run.loads[i][layer] for i in iterations], dim=1).double()
    relative = load / load.mean(dim=0).clamp_min(1e-12)
    title, experts = f"load of layer {run.names[layer]}, the least even, over the mean", range(len(load))
    figures.draw_heat(axis, title, relative.numpy(), ("iteration", iterations), ("expert", experts), vmin=0)


def flows(title: str, share_EE: Tensor, order: Sequence[int], vmax: float, layers: Sequence[int], axis: "Axes") -> None:
    """Shares of the tokens of the row's expert that the column's serves in the next layer, columns in that order."""
    x, y = (f"expert of layer {layers[1]}, reordered", order), (f"expert of layer {layers[0]}", range(len(order)))
    figures.draw_heat(axis, title, share_EE[:, order].numpy(), x, y, vmin=0.0, vmax=vmax)


def coactivation(counts_EE: Tensor, layer: int, axis: "Axes") -> None:
    joint = counts_EE.double()
    load = joint.sum(dim=1)
    products = (load[:, None] * load).fill_diagonal_(0)  # no token has an expert twice
    expected = products * (joint.sum() / products.sum().clamp_min(1))
    lift = (joint / expected.clamp_min(1e-12)).fill_diagonal_(math.nan)
    experts = ("expert", range(len(joint)))
    figures.draw_heat(axis, f"co-activation in layer {layer}", lift.numpy(), experts, experts, vmin=0)


def lists(run: Run, baseline: Run, name: str, title: str, x: str, first: int, axis: "Axes") -> None:
    """A list of each layer as a line, and the mean of the baseline's; ``first``: where lines begin."""
    values, before = run.lists[name], baseline.lists.get(name)
    for index, ys in enumerate(values.values()):
        colour = figures.colour_of_layer(index, len(values))
        figures.curve(axis, list(enumerate(ys, first)), "", colour, width=1.0)
    if before is not None:
        mean = [sum(column) / len(column) for column in zip(*before.values())]
        label = "baseline, mean of layers"
        figures.curve(axis, list(enumerate(mean, first)), label, figures.BASELINE, dashed=True, width=2.0)
    figures.finish(axis, f"{title} (earlier layers darker)", x=x)
