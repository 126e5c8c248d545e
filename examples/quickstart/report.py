"""Write the report of a quickstart: ``report.md`` with a table, ``curves.png``, and ``report.html`` with the rest."""

import argparse
import json
import math
from pathlib import Path

from examples.quickstart.settings import ARMS, LOG_INTERVAL
from examples.quickstart.training import series_of, shown
from megatron_moe_spec.report import figures
from megatron_moe_spec.report import runs as results
from megatron_moe_spec.report.command import write_report
from megatron_moe_spec.report.table import ROWS

CURVES = (
    (f"training loss (means of {LOG_INTERVAL} steps)", results.TRAIN_LOSS),
    ("validation loss", results.VALIDATION_LOSS),
    ("specialization loss", "specialization_loss"),
    ("coupling loss", "coupling_loss"),
)


def last_steps(iterations):
    """Number of steps at the end that training values are averaged over: a tenth, and at least one measurement."""
    return max(LOG_INTERVAL, math.ceil(iterations / 10))


def table(runs, iterations):
    """Rows of (name, baseline, specialized, change), as text.

    Args:
        runs: {arm: series}, see ``training.series_of``.
        iterations: training steps of a run.
    """
    window = last_steps(iterations)
    baseline, specialized = (runs[arm] for arm in ARMS)

    def row(name, value_of, digits):
        values = [value_of(series) for series in (baseline, specialized)]
        if None in values:
            return None
        before, after = values
        change = f"{(after - before) / abs(before):+.1%}" if before else ""
        return (name, f"{before:.{digits}f}", f"{after:.{digits}f}", change)

    def validation(series):
        values = series.get(results.VALIDATION_LOSS)
        return values[-1][1] if values else None

    def perplexity(series):
        loss = validation(series)
        return None if loss is None else math.exp(loss)

    def step_time(series):
        seconds = results.median(series.get(results.STEP_TIME, []))
        return None if seconds is None else seconds * 1000

    rows = [
        row("validation loss (nats per byte)", validation, 4),
        row("validation perplexity", perplexity, 4),
        row("training loss", lambda series: results.final(series.get(results.TRAIN_LOSS, []), iterations, window), 4),
    ]
    for name, key, digits in ROWS:
        rows.append(row(name, lambda series: results.final(series.get(key, []), iterations, window), digits))
    rows.append(row("time of a step, median (ms)", step_time, 1))
    return [entry for entry in rows if entry]


def markdown_table(rows):
    header = ("", *ARMS, "change")
    lines = [header, ("---", "---:", "---:", "---:"), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def plain_table(rows):
    lines = [("", *ARMS, "change"), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        for line in lines
    )


def draw(runs, path):
    def drawn():
        figure, axes = figures.panels(2, 2)
        for axis, (title, key) in zip(axes, CURVES):
            for arm, colour in zip(ARMS, (figures.BASELINE, figures.COLOURS[1])):
                points = runs[arm].get(key, [])
                if key == results.TRAIN_LOSS:
                    points = figures.thinned(points, -(-len(points) // LOG_INTERVAL))
                figures.curve(axis, points, arm, colour)
            figures.finish(axis, title)
        return figure

    path.write_bytes(figures.picture(drawn))


def markdown(run, rows):
    """The whole report as Markdown."""
    losses = run["coefficients"]["specialized"]
    machine, versions = run["machine"], run["versions"]
    tokens = run["iterations"] * run["tokens_per_step"] / 1e6
    return f"""# Quickstart: a tiny MoE without and with the losses

Two runs with the same seed, data order and initial weights. `baseline` trains with the load-balancing loss only;
`specialized` adds the specialization loss with coefficient {losses["specialization"]:g} and the coupling loss with
coefficient {losses["coupling"]:g}. Both measure both losses.

{markdown_table(rows)}
Validation values are those at the last iteration; the others are means over the last {last_steps(run["iterations"])}
iterations (and over layers, or pairs of adjacent layers); times include what measuring costs.

![curves](curves.png)

- Model: 4 layers, each with a shared expert and 16 routed ones of which 2 serve a token; hidden size 64.
- Data: the Python standard library's sources as bytes; {run["iterations"]} steps of {run["tokens_per_step"]} tokens,
  {tokens:.2f} million in all; seed {run["seed"]}.
- Ran with {machine["loop"]}, {machine["processes"]} process(es), {machine["device"]}; {run["seconds"]} s for both runs.
- Versions: {", ".join(f"{name} {number}" for name, number in versions.items())}.

The paper's coefficients, 2e-3 and 1e-3, are meant for billions of tokens. A run this short shows the effect at ten
times these values, which is the default here. One seed and a model this small can show that the losses do what they
say, not what they are worth: judge small differences in validation loss by runs of your own size.
"""


def write(output):
    """Write the report into the quickstart's output folder and print the table."""
    output = Path(output)
    if not (output / "run.json").exists():
        raise SystemExit(f"No finished quickstart in {shown(output)}: run `make quickstart`.")
    run = json.loads((output / "run.json").read_text())
    runs = {arm: series_of(output / arm) for arm in ARMS}
    for arm, series in runs.items():
        if results.TRAIN_LOSS not in series:
            raise SystemExit(f"No training loss was found in {shown(output / arm)}: run `make quickstart` again.")
    rows = table(runs, run["iterations"])
    draw(runs, output / "curves.png")
    baseline, specialized = (output / arm for arm in ARMS)
    write_report(specialized, baseline, None, output / "report.html", force=True)
    (output / "report.md").write_text(markdown(run, rows))
    print(
        f"\n{plain_table(rows)}\n\nReport: {shown(output / 'report.md')}\nCurves: {shown(output / 'curves.png')}\n"
        f"Layers, experts, routing: {shown(output / 'report.html')}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", nargs="?", default="build/quickstart", help="default: %(default)s")
    write(parser.parse_args().output)
