"""What a report shows of a run: sections of figures and tables, as far as there are data."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Optional

import torch

from megatron_moe_spec.metrics.information import normalized_mutual_information
from megatron_moe_spec.report import figures
from megatron_moe_spec.report.runs import AUXILIARY, TRAIN_LOSS, VALIDATION_LOSS, Run, final
from megatron_moe_spec.traces.counts import coactivation, loads, shuffled, transitions
from megatron_moe_spec.traces.schema import Trace

# (what the reader sees, series, digits)
ROWS = (
    ("load-balancing loss", "load_balancing_loss", 4),
    ("specialization loss", "specialization_loss", 5),
    ("coupling loss", "coupling_loss", 4),
    ("routing entropy of a token (nats)", "routing_entropy", 4),
    ("routing entropy over all tokens (nats)", "marginal_entropy", 4),
    ("probability of the chosen experts", "topk_mass", 4),
    ("expert overlap, mean abs(cos)", "mean_abs_cos", 4),
    ("expert overlap, largest abs(cos)", "max_abs_cos", 4),
    ("load imbalance, max / mean", "load_imbalance", 3),
    ("entropy of the next layer's expert given this one's (nats)", "conditional_entropy", 4),
    ("mutual information of adjacent layers, normalised", "normalized_mutual_information", 4),
    ("the same for shuffled tokens", "null_normalized_mutual_information", 4),
)
MORE_ROWS = (
    ("max violation of the load, of a step", "max_violation", 3),
    ("max violation of the load, of a micro-batch", "max_violation_micro_batch", 3),
    ("experts without a token", "dead_experts", 3),
    ("effective experts, share", "effective_experts", 3),
    ("router rows, mean abs(cos)", "router_mean_abs_cos", 4),
    ("router rows, largest abs(cos)", "router_max_abs_cos", 4),
)
LAYERED = {
    "Routing": (
        "Entropies fall as routing gets decisive. That of a token should fall, that over all tokens stay: then every "
        "expert is still in use.",
        ("routing_entropy", "marginal_entropy", "topk_mass"),
    ),
    "Balance": (
        "A violation of 1 is an expert with twice the mean load. Dead experts get no token in a whole step.",
        ("max_violation", "max_violation_micro_batch", "dead_experts", "effective_experts"),
    ),
    "Overlap of experts": (
        "Cosines between what the experts of one token compute: 0 is no overlap.",
        ("mean_abs_cos", "max_abs_cos"),
    ),
    "Pathways": (
        "Mutual information well above that of shuffled tokens: experts of adjacent layers follow each other.",
        ("conditional_entropy",),
    ),
    "Geometry of routers": (
        "Rows of a router's weight that point the same way choose the same tokens.",
        ("router_mean_abs_cos", "router_max_abs_cos"),
    ),
}
_TITLES = {name: title for title, name, _ in (*ROWS, *MORE_ROWS)}
_MOST_PAIRS = 4  # of layers, whose transitions are drawn
_TOKENS_TO_CHOOSE = 2**15  # by which they are chosen


@dataclass(frozen=True)
class Figure:
    """A figure.

    Attributes:
        name: of its file.
        alt: what it shows, in words.
        draw: makes it, by matplotlib.
        columns: of the page that it takes: "" (one), "two" or "wide" (all).
    """

    name: str
    alt: str
    draw: Callable[[], Any]
    columns: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page: a sentence that says what to look for, and then a table, text and figures."""

    title: str
    sentence: str
    figures: list[Figure] = field(default_factory=list)
    table: Sequence[Sequence[str]] = ()
    text: str = ""


def window_of(run: Run) -> int:
    """Number of iterations that final values are averaged over: a tenth of all, and at least one measurement."""
    measured = sorted({iteration for layers in run.layers.values() for one in layers.values() for iteration, _ in one})
    step = measured[-1] - measured[-2] if len(measured) > 1 else 1
    return max(1, step, math.ceil(run.last_iteration / 10))


def summary(run: Run, baseline: Optional[Run]) -> list[tuple[str, ...]]:
    """Rows of final values, with the baseline's and the change where there is one."""
    runs = [run] if baseline is None else [baseline, run]
    windows = [window_of(one) for one in runs]
    rows = []
    losses = [(name.replace("_", " "), name, 4) for name in AUXILIARY if name not in _TITLES]
    of_logs = [("training loss", TRAIN_LOSS, 4), ("validation loss", VALIDATION_LOSS, 4)]
    for title, name, digits in (*of_logs, *ROWS, *losses, *MORE_ROWS):
        values = [_final(one, name, window) for one, window in zip(runs, windows)]
        if values[-1] is None:
            continue
        cells = ["" if value is None else f"{value:.{digits}f}" for value in values]
        if baseline is not None:
            before, after = values
            cells.append(f"{(after - before) / abs(before):+.1%}" if before else "")
        rows.append((title, *cells))
    return rows


def _final(run: Run, name: str, window: int) -> Optional[float]:
    values = run.series.get(name)
    if not values:
        return None
    last, value = values[-1]  # of this measure: others may go on for longer
    return value if name == VALIDATION_LOSS else final(values, last, window)


def sections(run: Run, baseline: Optional[Run]) -> Iterator[Section]:
    """What there are data for, in the order of the page."""
    if overview := _overview(run, baseline):
        yield Section("Overview", "The same figures are below, one by one.", [overview])
    header = ("", "baseline", "this run", "change") if baseline is not None else ("", "this run")
    if rows := summary(run, baseline):
        yield Section(
            "Final values",
            f"Means over the last {window_of(run):,} of {run.last_iteration:,} iterations, and over layers or pairs of "
            "adjacent layers; of largest values the largest; of the validation loss the last.",
            table=[header, *rows],
        )
    if losses := [_curves(run, baseline, name) for name in (TRAIN_LOSS, VALIDATION_LOSS) if name in run.series]:
        yield Section("Training", "The loss of language modelling; it contains no auxiliary loss.", losses)
    auxiliary = [name for name in AUXILIARY if name in run.series]
    if auxiliary:
        yield Section(
            "Auxiliary losses",
            "Unscaled by their coefficients. They fall to some degree in any training: compare with a run without.",
            [_of_layers(run, baseline, name) for name in auxiliary],
        )
    for title, (sentence, names) in LAYERED.items():
        found = [_of_layers(run, baseline, name) for name in names if name in run.series]
        if title == "Balance":
            found += _loads(run)
        if title == "Pathways":
            found = [*_information(run, baseline), *found, *_transitions(run.trace)]
        if title == "Geometry of routers":
            found += _lists(run, baseline, "router_singular_values", "singular values of each router", "singular value")
        if found:
            yield Section(title, sentence, found)
        if title == "Overlap of experts":
            yield from _coactivation(run.trace)
    masses = _lists(run, baseline, "mass_of_best", "probability of a token's best experts", "experts used", first=1)
    if masses:
        yield Section(
            "Fewer experts",
            "How much of a token's routing probability its best experts carry: the more the first ones do, the less is "
            "left out where fewer experts serve than were trained.",
            masses,
            text=_fewer(run),
        )


def _title(name: str) -> str:
    return _TITLES.get(
        name, {TRAIN_LOSS: "training loss", VALIDATION_LOSS: "validation loss"}.get(name, name.replace("_", " "))
    )


def _series(run: Optional[Run], name: str):
    return run.series.get(name, []) if run is not None else []


def _curves(run: Run, baseline: Optional[Run], name: str) -> Figure:
    def draw():
        figure, (axis,) = figures.panels(1, 1)
        _draw_curve(axis, run, baseline, name)
        return figure

    return Figure(name, f"{_title(name)} over iterations", draw)


def _draw_curve(axis, run: Run, baseline: Optional[Run], name: str, label: str = "this run") -> None:
    figures.draw_curves(axis, _title(name), {label: run.series[name]}, {label: _series(baseline, name)})


def _of_layers(run: Run, baseline: Optional[Run], name: str) -> Figure:
    layers = run.layers.get(name, {})
    if len(layers) < 2:
        return _curves(run, baseline, name)

    many = len(layers) > figures.MOST_LINES

    def draw():
        figure, axes = figures.panels(1, 2 if many else 1)
        if many:
            _draw_curve(axes[0], run, baseline, name, "all layers")
            figures.draw_layers_as_heat(figure, axes[1], _title(name), layers)
        else:
            figures.draw_layers(axes[0], _title(name), layers, run.series[name], _series(baseline, name))
        return figure

    return Figure(name, f"{_title(name)} of each layer over iterations", draw, columns="two" if many else "")


def _draw_information(axis, run: Run, baseline: Optional[Run]) -> None:
    names = {
        "adjacent layers": "normalized_mutual_information",
        "shuffled tokens": "null_normalized_mutual_information",
    }
    curves, before = ({label: _series(one, name) for label, name in names.items()} for one in (run, baseline))
    figures.draw_curves(axis, "mutual information, normalised", curves, before)


def _information(run: Run, baseline: Optional[Run]) -> Iterator[Figure]:
    if "normalized_mutual_information" in run.series:

        def draw():
            figure, (axis,) = figures.panels(1, 1)
            _draw_information(axis, run, baseline)
            return figure

        yield Figure("mutual_information", "mutual information of adjacent layers, and of shuffled tokens", draw)


def _relative_loads(run: Run):
    """[M, E] load over its layer's mean, of the last tenth of measured steps, or of the trace; None without either."""
    if run.loads:
        measured = list(run.loads.values())
        load = torch.stack(measured[-math.ceil(len(measured) / 10) :]).double().sum(dim=0)
    elif run.trace is not None:
        load = loads(run.trace).double()
    else:
        return None
    return load / load.mean(dim=1, keepdim=True).clamp_min(1e-12)


def _draw_loads(figure, axis, run: Run) -> None:
    relative = _relative_loads(run)
    title, experts = "load of experts, over the mean", range(run.num_experts)
    figures.draw_heat(figure, axis, title, relative.numpy(), "expert", "layer", experts, run.names, smallest=0)


def _loads(run: Run) -> Iterator[Figure]:
    if _relative_loads(run) is None:
        return

    def draw():
        figure, (axis,) = figures.panels(1, 1)
        _draw_loads(figure, axis, run)
        return figure

    yield Figure("load", "load of each expert of each layer, over the layer's mean", draw)
    if len(run.loads) > 1:
        names, worst = run.names, int(_relative_loads(run).amax(dim=1).argmax())
        yield Figure(
            "load_over_time",
            f"load of the experts of layer {names[worst]} over iterations",
            partial(_draw_load_over_time, run, worst, names[worst]),
        )


def _draw_load_over_time(run: Run, layer: int, name: str):
    figure, (axis,) = figures.panels(1, 1)
    iterations = figures.thinned_columns(list(run.loads))
    load = torch.stack([run.loads[i][layer] for i in iterations], dim=1).double()
    relative = load / load.mean(dim=0).clamp_min(1e-12)
    title, experts = f"load of layer {name}, the least even, over the mean", range(run.num_experts)
    figures.draw_heat(figure, axis, title, relative.numpy(), "iteration", "expert", iterations, experts, smallest=0)
    return figure


def _transitions(trace: Optional[Trace]) -> Iterator[Figure]:
    """Of the pairs of layers with the strongest pathways, beside those of shuffled tokens."""
    if trace is None or len(trace.layers) < 2:
        return
    some = trace.experts_TMK[:: -(-len(trace.experts_TMK) // _TOKENS_TO_CHOOSE) or 1].unbind(dim=1)

    def strength(pair: int) -> float:
        joint = transitions(some[pair], some[pair + 1], trace.num_experts)
        return float(normalized_mutual_information(joint.double()))

    strongest = sorted(range(len(some) - 1), key=strength, reverse=True)
    layers, by_chance = trace.experts_TMK.unbind(dim=1), shuffled(trace).experts_TMK.unbind(dim=1)
    for pair in sorted(strongest[:_MOST_PAIRS]):
        here, there = trace.layers[pair : pair + 2]
        joint, chance = (transitions(of[pair], of[pair + 1], trace.num_experts) for of in (layers, by_chance))
        yield Figure(
            f"transitions_{here}_{there}",
            f"which experts of layer {there} follow those of layer {here}, and the same for shuffled tokens",
            partial(_draw_transitions, joint, chance, here, there),
            columns="two",
        )


def _draw_transitions(joint, chance, here: int, there: int):
    from scipy.optimize import linear_sum_assignment

    figure, axes = figures.panels(1, 2, height=4.4)
    # Columns in the order in which they follow the rows: a pathway is a bright diagonal.
    _, order = linear_sum_assignment(-joint.numpy())
    share = [x.double() / x.double().sum(dim=1, keepdim=True).clamp_min(1) for x in (joint, chance)]
    scale = {"smallest": 0.0, "largest": float(share[0].max())}
    x, y = f"expert of layer {there}, reordered", f"expert of layer {here}"
    for axis, table, title in zip(axes, share, ("probability of the next layer's expert", "the same, tokens shuffled")):
        figures.draw_heat(figure, axis, title, table[:, order].numpy(), x, y, order, range(len(order)), **scale)
    return figure


def _coactivation(trace: Optional[Trace]) -> Iterator[Section]:
    if trace is None or trace.experts_TMK.shape[2] < 2:
        return
    experts_MTK = trace.experts_TMK.unbind(dim=1)
    middle = len(trace.layers) // 2
    chosen = sorted({0, middle, len(trace.layers) - 1})
    drawn = [
        Figure(
            f"coactivation_{trace.layers[layer]}",
            f"how often two experts of layer {trace.layers[layer]} serve the same token",
            partial(_draw_coactivation, coactivation(experts_MTK[layer], trace.num_experts), trace.layers[layer]),
        )
        for layer in chosen
    ]
    sentence = "How often two experts serve the same token, over what their loads alone would give: 1 is chance."
    yield Section("Co-activation", sentence, drawn)


def _draw_coactivation(counts, layer: int):
    figure, (axis,) = figures.panels(1, 1, height=4.4)
    joint = counts.double()
    load = joint.sum(dim=1)
    products = (load[:, None] * load).fill_diagonal_(0)  # no token has an expert twice
    expected = products * (joint.sum() / products.sum().clamp_min(1))
    lift = (joint / expected.clamp_min(1e-12)).fill_diagonal_(math.nan)
    title, experts = f"co-activation in layer {layer}", range(len(counts))
    figures.draw_heat(figure, axis, title, lift.numpy(), "expert", "expert", experts, experts, smallest=0)
    return figure


def _lists(run: Run, baseline: Optional[Run], name: str, title: str, x: str, first: int = 0) -> list[Figure]:
    """A list of each layer, at the last measured step, as lines."""
    if name not in run.lists:
        return []

    def draw():
        figure, (axis,) = figures.panels(1, 1)
        layers = run.lists[name]
        for number, values in enumerate(layers.values()):
            points = [(first + i, value) for i, value in enumerate(values)]
            figures.curve(axis, points, "", figures.colour_of_layer(number, len(layers)), width=1.0)
        if baseline is not None and name in baseline.lists:
            others = list(baseline.lists[name].values())
            mean = [(first + i, sum(column) / len(column)) for i, column in enumerate(zip(*others))]
            figures.curve(axis, mean, "baseline, mean of layers", figures.BASELINE, dashed=True, width=2.0)
        figures.finish(axis, f"{title} (earlier layers darker)", x=x)
        return figure

    return [Figure(name, f"{title}, a line for each layer", draw)]


def _fewer(run: Run) -> str:
    shares = []
    for values in run.lists["mass_of_best"].values():
        if values[-1] > 0:
            shares.append([value / values[-1] for value in values])
    means = [sum(column) / len(column) for column in zip(*shares)]
    parts = [f"{count} of {len(means)} experts carry {share:.1%}" for count, share in enumerate(means[:-1], start=1)]
    return f"Of the probability of the chosen experts, in the mean of layers: {'; '.join(parts)}." if parts else ""


def _overview(run: Run, baseline: Optional[Run]) -> Optional[Figure]:
    """Up to six panels, of what there is."""
    loss = next((name for name in (VALIDATION_LOSS, TRAIN_LOSS) if name in run.series), None)
    auxiliary = [name for name in ("specialization_loss", "coupling_loss") if name in run.series]
    chosen: list[Callable[[Any, Any], None]] = [
        partial(_panel, run, baseline, name) for name in (loss, "mean_abs_cos", "routing_entropy") if name in run.series
    ]
    if auxiliary:
        chosen.insert(1 if loss else 0, lambda figure, axis: _draw_auxiliary(axis, run, baseline, auxiliary))
    if _relative_loads(run) is not None:
        chosen.append(lambda figure, axis: _draw_loads(figure, axis, run))
    if "normalized_mutual_information" in run.series:
        chosen.append(lambda figure, axis: _draw_information(axis, run, baseline))
    if len(chosen) < 2:
        return None

    def draw():
        figure, axes = figures.panels(-(-len(chosen) // 3), 3)
        for axis, one in zip(axes, chosen):
            one(figure, axis)
        for axis in axes[len(chosen) :]:
            axis.axis("off")
        return figure

    return Figure("overview", "losses, overlap, entropy, load and pathways at a glance", draw, columns="wide")


def _panel(run: Run, baseline: Optional[Run], name: str, figure, axis) -> None:
    _draw_curve(axis, run, baseline, name)


def _draw_auxiliary(axis, run: Run, baseline: Optional[Run], names: Sequence[str]) -> None:
    """Losses of unlike size in one panel: each over its first value in this run."""
    first = {name: abs(run.series[name][0][1]) or 1.0 for name in names}
    curves, before = (
        {_title(name): [(x, y / first[name]) for x, y in _series(one, name)] for name in names}
        for one in (run, baseline)
    )
    figures.draw_curves(axis, "auxiliary losses, over their first value", curves, before)
