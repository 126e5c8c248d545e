"""What a report shows of a run: sections of figures and tables, as far as there are data."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Optional

import torch
from torch import Tensor

from megatron_moe_spec.metrics import normalized_mutual_information
from megatron_moe_spec.report import figures
from megatron_moe_spec.report.figures import Figure, Panel
from megatron_moe_spec.report.runs import AUXILIARY, TRAIN_LOSS, VALIDATION_LOSS, Run
from megatron_moe_spec.report.sampling import evenly
from megatron_moe_spec.report.table import summary, title_of
from megatron_moe_spec.traces.counts import coactivation, loads, shuffled, transitions
from megatron_moe_spec.traces.schema import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
_MOST_PAIRS = 4  # of layers, whose transitions are drawn
_TOKENS_TO_CHOOSE = 2**15  # by which they are chosen


@dataclass(frozen=True)
class Section:
    """A part of the page: a sentence that says what to look for, and then a table, text and figures."""

    title: str
    sentence: str
    figures: list[Figure] = field(default_factory=list)
    table: Sequence[Sequence[str]] = ()
    text: str = ""


def sections(run: Run, baseline: Optional[Run]) -> Iterator[Section]:
    """What there are data for, in the order of the page."""
    before = baseline or Run(run.path)
    if overview := _overview(run, before):
        yield Section("Overview", "The same figures are below, one by one.", [overview])
    header = ("", "baseline", "this run", "change") if baseline is not None else ("", "this run")
    if rows := summary(run, baseline):
        yield Section(
            "Final values",
            f"Means over the last {run.window:,} of {run.last_iteration:,} iterations, and over layers or pairs of "
            "adjacent layers; of largest values the largest; of the validation loss the last.",
            table=[header, *rows],
        )
    if losses := [_of_layers(run, before, name) for name in (TRAIN_LOSS, VALIDATION_LOSS) if name in run.series]:
        yield Section("Training", "The loss of language modelling; it contains no auxiliary loss.", losses)
    if auxiliary := [_of_layers(run, before, name) for name in AUXILIARY if name in run.series]:
        yield Section(
            "Auxiliary losses",
            "Unscaled by their coefficients. They fall to some degree in any training: compare with a run without.",
            auxiliary,
        )
    for title, (sentence, names) in LAYERED.items():
        found = [_of_layers(run, before, name) for name in names if name in run.series]
        if title == "Balance":
            found += _loads(run)
        if title == "Pathways":
            if "normalized_mutual_information" in run.series:
                alt = "mutual information of adjacent layers, and of shuffled tokens"
                found.insert(0, Figure("mutual_information", alt, [_information(run, before)]))
            found += _transitions(run.trace)
        if title == "Geometry of routers":
            found += _lists(run, before, "router_singular_values", "singular values of each router", "singular value")
        if found:
            yield Section(title, sentence, found)
        if title == "Overlap of experts":
            yield from _coactivation(run.trace)
    if masses := _lists(run, before, "mass_of_best", "probability of a token's best experts", "experts used", first=1):
        yield Section(
            "Fewer experts",
            "How much of a token's routing probability its best experts carry: the more the first ones do, the less is "
            "left out where fewer experts serve than were trained.",
            masses,
            text=_fewer(run),
        )


def _curve(run: Run, baseline: Run, name: str, label: str = "this run") -> Panel:
    before = {label: baseline.series.get(name, [])}
    return partial(figures.draw_curves, title_of(name), {label: run.series[name]}, before)


def _of_layers(run: Run, baseline: Run, name: str) -> Figure:
    """A measure over iterations, of each layer if it has several: as lines, or of many as a heat map and their mean."""
    title, layers = title_of(name), run.layers.get(name, {})
    if len(layers) < 2:
        return Figure(name, f"{title} over iterations", [_curve(run, baseline, name)])
    drawn: list[Panel]
    if len(layers) > figures.MOST_LINES:
        drawn = [_curve(run, baseline, name, "all layers"), partial(figures.draw_layers_as_heat, title, layers)]
    else:
        drawn = [partial(figures.draw_layers, title, layers, run.series[name], baseline.series.get(name, []))]
    return Figure(name, f"{title} of each layer over iterations", drawn, columns=len(drawn))


def _information(run: Run, baseline: Run) -> Panel:
    names = {
        "adjacent layers": "normalized_mutual_information",
        "shuffled tokens": "null_normalized_mutual_information",
    }
    curves, before = ({label: one.series.get(name, []) for label, name in names.items()} for one in (run, baseline))
    return partial(figures.draw_curves, "mutual information, normalised", curves, before)


def _relative_loads(run: Run) -> Optional[Tensor]:
    """[M, E] load over its layer's mean, of the sample's last tenth of steps, or of the trace; None without either."""
    if run.loads:
        measured = list(run.loads.values())
        loads_ME = torch.stack(measured[-math.ceil(len(measured) / 10) :]).double().sum(dim=0)
    elif run.trace is not None:
        loads_ME = loads(run.trace).double()
    else:
        return None
    return loads_ME / loads_ME.mean(dim=1, keepdim=True).clamp_min(1e-12)


def _load(relative_ME: Tensor, names: Sequence[str]) -> Panel:
    title, experts = "load of experts, over the mean", range(relative_ME.shape[1])
    return partial(figures.draw_heat, title, relative_ME.numpy(), ("expert", experts), ("layer", names), vmin=0)


def _loads(run: Run) -> Iterator[Figure]:
    relative_ME = _relative_loads(run)
    if relative_ME is None:
        return
    alt = "load of each expert of each layer, over the layer's mean"
    yield Figure("load", alt, [_load(relative_ME, run.names)])
    if len(run.loads) > 1:
        worst = int(relative_ME.amax(dim=1).argmax())
        alt = f"load of the experts of layer {run.names[worst]} over iterations"
        iterations = evenly(list(run.loads), figures.MOST_COLUMNS)
        load = torch.stack([run.loads[i][worst] for i in iterations], dim=1).double()
        relative = (load / load.mean(dim=0).clamp_min(1e-12)).numpy()
        title = f"load of layer {run.names[worst]}, the least even, over the mean"
        columns, rows = ("iteration", iterations), ("expert", range(len(load)))
        yield Figure("load_over_time", alt, [partial(figures.draw_heat, title, relative, columns, rows, vmin=0)])


def _transitions(trace: Optional[Trace]) -> Iterator[Figure]:
    """Of the pairs of layers with the strongest pathways, next to those of shuffled tokens."""
    if trace is None or len(trace.layers) < 2:
        return
    some = trace.experts_TMK[:: -(-len(trace.experts_TMK) // _TOKENS_TO_CHOOSE) or 1].unbind(dim=1)

    def strength(pair: int) -> float:
        joint = transitions(some[pair], some[pair + 1], trace.num_experts)
        return float(normalized_mutual_information(joint.double()))

    strongest = sorted(range(len(some) - 1), key=strength, reverse=True)
    experts, by_chance = trace.experts_TMK.unbind(dim=1), shuffled(trace).experts_TMK.unbind(dim=1)
    for pair in sorted(strongest[:_MOST_PAIRS]):
        here, there = trace.layers[pair : pair + 2]
        joint, chance = (transitions(of[pair], of[pair + 1], trace.num_experts) for of in (experts, by_chance))
        alt = f"which experts of layer {there} follow those of layer {here}, and the same for shuffled tokens"
        drawn = _flows(joint, chance, here, there)
        yield Figure(f"transitions_{here}_{there}", alt, drawn, columns=2, height=4.4)


def _flows(joint_EE: Tensor, chance_EE: Tensor, here: int, there: int) -> list[Panel]:
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


def _coactivation(trace: Optional[Trace]) -> Iterator[Section]:
    if trace is None or trace.experts_TMK.shape[2] < 2:
        return
    drawn = []
    for index in sorted({0, len(trace.layers) // 2, len(trace.layers) - 1}):
        layer, counts_EE = trace.layers[index], coactivation(trace.experts_TMK[:, index], trace.num_experts)
        alt = f"how often two experts of layer {layer} serve the same token"
        drawn.append(Figure(f"coactivation_{layer}", alt, [lift(counts_EE, layer)], height=4.4))
    sentence = "How often two experts serve the same token, over what their loads alone would give: 1 is chance."
    yield Section("Co-activation", sentence, drawn)


def lift(counts_EE: Tensor, layer: int) -> Panel:
    joint = counts_EE.double()
    load = joint.sum(dim=1)
    products = (load[:, None] * load).fill_diagonal_(0)  # no token has an expert twice
    expected = products * (joint.sum() / products.sum().clamp_min(1))
    lift = (joint / expected.clamp_min(1e-12)).fill_diagonal_(math.nan)
    experts = ("expert", range(len(joint)))
    return partial(figures.draw_heat, f"co-activation in layer {layer}", lift.numpy(), experts, experts, vmin=0)


def _lists(run: Run, baseline: Run, name: str, title: str, x: str, first: int = 0) -> list[Figure]:
    """A list of each layer, at the last measured step, as a line from ``first``; the mean of the baseline's."""

    def draw(axis: "Axes") -> None:
        for index, ys in enumerate(layers):
            colour = figures.colour_of_layer(index, len(layers))
            figures.curve(axis, list(enumerate(ys, first)), "", colour, width=1.0)
        if before:
            points = list(enumerate((sum(column) / len(column) for column in zip(*before)), first))
            figures.curve(axis, points, "baseline, mean of layers", figures.BASELINE, dashed=True, width=2.0)
        figures.finish(axis, f"{title} (earlier layers darker)", x=x)

    layers, before = (list(one.lists.get(name, {}).values()) for one in (run, baseline))
    return [Figure(name, f"{title}, a line for each layer", [draw])] if layers else []


def _fewer(run: Run) -> str:
    masses = run.lists["mass_of_best"].values()
    shares = [[value / values[-1] for value in values] for values in masses if values[-1] > 0]
    means = [sum(column) / len(column) for column in zip(*shares)]
    parts = [f"{count} of {len(means)} experts carry {share:.1%}" for count, share in enumerate(means[:-1], start=1)]
    return f"Of the probability of the chosen experts, in the mean of layers: {'; '.join(parts)}." if parts else ""


def _auxiliary(run: Run, baseline: Run, names: Sequence[str]) -> Panel:
    """Losses of unlike size in one panel: each over its first value in this run."""
    first = {name: abs(run.series[name][0][1]) or 1.0 for name in names}
    curves, before = (
        {title_of(name): [(x, y / first[name]) for x, y in one.series.get(name, [])] for name in names}
        for one in (run, baseline)
    )
    return partial(figures.draw_curves, "auxiliary losses, over their first value", curves, before)


def _overview(run: Run, baseline: Run) -> Optional[Figure]:
    """Up to six panels, of what there is."""
    loss = [name for name in (VALIDATION_LOSS, TRAIN_LOSS) if name in run.series][:1]
    auxiliary = [name for name in ("specialization_loss", "coupling_loss") if name in run.series]
    measures = [name for name in ("mean_abs_cos", "routing_entropy") if name in run.series]
    chosen = [_curve(run, baseline, name) for name in (*loss, *measures)]
    if auxiliary:
        chosen.insert(len(loss), _auxiliary(run, baseline, auxiliary))
    if (relative_ME := _relative_loads(run)) is not None:
        chosen.append(_load(relative_ME, run.names))
    if "normalized_mutual_information" in run.series:
        chosen.append(_information(run, baseline))
    if len(chosen) < 2:
        return None
    return Figure("overview", "losses, overlap, entropy, load and pathways at a glance", chosen, columns=3)
