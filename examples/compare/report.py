"""Write the report of a comparison: ``report.md``, ``differences.png``, ``curves.png`` and ``runs.csv``."""

import argparse
import csv
import json
import math
import statistics
from pathlib import Path

from examples.compare import arms, runs
from examples.compare.paired import difference
from examples.quickstart.training import shown
from megatron_moe_spec.report import figures
from megatron_moe_spec.report import runs as results
from megatron_moe_spec.report.contents import ROWS

LOSS = results.VALIDATION_LOSS
MEASURES = (
    *ROWS,
    ("time of a step, median (ms)", results.STEP_TIME, 1),
    ("peak memory (MB)", runs.PEAK_MEMORY, 0),
)
CURVES = (
    ("validation loss minus the baseline's (nats)", LOSS),
    ("routing entropy of a token (nats)", "routing_entropy"),
    ("expert overlap, mean abs(cos)", "mean_abs_cos"),
    ("entropy of the next layer's expert given this one's (nats)", "conditional_entropy"),
    ("mutual information of adjacent layers, normalised", "normalized_mutual_information"),
    ("load imbalance, max / mean", "load_imbalance"),
)


def load(output, plan):
    """{arm: {seed: result}} of the finished final runs, and the scales they ran at."""
    sweep_seed, compared = plan["sweep_seed"], arms.selected(plan["arms"])
    scales = {} if sweep_seed is None else runs.chosen_scales(output, sweep_seed, compared)
    found = {arm.name: {} for arm in compared}
    for run in runs.final(plan["seeds"], scales, compared):
        result = runs.result_of(output, run)
        if result is not None:
            found[run.arm][run.seed] = result
    return found, scales


def values_of(by_seed, name):
    """{seed: value} of one measure, for the seeds that have it."""
    return {seed: result["values"][name] for seed, result in by_seed.items() if name in result["values"]}


def scaled(name, value):
    return value * 1000 if name == results.STEP_TIME else value


def losses_table(found, scales):
    """Markdown rows: each arm's validation loss and its paired difference from the baseline."""
    baseline = values_of(found[arms.BASELINE], LOSS)
    corrected = 1 - 0.05 / max(1, len(found) - 1)
    rows = [("", "coefficients", "validation loss", "difference, 95 % interval", "better seeds", "")]
    rows.append(("---", "---", "---:", "---:", "---:", "---"))
    for arm in arms.selected(found):
        values = values_of(found[arm.name], LOSS)
        weights = arms.coefficients(arm, scales)
        cells = [arm.title, ", ".join(f"{value:g}" for value in weights.values()), f"{mean(values):.4f}"]
        if arm.name == arms.BASELINE:
            cells += ["", "", ""]
        else:
            found_difference = difference(values, baseline)
            better = sum(value < 0 for value in found_difference.values)
            cells += [interval(found_difference), f"{better} of {len(found_difference.values)}"]
            cells.append(verdict(found_difference, difference(values, baseline, corrected)))
        rows.append(tuple(cells))
    return rows


def interval(found_difference):
    width = "" if found_difference.half_width == math.inf else f" ± {found_difference.half_width:.4f}"
    return f"{found_difference.mean:+.4f}{width}"


def verdict(found_difference, corrected):
    if found_difference.half_width == math.inf:
        return "one seed: cannot be told"
    if not found_difference.excludes_zero:
        return "no difference found"
    return "differs" if corrected.excludes_zero else "differs (not after correction)"


def measures_table(found):
    """Markdown rows: means over seeds; a star where the paired difference's interval excludes 0."""
    rows = [("", *found), ("---", *("---:" for _ in found))]
    for title, name, digits in MEASURES:
        baseline = values_of(found[arms.BASELINE], name)
        cells = []
        for arm in arms.selected(found):
            values = values_of(found[arm.name], name)
            if not values:
                cells.append("")
                continue
            if name == "coupling_loss" and arm.name == "coupling-pathway":
                cells.append(f"({mean(values):.{digits}f})")
                continue
            shared = arm.name != arms.BASELINE and values.keys() & baseline.keys()
            star = " *" if shared and difference(values, baseline).excludes_zero else ""
            cells.append(f"{scaled(name, mean(values)):.{digits}f}{star}")
        if any(cells):
            rows.append((title, *cells))
    return rows


def sweep_table(output, plan, scales):
    """Markdown rows: what each multiple of the papers' coefficients gave on the sweep's seed."""
    baseline = runs.result_of(output, runs.Run(arms.BASELINE, 1, plan["sweep_seed"]))["values"][LOSS]
    rows = [("", "coefficients", "validation loss", "minus the baseline's", ""), ("---", "---", "---:", "---:", "---")]
    rows.append((arms.BY_NAME[arms.BASELINE].title, "", f"{baseline:.4f}", "", ""))
    for arm in arms.selected(plan["arms"]):
        for scale in arm.scales:
            loss = runs.result_of(output, runs.Run(arm.name, scale, plan["sweep_seed"]))["values"][LOSS]
            weights = ", ".join(f"{value:g}" for value in arms.coefficients(arm, {arm.name: scale}).values())
            chosen = "chosen" if scales[arm.name] == scale else ""
            rows.append((arm.title, weights, f"{loss:.4f}", f"{loss - baseline:+.4f}", chosen))
    return rows


def write_runs(output, plan, found, scales, path):
    """One line a run, the sweep's first: arm, multiple of the papers' coefficients, seed, and all measured values."""
    swept = []
    if plan["sweep_seed"] is not None:
        swept = runs.sweep(plan["sweep_seed"], arms.selected(plan["arms"]))
    wanted = [*swept, *runs.final(plan["seeds"], scales, arms.selected(found))]
    results_of_runs = [runs.result_of(output, run) for run in wanted]
    names = sorted({name for result in results_of_runs for name in result["values"]})
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["arm", "multiple", "seed", *names, "seconds"])
        for run, result in zip(wanted, results_of_runs):
            values = [f"{result['values'][name]:.6g}" if name in result["values"] else "" for name in names]
            table.writerow([run.arm, f"{run.scale:g}", run.seed, *values, f"{result['seconds']:.0f}"])


def mean(values):
    return statistics.fmean(values.values())


def markdown(rows):
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def draw_differences(found, path):
    """Each arm's paired differences in validation loss: one dot a seed, and the interval of their mean."""
    pyplot = figures.pyplot()
    baseline = values_of(found[arms.BASELINE], LOSS)
    others = [arm for arm in arms.selected(found) if arm.name != arms.BASELINE]
    figure, axis = pyplot.subplots(figsize=(8, 0.55 * len(others) + 1.2), constrained_layout=True)
    for height, arm in enumerate(reversed(others)):
        found_difference = difference(values_of(found[arm.name], LOSS), baseline)
        if len(found_difference.values) > 1:
            axis.errorbar(
                found_difference.mean, height, xerr=found_difference.half_width, fmt="s", color="#c8102e", capsize=4
            )
        axis.plot(found_difference.values, [height] * len(found_difference.values), "o", color="#555555", alpha=0.6)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(others)), [arm.title for arm in reversed(others)])
    axis.set_xlabel("validation loss minus the baseline's of the same seed\n(nats; less is better)")
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_curves(found, path):
    """Means over seeds, over the course of training."""
    pyplot = figures.pyplot()
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8), constrained_layout=True)
    for axis, (title, name) in zip(axes.flat, CURVES):
        reference = dict(mean_curve(found[arms.BASELINE], name)) if name == LOSS else {}
        for number, arm in enumerate(arms.selected(found)):
            points = [(x, y - reference.get(x, 0.0)) for x, y in mean_curve(found[arm.name], name)]
            is_baseline = arm.name == arms.BASELINE
            figures.curve(axis, points, arm.name, "black" if is_baseline else f"C{number}", dashed=is_baseline)
        figures.finish(axis, title, legend=False)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(found))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def mean_curve(by_seed, name):
    """(iteration, mean over seeds) at the iterations that all seeds have."""
    curves = [dict(result["series"].get(name, [])) for result in by_seed.values()]
    shared = set.intersection(*(set(curve) for curve in curves)) if curves else set()
    return [(x, statistics.fmean(curve[x] for curve in curves)) for x in sorted(shared)]


def text(plan, found, scales, sweep_rows):
    """The whole report as Markdown."""
    machine, seeds = plan["machine"], plan["seeds"]
    tokens = plan["iterations"] * plan["tokens_per_step"] / 1e6
    baseline = values_of(found[arms.BASELINE], LOSS)
    others = [difference(values_of(found[name], LOSS), baseline) for name in found if name != arms.BASELINE]
    seconds = sum(result["seconds"] for by_seed in found.values() for result in by_seed.values())
    spread = f"{max(baseline.values()) - min(baseline.values()):.4f}"
    half_width = statistics.median(found_difference.half_width for found_difference in others)
    if len(seeds) > 1:
        resolution = (
            f"by more than about {half_width:.4f} nats: half the width of the median interval. The\n"
            f"  baseline's own seeds are {spread} nats apart."
        )
    else:
        resolution = "by much; with one seed\n  there is no telling how much of a difference is chance."
    control = ""
    if arms.CONTROL in found:
        control = """
- Two runs that differ by rounding alone drift apart. The control arm shows by how much: its weight is too small to
  have any other effect."""
    sweep = ""
    if sweep_rows:
        sweep = f"""
## How the coefficients were chosen

Multiples of each paper's coefficients, one run each with seed {plan["sweep_seed"]}, which the comparison does not use.
The one with the lowest validation loss was taken, though one seed often cannot tell it from the next.

{markdown(sweep_rows)}"""
    return f"""# Specialization losses compared

Each arm adds its losses to the load-balancing loss (coefficient 1e-2). All arms ran with the seeds
{", ".join(map(str, seeds))}; with the same seed, they share initial weights and the order of the data, so differences
are taken seed by seed.

{markdown(losses_table(found, scales))}
Validation loss in nats per byte at the last iteration, mean over seeds; differences are arm minus baseline, with
Student's t intervals. One interval of twenty excludes 0 by chance; "after correction": with intervals widened for
{len(others)} comparison(s) (Bonferroni).

![paired differences in validation loss](differences.png)

## What the losses did

{markdown(measures_table(found))}
Means over seeds and over the last tenth of training, and over layers or pairs of adjacent layers; a star where the 95 %
interval of the paired difference from the baseline excludes 0. The coupling loss is that of type mass, but for the
value in parentheses, of type pathway, which cannot be compared with the others. Step times include the measuring and
what else ran on the machine ({plan["workers"]} run(s) at a time).

![training curves, means over seeds](curves.png)
{sweep}
## What this can show, and what it cannot

- It can show what each loss does to routing and to experts, and whether it changes the validation loss of this model
  within {tokens:.2g} million tokens {resolution}{control}
- All differences are from the same runs of the baseline, so they are not independent of each other.
- "No difference found" is not "no difference": a smaller one stays unseen.
- It cannot show what a loss is worth at scale. The model is tiny, the training is short, the text is source code, and
  routing has hardly settled; the papers report gains after billions of tokens. Coefficients that win here need not
  win there.
- Learning rate, balancing and schedule were not tuned for any arm.

## How it was made

- Model: {plan["shape"]}.
- Data: the Python standard library's sources as bytes; {plan["iterations"]} steps of {plan["tokens_per_step"]} tokens.
- Ran with {machine["loop"]}, {machine["device"]}, one process a run; {seconds / 60:.0f} minutes of runs in the
  comparison.
- All values of all runs: [runs.csv](runs.csv).
- Versions: {", ".join(f"{name} {number}" for name, number in plan["versions"].items())}.
"""


def write(output):
    """Write the report and its pictures into the comparison's output folder.

    Raises:
        SystemExit: an arm has no finished run yet.
    """
    output = Path(output)
    if not (output / "plan.json").exists():
        raise SystemExit(f"No comparison in {shown(output)}: run `make compare`.")
    plan = json.loads((output / "plan.json").read_text())
    found, scales = load(output, plan)
    shared = set.intersection(*(set(by_seed) for by_seed in found.values()))
    if not shared:
        raise SystemExit(f"No seed has run in every arm yet in {shown(output)}: run `make compare` again to go on.")
    # A seed that some arms lack would shift means, not differences.
    found = {name: {seed: by_seed[seed] for seed in sorted(shared)} for name, by_seed in found.items()}
    plan["seeds"] = sorted(shared)
    sweep_rows = [] if plan["sweep_seed"] is None else sweep_table(output, plan, scales)
    draw_differences(found, output / "differences.png")
    draw_curves(found, output / "curves.png")
    write_runs(output, plan, found, scales, output / "runs.csv")
    (output / "report.md").write_text(text(plan, found, scales, sweep_rows))
    print(f"\n{markdown(losses_table(found, scales))}\nReport: {shown(output / 'report.md')}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", nargs="?", default="build/compare", help="default: %(default)s")
    write(parser.parse_args().output)
