"""The command line: python -m megatron_moe_spec.report RUN."""

import argparse
import os
import sys
from pathlib import Path
from typing import Optional

from megatron_moe_spec.report import figures
from megatron_moe_spec.report.contents import sections
from megatron_moe_spec.report.measurements import MOST_STEPS
from megatron_moe_spec.report.page import page
from megatron_moe_spec.report.runs import Run, RunError, find_traces, read_run, same_model

_DESCRIPTION = """\
Writes a report of a training run, one HTML page and a folder of its figures as PNG: from moe_spec_metrics.jsonl,
TensorBoard events and routing traces, whichever there are."""


def main(argv: Optional[list[str]] = None) -> int:
    """Runs the command; returns the exit status, 2 for bad input."""
    parser = argparse.ArgumentParser("python -m megatron_moe_spec.report", description=_DESCRIPTION)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of the run, or its moe_spec_metrics.jsonl")
    parser.add_argument("--baseline", metavar="RUN2", type=Path, help="another run, to compare with")
    parser.add_argument("--traces", metavar="TRACE", type=Path, help="routing trace; default: the one in RUN, if any")
    parser.add_argument("--num-experts", metavar="N", type=int, help="of a layer, for a trace that does not say")
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("report.html"), help="default: report.html")
    parser.add_argument("--force", action="store_true", help="replace FILE and its figures")
    args = parser.parse_args(argv)
    try:
        write_report(args.run, args.baseline, args.traces, args.out, args.force, args.num_experts)
    except ModuleNotFoundError as error:
        library = (error.name or "").split(".")[0]
        if library not in ("matplotlib", "scipy", "tensorboard", "numpy"):
            raise
        remedy = "install it, or this package with its extra: pip install -e '.[report]'"
        problem = f"reports need {library}: {remedy}"
    except (ValueError, OSError) as error:
        problem = str(error)
    else:
        print(f"Wrote {args.out}, and its figures to {_figures_folder(args.out)}")
        return 0
    print(f"megatron_moe_spec.report: {problem}", file=sys.stderr)
    return 2


def write_report(
    path: Path,
    baseline: Optional[Path],
    traces: Optional[Path],
    out: Path,
    force: bool = False,
    num_experts: Optional[int] = None,
) -> None:
    """Writes the page ``out`` and the folder of figures next to it; the arguments are those of the command line.

    Raises:
        ValueError: a run or trace cannot be read, the two are of different models, or ``out`` cannot be written.
        ModuleNotFoundError: a library is missing.
    """
    if out.suffix != ".html":
        raise ValueError(f"--out {out}: name a file that ends in .html")
    folder = _figures_folder(out)
    if not force and (out.exists() or folder.exists()):
        raise ValueError(f"--out {out} or its figures, {folder}, exist: name another file, or give --force")
    if not path.exists():
        raise RunError(f"{path} does not exist")
    figures.pyplot()
    run = read_run(path, traces or find_traces(path), num_experts)
    other = None
    if baseline is not None:
        if not baseline.exists():
            raise RunError(f"--baseline {baseline} does not exist")
        other = read_run(baseline)
        if not same_model(run, other):
            raise RunError(f"{baseline} has {other.model}, {path} {run.model}: name a baseline of the same model")
    found = list(sections(run, other))
    pictures = {figure.name: figures.pictures(figure.draw) for section in found for figure in section.figures}
    text = page(f"Experts and routing of {path}", _facts(run, other), run.notices, found, pictures)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.png"):
        stale.unlink()
    for name, (light, _) in pictures.items():
        (folder / f"{name}.png").write_bytes(light)
    unfinished = out.with_name(f".{out.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, out)


def _figures_folder(out: Path) -> Path:
    return out.with_name(f"{out.stem}_figures")


def _facts(run: Run, baseline: Optional[Run]) -> list[str]:
    facts = [f"Read: {', '.join(map(str, run.sources))}"]
    if baseline is not None:
        facts.append(f"Baseline (dashed): {', '.join(map(str, baseline.sources))}")
    if run.names:
        facts.append(run.model)
    if run.last_iteration:
        measured = len(run.measured_iterations)
        facts.append(f"{run.last_iteration:,} iterations, of which routing was measured in {measured:,}")
        if measured > MOST_STEPS:
            facts.append(
                f"What was measured of the layers is shown by a sample: {MOST_STEPS:,} of {measured:,} steps, at even "
                f"distances. Losses are of every step; final values are of all of the last {run.window:,} iterations"
            )
    if run.trace is not None:
        tokens, layers, top_k = run.trace.experts_TMK.shape
        dropped = int((run.trace.experts_TMK < 0).sum())
        facts.append(
            f"Routing of {tokens:,} tokens in {layers} layers, {top_k} experts each: {dropped:,} places dropped, "
            f"{run.trace.num_padding:,} tokens of padding left out"
        )
    return facts
