"""The command line: python -m megatron_moe_spec.placement TRACE --devices D."""

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Optional

from megatron_moe_spec.placement.formats import FORMATS
from megatron_moe_spec.placement.halves import halves, sample, some_batches
from megatron_moe_spec.placement.placement import Cluster, Placement
from megatron_moe_spec.traces.files import read_trace
from megatron_moe_spec.traces.schema import Trace

_DESCRIPTION = """\
Places the experts of each MoE layer on devices. The placement is fitted to the first half of a routing trace and judged
by the second, beside others: contiguous, random, DeepSeek's EPLB, and what the same objective makes of a trace without
structure. With --format and --out it is written for an inference engine."""


def main(argv: Optional[list[str]] = None) -> int:
    """Runs the command; returns the exit status, 2 for bad input."""
    parser = _parser()
    args = parser.parse_args(argv)
    if (args.format is None) != (args.out is None):
        parser.error("--format and --out need each other")
    try:
        _check_out(args)
        return _run(args)
    except ModuleNotFoundError as error:
        if error.name not in ("numpy", "scipy", "scipy.optimize"):
            raise
        remedy = "pip install scipy, or this package with its extra: pip install -e '.[report]'"
        problem = f"{error.name} is missing: {remedy}"
    except (ValueError, OSError) as error:
        problem = str(error)
    print(f"megatron_moe_spec.placement: {problem}", file=sys.stderr)
    return 2


def _run(args: argparse.Namespace) -> int:
    from megatron_moe_spec.placement import judge
    from megatron_moe_spec.placement.objectives import OBJECTIVES

    trace = read_trace(args.trace, args.num_experts, args.num_layers, args.drop_incomplete)
    cluster = Cluster(trace.num_experts, args.devices, args.nodes, args.redundant)
    num_groups, num_predicted, num_cached = _sizes(args, trace)
    _check_format(args, trace)
    fitted, judged = halves(trace)
    for notice in trace.notices:
        print(f"Notice: {notice}")
    num_tokens, num_layers, top_k = trace.experts_TMK.shape
    few, some = sample(fitted, OBJECTIVES[args.objective].most_tokens), some_batches(judged, judge.MEASURED_TOKENS)
    print(
        f"{num_tokens:,} tokens, {top_k} of {trace.num_experts} experts in each of {num_layers} MoE layers; "
        f"{cluster.num_slots} slots a layer on {cluster.num_devices} devices.\n"
        f"Fitted to {len(few.batch_T):,} of the first {len(fitted.batch_T):,} tokens, judged by "
        f"{len(some.batch_T):,} of the other {len(judged.batch_T):,}.\n",
        flush=True,
    )
    judged_placements = judge.judge(fitted, few, some, cluster, args.objective, num_groups)
    measures = {name: measured for name, (_, measured) in judged_placements.items()}
    print(f"{judge.measures_table(measures, cluster.num_nodes, args.hidden_size or trace.hidden_size)}\n")
    print(judge.verdict(measures, args.objective), end="\n\n", flush=True)
    print(f"Whatever the placement, of at most {judge.JUDGED_TOKENS:,} of the tokens judged:")
    print(judge.rates_table(judge.judge_prefetch(fitted, judged, num_predicted, num_cached)))
    if args.out:
        _write(args, judged_placements[args.objective][0], trace)
    return 0


def _write(args: argparse.Namespace, placement: Placement, trace: Trace) -> None:
    """Writes the file beside its place first, so that none is ever there by half."""
    chosen = FORMATS[args.format]
    unfinished = args.out.with_name(f".{args.out.stem}.unfinished{args.out.suffix}")
    if chosen.needs_checkpoint:
        shutil.rmtree(unfinished, ignore_errors=True)
        chosen.write(placement, trace, unfinished, args.checkpoint)
    else:
        chosen.write(placement, trace, unfinished)
    os.replace(unfinished, args.out)
    told = chosen.usage.format(path=args.out, devices=args.devices, redundant=args.redundant)
    print(f"\nWrote {args.out}: {told}")


def _check_out(args: argparse.Namespace) -> None:
    """Before any work: where the result is to go."""
    if args.out is None:
        if args.checkpoint is not None:
            raise ValueError("--checkpoint is for --format megatron, with --out")
        return
    chosen = FORMATS[args.format]
    if chosen.needs_checkpoint != (args.checkpoint is not None):
        raise ValueError("--format megatron and --checkpoint, the one to reorder, need each other")
    if chosen.needs_checkpoint and args.force:
        raise ValueError("--force replaces no checkpoint: name a new folder with --out")
    if chosen.suffixes and args.out.suffix not in chosen.suffixes:
        ends = " or ".join(chosen.suffixes)
        raise ValueError(f"--out {args.out}: --format {args.format} is a file whose name ends in {ends}")
    if not args.out.parent.is_dir():
        raise ValueError(f"--out {args.out}: there is no folder {args.out.parent}")
    if args.out.exists() and not args.force:
        raise ValueError(f"--out {args.out} exists: name another file, or give --force to replace it")


def _check_format(args: argparse.Namespace, trace: Trace) -> None:
    if args.format and FORMATS[args.format].all_layers and trace.num_layers is None:
        raise ValueError(
            f"--format {args.format} has all layers of the model, and the trace does not say how many there are: give "
            "--num-layers"
        )
    if args.format and FORMATS[args.format].needs_checkpoint and args.redundant:
        raise ValueError(f"--format {args.format} has one place for each expert: leave --redundant out")


def _sizes(args: argparse.Namespace, trace: Trace) -> tuple[int, int, int]:
    """Groups of experts, experts to predict, and experts in a layer's cache."""
    experts, top_k = trace.num_experts, trace.experts_TMK.shape[2]
    groups = args.groups or 1
    if experts % groups or (args.groups and groups % args.nodes):
        raise ValueError(
            f"--groups {groups} has to divide the {experts} experts, and --nodes {args.nodes} has to divide it"
        )
    predicted = args.prefetch or min(2 * top_k, experts)
    if predicted > experts:
        raise ValueError(f"--prefetch {predicted}: there are {experts} experts")
    cached = args.cache_slots or max(top_k, experts // 4)
    if not top_k <= cached <= experts:
        raise ValueError(f"--cache-slots {cached}: from {top_k}, a token's experts, to {experts}, all of them")
    return groups, predicted, cached


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m megatron_moe_spec.placement", description=_DESCRIPTION)
    add = parser.add_argument
    add("trace", metavar="TRACE", type=Path, help="folder of router_trace_rank*.jsonl, one file, or SGLang's .pt")
    add("--devices", type=_positive, required=True, metavar="D", help="expert-parallel size")
    add("--nodes", type=_positive, default=1, metavar="N", help="nodes that the devices are on; default 1")
    add("--objective", choices=("load", "fanout", "pathway"), default="load", help="default load")
    add("--redundant", type=_not_negative, default=0, metavar="R", help="replicas of experts, in each layer; default 0")
    add("--groups", type=_positive, metavar="G", help="groups of experts that EPLB packs onto nodes")
    add("--format", choices=FORMATS, help="engine that the placement is written for")
    add("--out", type=Path, metavar="FILE", help="where it is written")
    add("--force", action="store_true", help="replace FILE")
    add("--checkpoint", type=Path, metavar="DIR", help="of Megatron, torch_dist; for --format megatron")
    add("--hidden-size", type=_positive, metavar="H", help="components of a token's row; default: the trace's")
    add("--prefetch", type=_positive, metavar="M", help="experts to predict for the next layer; default 2 x top-k")
    add("--cache-slots", type=_positive, metavar="C", help="experts in each layer's cache; default a quarter of them")
    add("--num-experts", type=_positive, metavar="E", help="of each MoE layer, where the trace does not say")
    add("--num-layers", type=_positive, metavar="L", help="of the model with dense ones, where the trace does not say")
    add("--drop-incomplete", action="store_true", help="leave out micro-batches of the trace that lack layers")
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _not_negative(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{number} is negative")
    return number
