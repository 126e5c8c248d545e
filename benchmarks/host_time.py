"""Host time that the losses add to an MoE layer, without a GPU: on Megatron's own layers and Triton's own launches.

    python benchmarks/host_time.py [--cases EP1:128/8,EP2:8/2] [--seconds 20] [--root CHECKOUT] [--json FILE]

Tensors are tiny and in the host's memory, and kernels are launched on a CUDA driver that does nothing (null_driver), so
all that is left is the time to prepare and launch: what limits a step whose kernels are short. In a case's process, a
model for each variant runs a micro-batch, forward and backward, in turns and in random order. The table has
microseconds for each layer and micro-batch, of the thread's CPU time and of wall time: the median of "none", and of the
others the median (quartiles) of their differences from "none" in the same turn. Against a GPU run, Megatron's compiled
functions run uncompiled (SwiGLU), collectives return at once, and an operation of torch computes 8 tokens on the CPU
instead of being queued: in all variants.
"""

import argparse
import gc
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

HERE = Path(__file__).resolve().parent
LAYERS = 8
# Micro-batches of a step, and turns from one collection of garbage to the next, which is not measured.
STEP, COLLECTION = 4, 16
# name -> (expert-parallel size, whether each layer is recomputed)
LAYOUTS = {"EP1": (1, False), "EP2": (2, False), "recompute": (1, True)}
SIZES = ("8/2", "128/8", "256/8")
CASES = [f"{layout}:{size}" for layout in LAYOUTS for size in SIZES]
# name -> (fields of TransformerConfig, fields of SpecConfig)
BOTH = dict(specialization_loss_coeff=2e-3, coupling_loss_coeff=1e-3)
VARIANTS = {
    "none": ({}, {}),
    "aux + z": (dict(moe_aux_loss_coeff=1e-2, moe_z_loss_coeff=1e-3), {}),
    "both": ({}, BOTH),
    "specialization": ({}, dict(specialization_loss_coeff=2e-3)),
    "coupling": ({}, dict(coupling_loss_coeff=1e-3)),
    "orthogonality": ({}, dict(orthogonality_loss_coeff=1e-4)),
    "score variance": ({}, dict(score_variance_loss_coeff=1e-3)),
    "router orthogonality": ({}, dict(router_orthogonality_loss_coeff=1e-3)),
}
DEFAULT_VARIANTS = list(VARIANTS)[:5]
CLOCKS = {"cpu": ("thread CPU time", time.thread_time_ns), "wall": ("wall time", time.perf_counter_ns)}


def measure(case: str, variants: list[str], seconds: float, root: Path) -> dict:
    """In a process of its own: a row of the table, of which the main program makes text.

    Returns:
        for each variant, ``launches`` for a layer and micro-batch, and for each clock, in microseconds for a layer and
        micro-batch, quartiles: of ``times``, and ``added``, of the differences from "none" in the same turn.
    """
    import null_driver

    launches = null_driver.install()
    import host_model
    import torch

    from megatron_moe_spec import SpecConfig, __file__, attach

    if root not in Path(__file__).resolve().parents:
        raise RuntimeError(f"--root is {root}, and what was imported is {__file__}")
    layout, _, size = case.partition(":")
    (expert_parallel, recompute), (num_experts, top_k) = LAYOUTS[layout], map(int, size.split("/"))
    host_model.initialize(expert_parallel)
    models = {}
    for name in variants:
        fields = {"moe_aux_loss_coeff": 0.0, **VARIANTS[name][0]}
        models[name] = host_model.Layers(LAYERS, num_experts, top_k, recompute, **fields)
    host_model.as_on_gpu()
    handles = {
        name: attach(models[name], SpecConfig(kernels="triton", **VARIANTS[name][1]))
        for name in variants
        if VARIANTS[name][1]
    }
    shape = host_model.TOKENS, 1, host_model.HIDDEN
    inputs, gradient = {name: torch.randn(shape, requires_grad=True) for name in variants}, torch.ones(shape)
    clocks = [clock for _, clock in CLOCKS.values()]

    def micro_batch(name: str) -> tuple[list[float], float]:
        """Microseconds by each clock, and launches; for a layer."""
        model, x = models[name], inputs[name]
        x.grad, launched = None, launches()
        begun = [clock() for clock in clocks]
        model(x).backward(gradient)
        took = [clock() - start for clock, start in zip(clocks, begun)]
        return [ns / 1e3 / LAYERS for ns in took], (launches() - launched) / LAYERS

    def end_step() -> None:
        for handle in handles.values():
            handle.end_step()

    for _ in range(3):
        for name in variants:
            micro_batch(name)
    end_step()
    gc.collect()
    gc.freeze()
    gc.disable()
    times, launched, order = {name: [] for name in variants}, {}, random.Random(0)
    deadline = time.monotonic() + seconds
    while (turns := len(times["none"])) < STEP or time.monotonic() < deadline:
        for name in order.sample(variants, len(variants)):
            took, launched[name] = micro_batch(name)
            times[name].append(took)
        if turns % STEP == 0:
            end_step()
        if turns % COLLECTION == 0:
            gc.collect()
    return {
        "case": case,
        "turns": len(times["none"]),
        "load": os.getloadavg()[0],
        "variants": {name: {"launches": launched[name], **_summary(times[name], times["none"])} for name in variants},
    }


def _summary(took: list, none: list) -> dict:
    of_clocks = {}
    for i, clock in enumerate(CLOCKS):
        of_clocks[clock] = {
            "times": statistics.quantiles([a[i] for a in took], n=4),
            "added": statistics.quantiles([a[i] - b[i] for a, b in zip(took, none)], n=4),
        }
    return of_clocks


def measure_apart(case: str, arguments: argparse.Namespace, folder: str) -> dict:
    """``measure`` in a new process: groups of ranks are a process's own, and so is the checkout that is measured."""
    file = Path(folder) / "row.json"
    command = [sys.executable, "-W", "ignore", __file__, "--measure", case, "--json", file]
    command += ["--variants", ",".join(arguments.variants), "--seconds", str(arguments.seconds)]
    command += ["--root", arguments.root]
    paths = [str(arguments.root), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {
        "PYTHONPATH": os.pathsep.join(paths),
        "TRITON_CACHE_DIR": os.path.join(folder, "cache"),  # each kernel is compiled once
        "CUDA_VISIBLE_DEVICES": "",
    }
    run = subprocess.run(
        command, env={**os.environ, **variables}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if run.returncode:
        sys.exit(f"{case} failed:\n{run.stderr[-4000:]}")
    return json.loads(file.read_text())


def table(rows: list[dict], clock: str, markdown: bool) -> str:
    """Microseconds for each layer and micro-batch, a case a line."""
    variants = list(rows[0]["variants"])
    has_ratio = {"both", "aux + z"} <= set(variants)
    lines = [["layout", "experts / top-k", *variants]]
    lines[0] += [*(["both : aux + z"] if has_ratio else []), "launches"]
    for row in rows:
        layout, _, size = row["case"].partition(":")
        of = row["variants"]
        cells = [f"{of['none'][clock]['times'][1]:.0f}"]
        for name in variants[1:]:
            low, median, high = of[name][clock]["added"]
            cells.append(f"{median:+.0f} ({low:.0f} to {high:.0f})")
        if has_ratio:
            cells.append(f"{_ratio(of, clock):.2f}")
        lines.append([layout, size.replace("/", " / "), *cells, " / ".join(f"{of[v]['launches']:g}" for v in variants)])
    if markdown:
        lines.insert(1, ["---", "---", *["---:"] * (len(lines[0]) - 2)])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def _ratio(variants: dict, clock: str) -> float:
    both, peer = (variants[name][clock]["added"][1] for name in ("both", "aux + z"))
    return both / peer if peer > 0 else float("nan")


def machine(root: Path) -> dict:
    """What was measured, and where."""
    from common import command_output, provenance

    try:
        name = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        name = None
    device = f"{name.group(1) if name else platform.machine()}, {os.cpu_count()} cores"
    return {**provenance(), "device": device, "commit": command_output("git", "-C", str(root), "rev-parse", "HEAD")}


def _names(known: list[str]):
    def names(text: str) -> list[str]:
        found = [name.strip() for name in text.split(",")]
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known are {', '.join(known)}")
        return found

    return names


def _checkout(text: str) -> Path:
    root = Path(text).resolve()
    if not (root / "megatron_moe_spec" / "__init__.py").exists():
        raise argparse.ArgumentTypeError(f"{text} has no package megatron_moe_spec: name a checkout of this project")
    return root


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=_names(CASES), default=CASES, help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument(
        "--variants",
        type=_names(list(VARIANTS)),
        default=DEFAULT_VARIANTS,
        help=f"next to none, of {', '.join(VARIANTS)}; default: the first {len(DEFAULT_VARIANTS)}",
    )
    parser.add_argument("--seconds", type=float, default=20, help="of measurement, for each case (%(default)s)")
    parser.add_argument("--root", type=_checkout, default=HERE.parent, help="checkout to measure instead of this one")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.variants = list(dict.fromkeys(["none", *arguments.variants]))
    if arguments.measure:
        row = measure(arguments.measure, arguments.variants, arguments.seconds, arguments.root)
        arguments.json.write_text(json.dumps(row))
        return 0
    rows = []
    with tempfile.TemporaryDirectory(prefix="host_time_") as folder:
        for case in arguments.cases:
            rows.append(row := measure_apart(case, arguments, folder))
            print(f"{case}: {row['turns']} micro-batches of each, load {row['load']:.1f}", file=sys.stderr, flush=True)
            if arguments.json:
                record = {**machine(arguments.root), "layers": LAYERS, "rows": rows}
                arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    for clock, (name, _) in CLOCKS.items():
        print(f"\nMicroseconds of {name} for each layer and micro-batch, forward + backward; added to none:\n")
        print(table(rows, clock, arguments.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
