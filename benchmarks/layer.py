"""Two real MoE layers of Megatron-Core, forward and backward, without and with the losses: time and memory.

    python benchmarks/layer.py [--tokens 8192] [--seconds 150] [--output FOLDER] [--smoke]

bf16, one GPU, all experts on it. Experts are limited to --max-experts, with their rows as many as before, where the
whole layer does not fit. Before a model is timed, its gradients with the kernels are compared with those of the eager
hooks.
"""

import argparse
import os
import sys
import time
from pathlib import Path

if "--smoke" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import moe
import torch
from common import MODELS, RESULTS, SMOKE, milliseconds, peak_bytes, write

from megatron_moe_spec import SpecConfig, attach

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
    """Of the losses alone, on x and on every parameter."""
    handle = attach(model, settings({**fields, "specialization_loss_coeff": 1.0, "coupling_loss_coeff": 1.0}))
    x = x.detach().requires_grad_()
    output = model(x)
    found = torch.autograd.grad((output * 0.0).sum(), [x, *model.parameters()], allow_unused=True)
    handle.metrics()
    handle.detach()
    return [g.float() for g in found if g is not None]


def worst_difference(model, x) -> float:
    """Largest difference between the gradients of the kernels and of eager, relative to their norm."""
    pairs = zip(gradients(model, x, {}), gradients(model, x, {"kernels": "torch"}), strict=True)
    return max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)


def measure(model, x, fields, repeats: int) -> tuple[float, int]:
    handle = attach(model, settings(fields)) if fields else None

    def step():
        for parameter in model.parameters():
            parameter.grad = None
        model(x).sum().backward()
        if handle:
            handle.start_after(0)

    took = milliseconds(step, repeats)
    peak = peak_bytes(step)
    if handle:
        handle.detach()
    return took, peak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a micro-batch (%(default)s)")
    parser.add_argument("--max-experts", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=150, help="start no model after so long (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on CPU in Triton's interpreter")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    moe.initialize()
    experts = "Transformer Engine" if moe.HAS_TRANSFORMER_ENGINE else "torch grouped matrix products"
    print(f"experts on {experts}", flush=True)
    tolerance = 1e-4 if arguments.smoke else 3e-2
    rows, failed = [], 0
    for name, shape in (SMOKE if arguments.smoke else MODELS).items():
        if time.monotonic() > deadline:
            print(f"SKIPPED {name}: out of time", flush=True)
            continue
        shape = type(shape)(**{**vars(shape), "experts": min(shape.experts, arguments.max_experts)})
        num_tokens = 20 if arguments.smoke else arguments.tokens
        try:
            model = moe.Layers(shape, 2)
            x = torch.randn(num_tokens, 1, shape.hidden, device="cuda").to(moe.DTYPE).requires_grad_()
            difference = worst_difference(model, x)
            if not difference <= tolerance:
                print(f"WRONG {name}: the kernels' gradients differ from eager's by {difference:.2e}", flush=True)
                failed += 1
                continue
            base = None
            for variant, fields in VARIANTS.items():
                took, peak = measure(model, x, fields, 2 if arguments.smoke else 15)
                base = base or (took, peak)
                rows.append(
                    {
                        "model": name,
                        "tokens": num_tokens,
                        "experts": shape.experts,
                        "losses": variant,
                        "ms": round(took, 3),
                        "time_percent": round(100 * (took / base[0] - 1), 2),
                        "peak_MB": round(peak / 1e6, 1),
                        "memory_percent": round(100 * (peak / base[1] - 1), 2) if base[1] else None,
                        "gradient_difference": difference,
                    }
                )
                print("  ".join(f"{value}" for value in rows[-1].values()), flush=True)
        except torch.OutOfMemoryError as error:
            print(f"SKIPPED {name}: {str(error).splitlines()[0]}", flush=True)
        model = x = None
        if torch.cuda.is_available() and not moe.ON_CPU:
            torch.cuda.empty_cache()
    if rows:
        write(arguments.output, "layer", rows, experts_on=experts)
    torch.distributed.destroy_process_group()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
