"""What a report shows of a run: sections of figures and tables, as far as there are data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Optional

from megatron_moe_spec.metrics import normalized_mutual_information
from megatron_moe_spec.report import panels
from megatron_moe_spec.report.figures import Figure
from megatron_moe_spec.report.runs import AUXILIARY, TRAIN_LOSS, VALIDATION_LOSS, Run
from megatron_moe_spec.report.table import summary, title_of, window_of
from megatron_moe_spec.traces.counts import coactivation, shuffled, transitions
from megatron_moe_spec.traces.schema import Trace

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
            f"Means over the last {window_of(run):,} of {run.last_iteration:,} iterations, and over layers or pairs of "
            "adjacent layers; of largest values the largest; of the validation loss the last.",
            table=[header, *rows],
        )
    if losses := [_curves(run, before, name) for name in (TRAIN_LOSS, VALIDATION_LOSS) if name in run.series]:
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
            found = [*_information(run, before), *found, *_transitions(run.trace)]
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


def _curves(run: Run, baseline: Run, name: str) -> Figure:
    return Figure(name, f"{title_of(name)} over iterations", [panels.curve(run, baseline, name)])


def _of_layers(run: Run, baseline: Run, name: str) -> Figure:
    if len(run.layers.get(name, {})) < 2:
        return _curves(run, baseline, name)
    drawn = panels.layers(run, baseline, name)
    return Figure(name, f"{title_of(name)} of each layer over iterations", drawn, columns=len(drawn))


def _information(run: Run, baseline: Run) -> Iterator[Figure]:
    if "normalized_mutual_information" in run.series:
        alt = "mutual information of adjacent layers, and of shuffled tokens"
        yield Figure("mutual_information", alt, [panels.information(run, baseline)])


def _loads(run: Run) -> Iterator[Figure]:
    relative_ME = panels.relative_loads(run)
    if relative_ME is None:
        return
    alt = "load of each expert of each layer, over the layer's mean"
    yield Figure("load", alt, [panels.load(relative_ME, run.names)])
    if len(run.loads) > 1:
        worst = int(relative_ME.amax(dim=1).argmax())
        alt = f"load of the experts of layer {run.names[worst]} over iterations"
        yield Figure("load_over_time", alt, [panels.load_over_time(run, worst)])


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
        drawn = panels.flows(joint, chance, here, there)
        yield Figure(f"transitions_{here}_{there}", alt, drawn, columns=2, height=4.4)


def _coactivation(trace: Optional[Trace]) -> Iterator[Section]:
    if trace is None or trace.experts_TMK.shape[2] < 2:
        return
    drawn = []
    for index in sorted({0, len(trace.layers) // 2, len(trace.layers) - 1}):
        layer, counts_EE = trace.layers[index], coactivation(trace.experts_TMK[:, index], trace.num_experts)
        alt = f"how often two experts of layer {layer} serve the same token"
        drawn.append(Figure(f"coactivation_{layer}", alt, [panels.coactivation(counts_EE, layer)], height=4.4))
    sentence = "How often two experts serve the same token, over what their loads alone would give: 1 is chance."
    yield Section("Co-activation", sentence, drawn)


def _lists(run: Run, baseline: Run, name: str, title: str, x: str, first: int = 0) -> list[Figure]:
    """A list of each layer, at the last measured step, as lines."""
    if name not in run.lists:
        return []
    panel = partial(panels.lists, run, baseline, name, title, x, first)
    return [Figure(name, f"{title}, a line for each layer", [panel])]


def _fewer(run: Run) -> str:
    shares = []
    for values in run.lists["mass_of_best"].values():
        if values[-1] > 0:
            shares.append([value / values[-1] for value in values])
    means = [sum(column) / len(column) for column in zip(*shares)]
    parts = [f"{count} of {len(means)} experts carry {share:.1%}" for count, share in enumerate(means[:-1], start=1)]
    return f"Of the probability of the chosen experts, in the mean of layers: {'; '.join(parts)}." if parts else ""


def _overview(run: Run, baseline: Run) -> Optional[Figure]:
    """Up to six panels, of what there is."""
    loss = [name for name in (VALIDATION_LOSS, TRAIN_LOSS) if name in run.series][:1]
    auxiliary = [name for name in ("specialization_loss", "coupling_loss") if name in run.series]
    measures = [name for name in ("mean_abs_cos", "routing_entropy") if name in run.series]
    chosen = [panels.curve(run, baseline, name) for name in (*loss, *measures)]
    if auxiliary:
        chosen.insert(len(loss), panels.auxiliary(run, baseline, auxiliary))
    if (relative_ME := panels.relative_loads(run)) is not None:
        chosen.append(panels.load(relative_ME, run.names))
    if "normalized_mutual_information" in run.series:
        chosen.append(panels.information(run, baseline))
    if len(chosen) < 2:
        return None
    return Figure("overview", "losses, overlap, entropy, load and pathways at a glance", chosen, columns=3)
