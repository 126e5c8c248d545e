"""Two real MoE layers of Megatron-Core, forward and backward, without and with the losses: time and memory.

    python benchmarks/layer.py [--tokens 8192] [--rounds 15] [--seconds 10] [--output FOLDER] [--smoke]

bf16, one GPU, all experts on it. Experts are limited to --max-experts, with their rows as many as before, where the
whole layer does not fit. Before a model is timed, its gradients with the kernels are compared with those of the eager
hooks. Then every round times one step of each variant, in random order, on the same weights and inputs; differences
are those of the steps of one round, so that a clock that drifts cancels. Two times are measured: that of the GPU, with
launches enqueued ahead of it wherever Megatron does not synchronise; and that of the host, which begins with an idle
GPU and ends when the step returns.
"""

import argparse
import os
import random
import statistics
import sys
import time
from pathlib import Path

if "--smoke" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import moe
import torch
from common import MODELS, RESULTS, SMOKE, Results, Times, peak_bytes, timed

from megatron_moe_spec import SpecConfig, attach

PERCENTAGES = "layer_percent: of only two MoE layers, forward and backward; not of a training step, which has more"
# name -> fields of SpecConfig; None: nothing attached
VARIANTS = {
    "none": None,
    "both": dict(specialization_loss_coeff=2e-3, coupling_loss_coeff=1e-3),
    "specialization": dict(specialization_loss_coeff=2e-3),
    "coupling": dict(coupling_loss_coeff=1e-3),
    "both, stride 8": dict(specialization_loss_coeff=2e-3, coupling_loss_coeff=1e-3, specialization_token_stride=8),
    "both, eager": dict(specialization_loss_coeff=2e-3, coupling_loss_coeff=1e-3, kernels="torch"),
}


def settings(fields: dict) -> SpecConfig:
    return SpecConfig(**{"kernels": "triton", **fields})


def gradients(model, x, fields: dict) -> list:
    """Of only the losses, on x and on every parameter."""
    handle = attach(model, settings({**fields, "specialization_loss_coeff": 1.0, "coupling_loss_coeff": 1.0}))
    x = x.detach().requires_grad_()
    output = model(x)
    found = torch.autograd.grad((output * 0.0).sum(), [x, *model.parameters()], allow_unused=True)
    handle.end_step()
    handle.detach()
    return [g.float() for g in found if g is not None]


def worst_difference(model, x) -> float:
    """Largest difference between the gradients of the kernels and of eager, relative to their norm."""
    pairs = zip(gradients(model, x, {}), gradients(model, x, {"kernels": "torch"}), strict=True)
    return max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)


def measure(model, x, fields, of):
    """``of`` a step with the losses of ``fields``: its time or its memory."""
    handle = attach(model, settings(fields)) if fields else None

    def step():
        for parameter in model.parameters():
            parameter.grad = None
        model(x).sum().backward()
        if handle:
            handle.start_after(0)

    found = of(step)
    if handle:
        handle.detach()
    return found


def one_time(step) -> Times:
    return timed(step, repeats=1, warm_up=1)


def one_peak(step) -> int:
    step()  # from here on there are gradients, which the next step frees
    return peak_bytes(step)


def compared(times: dict[str, list[Times]], peaks: dict) -> list[dict]:
    """A row a variant: its median times, and the median, least and largest difference from the step without losses."""
    rows = []
    for variant, took in times.items():
        row = {"losses": variant, "rounds": len(took)}
        for of, prefix in (("device", ""), ("host", "host_")):
            own, without = ([getattr(one, of) for one in times[name]] for name in (variant, "none"))
            differences, base = [a - b for a, b in zip(own, without)], statistics.median(without)
            row[f"{prefix}ms"] = round(statistics.median(own), 3)
            for end, f in {"": statistics.median, "_least": min, "_largest": max}.items():
                row[f"{prefix}difference_ms{end}"] = round(f(differences), 3)
                if of == "device":
                    row[f"layer_percent{end}"] = round(100 * f(differences) / base, 2)
        rows.append({**row, "peak_MB": round(peaks[variant] / 1e6, 1)})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a micro-batch (%(default)s)")
    parser.add_argument("--max-experts", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="at most, of a model (%(default)s)")
    parser.add_argument("--seconds", type=float, default=10, help="start no round of a model after so long")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on CPU in Triton's interpreter")
    arguments = parser.parse_args()
    moe.initialize()
    experts = "Transformer Engine" if moe.HAS_TRANSFORMER_ENGINE else "torch grouped matrix products"
    print(f"experts on {experts}\n{PERCENTAGES}", flush=True)
    results = Results(arguments.output, "layer", experts_on=experts, percentages=PERCENTAGES)
    tolerance = 1e-4 if arguments.smoke else 3e-2
    order, failed = random.Random(0), 0
    for name, shape in (SMOKE if arguments.smoke else MODELS).items():
        shape = type(shape)(**{**vars(shape), "experts": min(shape.experts, arguments.max_experts)})
        num_tokens, num_rounds = (20, 2) if arguments.smoke else (arguments.tokens, arguments.rounds)
        try:
            model = moe.Layers(shape, 2)
            x = torch.randn(num_tokens, 1, shape.hidden, device="cuda").to(moe.DTYPE).requires_grad_()
            difference = worst_difference(model, x)
            if not difference <= tolerance:
                print(f"WRONG {name}: the kernels' gradients differ from eager's by {difference:.2e}", flush=True)
                failed += 1
                continue
            peaks = {variant: measure(model, x, fields, one_peak) for variant, fields in VARIANTS.items()}
            before, deadline = results.rows, time.monotonic() + arguments.seconds
            times = {variant: [] for variant in VARIANTS}
            while len(times["none"]) < num_rounds and time.monotonic() < deadline:
                for variant in order.sample(list(VARIANTS), len(VARIANTS)):
                    times[variant].append(measure(model, x, VARIANTS[variant], one_time))
                of_model = {"model": name, "tokens": num_tokens, "experts": shape.experts}
                rows = [{**of_model, **row, "gradient_difference": difference} for row in compared(times, peaks)]
                results.rows = before + rows
                results.save()
            for row in results.rows[len(before) :]:
                print("  ".join(map(str, row.values())), flush=True)
        except torch.OutOfMemoryError as error:
            print(f"SKIPPED {name}: {str(error).splitlines()[0]}", flush=True)
        model = x = None
        if torch.cuda.is_available() and not moe.ON_CPU:
            torch.cuda.empty_cache()
    torch.distributed.destroy_process_group()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
