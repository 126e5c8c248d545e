"""Write what an experiment found: ``report.md`` and ``differences.png``, from its ``runs.csv``.

``python -m examples.compare.report [FOLDER ...]`` writes those of other folders anew, or those of docs/evidence with a
picture of them all.
"""

import json
import math
import statistics
import sys
from pathlib import Path

from examples.compare.experiments import EXPERIMENTS, INFERENCE, VALIDATION_LOSS, Experiment, Hypothesis
from examples.compare.paired import Difference, family
from examples.compare.table import Table
from examples.quickstart.training import ROOT, shown
from megatron_moe_spec.report import figures
from megatron_moe_spec.report.table import ROWS

EVIDENCE = ROOT / "docs/evidence"
ALPHA = 0.05

# (title, measure, digits)
MEASURES = (
    ("validation loss (nats a byte)", VALIDATION_LOSS, 4),
    *((f"cost of {k} expert(s) a token (nats a byte)", f"cost_of_{k}_experts", 4) for k in (3, 2, 1)),
    ("next layer's experts predicted", "next_layer_hits", 3),
    ("the same, tokens shuffled", "next_layer_hits_of_shuffled", 3),
    ("hits of an LRU cache", "lru_hits", 3),
    ("hits of an LFU cache", "lfu_hits", 3),
    ("devices a token, of 4", "devices_a_token", 3),
    ("experts and domains, mutual information", "domain_information", 4),
    ("tokens at their cluster's expert", "matched_tokens", 3),
    *ROWS,
    ("load imbalance on held-out text, max / mean", "held_out_load_imbalance", 3),
)
TITLES = {name: (title, digits) for title, name, digits in MEASURES}


def write(experiment: Experiment, table: Table, output: Path) -> None:
    """Writes the report and its picture beside the table, and prints the tables of tests."""
    if not table.rows:
        print("No run has finished yet")
        return
    families = judged(experiment, table)
    if families:
        draw(experiment, families, output / "differences.png")
    settings = json.loads((output / "settings.json").read_text())
    (output / "report.md").write_text(text(experiment, table, families, settings))
    for title, found in families.items():
        print(f"\n{title}\n\n{markdown(tests(experiment, found))}")
    print(f"Report: {shown(output / 'report.md')}")


def judged(experiment: Experiment, table: Table) -> dict:
    """{title: differences} of the families that have any."""
    found = {title: family(table, hypotheses) for title, hypotheses in experiment.families.items()}
    return {title: differences for title, differences in found.items() if differences}


def text(experiment: Experiment, table: Table, families: dict, settings: dict) -> str:
    """The whole report as Markdown."""
    expected = len(experiment.all_arms) * len(experiment.seeds)
    state = "all" if len(table.rows) >= expected else f"**a part: {len(table.rows)}**"
    versions = ", ".join(f"{name} {number}" for name, number in settings["versions"].items())
    sections = "\n".join(f"## {title}\n\n{markdown(tests(experiment, found))}" for title, found in families.items())
    if is_complete(experiment, INFERENCE, families.get(INFERENCE, [])):
        sections += f"\n{within_bound(experiment, table, families[INFERENCE])}\n"
    return f"""# {experiment.title}

Differences are of the same seed, arm minus the one that it is compared with: mean, Student's 95 % interval, and in how
many seeds the arm's value is lower; p of the paired t test, the same after Holm's correction over the family, and p of
Wilcoxon's test. Bold: found, at {ALPHA} after the correction, once all {len(experiment.seeds)} seeds have run. The
hypotheses were written before the runs: [protocol](../protocol.md). This report is of {state} of {expected} runs.

![every seed's difference, and the intervals](differences.png)

{sections}
## What was measured

{markdown(means(experiment, table))}
Means over seeds. Every value of every run: [runs.csv](runs.csv). Times and memory in it depend on how
a run was started, and on what else the machine did.

## How it was made

- Model: {experiment.shape}.
- Training: {experiment.iterations} steps of {experiment.batch_size} sequences; {settings["machine"]["loop"]},
  {settings["machine"]["device"]}, one process a run.
- Versions: {versions}.
- One line of it: `make compare COMPARE_ARGS="--experiment {settings["experiment"]} --arms {example_arm(experiment)}"`
"""


def within_bound(experiment: Experiment, table: Table, found: list) -> str:
    """Which arms of a family gain without a loss in validation."""
    arms = dict.fromkeys(one.hypothesis.arm for one in found)
    losses = [one for name in arms for one in family(table, [Hypothesis(name)])]
    said = [
        f"{one.hypothesis.arm} {one.high:+.4f} ({'counts' if one.high < experiment.bound else 'does not count'})"
        for one in losses
    ]
    return (
        f"A gain counts where the 95 % interval of the arm's difference in validation loss ends below "
        f"{experiment.bound:+g}. It ends at: {', '.join(said)}."
    )


def example_arm(experiment: Experiment) -> str:
    """An arm to name in an example."""
    return next(iter(experiment.families.values()))[0].arm


def tests(experiment: Experiment, found: list) -> list:
    """Rows of a family."""
    titles = {one.name: one.title for one in experiment.all_arms}
    rows = [
        ("arm", "measure", "against", "arm's", "difference, 95 %", "lower in", "p", "Holm", "Wilcoxon"),
        ("---",) * 9,
    ]
    for one in found:
        title, digits = TITLES[one.hypothesis.measure]
        values = [f"{statistics.fmean(values):.{digits}f}" for values in (one.theirs, one.ours)]
        bold = "**" if is_found(experiment, one) else ""
        cells = [titles[one.hypothesis.arm], title, *values, f"{bold}{interval(one, digits)}{bold}"]
        cells += [f"{one.lower} of {len(one.values)}", *map(probability, (one.p, one.corrected, one.signed_rank))]
        rows.append(tuple(cells))
    return rows


def is_found(experiment: Experiment, one: Difference) -> bool:
    """Whether a difference is told from chance; before all seeds have run, none is."""
    return has_all_seeds(experiment, one) and one.corrected < ALPHA


def has_all_seeds(experiment: Experiment, one: Difference) -> bool:
    return len(one.values) == len(experiment.seeds)


def interval(one: Difference, digits: int) -> str:
    width = "" if math.isinf(one.high) else f" ± {(one.high - one.low) / 2:.{digits}f}"
    return f"{one.mean:+.{digits}f}{width}"


def probability(p: float) -> str:
    return "" if math.isnan(p) else "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def means(experiment: Experiment, table: Table) -> list:
    """Rows of arms, columns of measures that any run has."""
    arms = [one for one in experiment.all_arms if any(name == one.name for name, _ in table.rows)]
    measures = [row for row in MEASURES if any(table.of(one.name, row[1]) for one in arms)]
    rows = [("", *(title for title, _, _ in measures)), ("---", *("---:" for _ in measures))]
    for one in arms:
        values = [(table.of(one.name, name), digits) for _, name, digits in measures]
        rows.append((one.name, *(f"{statistics.fmean(v.values()):.{digits}f}" if v else "" for v, digits in values)))
    return rows


def markdown(rows: list) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def draw(experiment: Experiment, families: dict, path: Path) -> None:
    """Draws a panel for each measure of each family."""
    titles = {one.name: one.title for one in experiment.all_arms}
    panels = [
        (experiment, title.partition(":")[0], measure, [(titles[one.hypothesis.arm], one) for one in found])
        for title, differences in families.items()
        for measure, found in by_measure(differences)
    ]
    save(panels, 1, path)


def summary(tables: dict, path: Path) -> None:
    """Draws what the README shows: every hypothesis whose family has run; validation losses first, a measure a panel.

    Args:
        tables: name of an experiment -> its table.
    """
    panels = []
    for name, table in tables.items():
        experiment = EXPERIMENTS[name]
        families = judged(experiment, table).items()
        complete = [one for title, found in families if is_complete(experiment, title, found) for one in found]
        for measure, found in by_measure(complete):
            panels.append((experiment, experiment.title, measure, [(one.hypothesis.arm, one) for one in found]))
    panels.sort(key=lambda panel: (panel[2] != "validation_loss", -len(panel[3])))
    save(panels, 2, path)


def is_complete(experiment: Experiment, title: str, found: list) -> bool:
    """Whether all hypotheses of a family have all their seeds."""
    expected = len(experiment.families.get(title, ()))
    return 0 < expected == len(found) and all(has_all_seeds(experiment, one) for one in found)


def by_measure(found: list) -> list:
    """(measure, its differences) of a family."""
    measures = dict.fromkeys(one.hypothesis.measure for one in found)
    return [(measure, [one for one in found if one.hypothesis.measure == measure]) for measure in measures]


def save(panels: list, columns: int, path: Path) -> None:
    """Saves a picture of panels: (experiment, title, measure, [(name, difference), ...])."""
    heights = [max(len(named) for *_, named in panels[i : i + columns]) + 1 for i in range(0, len(panels), columns)]
    pyplot = figures.pyplot()
    figure, axes = pyplot.subplots(
        len(heights),
        columns,
        figsize=(2 + 6 * columns, sum(0.4 * height + 0.7 for height in heights)),
        height_ratios=heights,
        squeeze=False,
        constrained_layout=True,
    )
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, one in zip(axes.flat, panels):
        panel(axis, *one)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def panel(axis, experiment: Experiment, title: str, measure: str, named: list) -> None:
    """A row for each (name, difference), the first on top: a dot for each seed's, and the interval of their mean."""
    axis.set_title(title, loc="left", fontsize="medium")
    axis.set_xlabel(f"{TITLES[measure][0]}: difference in the same seed", loc="right")
    axis.locator_params(axis="x", nbins=5)
    for height, (_, one) in enumerate(reversed(named)):
        if not math.isinf(one.high):
            color = "#c8102e" if is_found(experiment, one) else "#999999"
            axis.errorbar(one.mean, height, xerr=one.high - one.mean, fmt="s", color=color, capsize=4)
        axis.plot(one.values, [height] * len(one.values), "o", color="#333333", alpha=0.45, markersize=4)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(named)), [name for name, _ in reversed(named)])
    axis.set_ylim(-0.6, len(named) - 0.4)
    axis.grid(axis="x", alpha=0.3)


def main(folders: list) -> None:
    tables = {}
    for folder in map(Path, folders or [EVIDENCE / name for name in EXPERIMENTS if (EVIDENCE / name).exists()]):
        name = json.loads((folder / "settings.json").read_text())["experiment"]
        tables[name] = Table(folder / "runs.csv")
        write(EXPERIMENTS[name], tables[name], folder.resolve())
    if not folders:
        summary(tables, EVIDENCE / "summary.png")


if __name__ == "__main__":
    main(sys.argv[1:])
