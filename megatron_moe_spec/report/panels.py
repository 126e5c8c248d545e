"""The panels of a report's figures: what each draws of a run or a trace.

A ``baseline`` without values is not drawn.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Optional

import torch
from torch import Tensor

from megatron_moe_spec.report import figures
from megatron_moe_spec.report.figures import Panel
from megatron_moe_spec.report.runs import Run
from megatron_moe_spec.report.table import title_of
from megatron_moe_spec.traces.counts import loads

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def curve(run: Run, baseline: Run, name: str, label: str = "this run") -> Panel:
    before = {label: baseline.series.get(name, [])}
    return partial(figures.draw_curves, title_of(name), {label: run.series[name]}, before)


def layers(run: Run, baseline: Run, name: str) -> list[Panel]:
    """A measure of each layer: as lines, or of many layers as a heat map and their mean."""
    title, of_layers = title_of(name), run.layers[name]
    if len(of_layers) > figures.MOST_LINES:
        return [curve(run, baseline, name, "all layers"), partial(figures.draw_layers_as_heat, title, of_layers)]
    return [partial(figures.draw_layers, title, of_layers, run.series[name], baseline.series.get(name, []))]


def auxiliary(run: Run, baseline: Run, names: Sequence[str]) -> Panel:
    """Losses of unlike size in one panel: each over its first value in this run."""
    first = {name: abs(run.series[name][0][1]) or 1.0 for name in names}
    curves, before = (
        {title_of(name): [(x, y / first[name]) for x, y in one.series.get(name, [])] for name in names}
        for one in (run, baseline)
    )
    return partial(figures.draw_curves, "auxiliary losses, over their first value", curves, before)


def information(run: Run, baseline: Run) -> Panel:
    names = {
        "adjacent layers": "normalized_mutual_information",
        "shuffled tokens": "null_normalized_mutual_information",
    }
    curves, before = ({label: one.series.get(name, []) for label, name in names.items()} for one in (run, baseline))
    return partial(figures.draw_curves, "mutual information, normalised", curves, before)


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


def load(relative_ME: Tensor, names: Sequence[str]) -> Panel:
    title, experts = "load of experts, over the mean", range(relative_ME.shape[1])
    return partial(figures.draw_heat, title, relative_ME.numpy(), ("expert", experts), ("layer", names), vmin=0)


def load_over_time(run: Run, layer: int) -> Panel:
    iterations = figures.thinned_columns(list(run.loads))
    load = torch.stack([run.loads[i][layer] for i in iterations], dim=1).double()
    relative = (load / load.mean(dim=0).clamp_min(1e-12)).numpy()
    title = f"load of layer {run.names[layer]}, the least even, over the mean"
    columns, rows = ("iteration", iterations), ("expert", range(len(load)))
    return partial(figures.draw_heat, title, relative, columns, rows, vmin=0)


def flows(joint_EE: Tensor, chance_EE: Tensor, here: int, there: int) -> list[Panel]:
    """Where the tokens of the rows' experts go in the next layer; the same by chance."""
    from scipy.optimize import linear_sum_assignment

    # Columns in the order in which they follow the rows: a pathway is a bright diagonal.
    _, order = linear_sum_assignment(-joint_EE.numpy())
    shares = [x.double() / x.double().sum(dim=1, keepdim=True).clamp_min(1) for x in (joint_EE, chance_EE)]
    x, y = (f"expert of layer {there}, reordered", order), (f"expert of layer {here}", range(len(order)))
    tables, largest = [share[:, order].numpy() for share in shares], float(shares[0].max())
    titles = "probability of the next layer's expert", "the same, tokens shuffled"
    draw = partial(figures.draw_heat, vmin=0.0, vmax=largest)
    return [partial(draw, title, table, x, y) for title, table in zip(titles, tables)]


def coactivation(counts_EE: Tensor, layer: int) -> Panel:
    joint = counts_EE.double()
    load = joint.sum(dim=1)
    products = (load[:, None] * load).fill_diagonal_(0)  # no token has an expert twice
    expected = products * (joint.sum() / products.sum().clamp_min(1))
    lift = (joint / expected.clamp_min(1e-12)).fill_diagonal_(math.nan)
    experts = ("expert", range(len(joint)))
    return partial(figures.draw_heat, f"co-activation in layer {layer}", lift.numpy(), experts, experts, vmin=0)


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
