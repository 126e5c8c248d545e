"""The kernels against eager PyTorch and torch.compile, on the shapes of real MoE layers: time, bandwidth, memory.

    python benchmarks/kernels.py [--tokens 8192 32768] [--implementations triton,eager] [--output FOLDER] [--smoke]

Each operation is first checked against float64; one that fails is not timed, and the exit status is 1. The bytes of an
operation are a lower bound: each of its inputs once and each of its outputs once.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if "--smoke" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from common import (
    MODELS,
    RESULTS,
    SMOKE,
    Results,
    copy_gigabytes_per_second,
    device,
    milliseconds,
    peak_bytes,
)

from megatron_moe_spec.kernels import cosines as row_kernels
from megatron_moe_spec.kernels import mass as mass_kernels
from megatron_moe_spec.losses.coupling import routed_mass
from megatron_moe_spec.losses.scores import normalized_scores, normalized_scores_gradient
from megatron_moe_spec.losses.vectors import mixed, mixing_of_squares, packed, pair_cosines, unit_vectors, unpacked
from megatron_moe_spec.parallel.row_indices import rows_of_tokens

WEIGHT = 0.25


@dataclass
class Operation:
    """One operation: by the kernel, by eager PyTorch, and on which tensors."""

    name: str
    kernel: Callable
    eager: Callable
    inputs: tuple
    outputs: tuple

    @property
    def least_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (*self.inputs, *self.outputs) if isinstance(x, torch.Tensor))


def eager_cosines(z, rows):
    units, inverse = unit_vectors(z[rows])
    cosines = packed(pair_cosines(units))
    return cosines, inverse, 2.0 * cosines.square().sum()


def eager_mix(z, rows, covered, mixing, inverse, weight, incoming):
    units = z[rows].to(inverse.dtype) * inverse.unsqueeze(-1)
    gradient = mixed(mixing, units, inverse) * weight
    total = gradient.new_zeros(z.shape).index_add_(0, rows.flatten(), gradient.flatten(0, 1))
    return incoming + total.to(incoming.dtype)


def eager_mass(logits, live, score_function):
    return routed_mass(normalized_scores(logits, score_function), live)


def mass_gradient(logits, live, score_function, neighbor_grad, weight, incoming):
    return mass_kernels.add_mass_gradient(logits, live, score_function, [neighbor_grad], weight, incoming)


def eager_mass_gradient(logits, live, score_function, mass_gradient, weight, incoming):
    gradient = normalized_scores_gradient(logits, score_function, live * mass_gradient.unsqueeze(-1) * weight)
    return incoming + gradient.to(incoming.dtype)


def operations(shape, num_tokens: int, dtype=torch.bfloat16) -> list[Operation]:
    """The four operations on random tensors: every token has its experts, rows lie by (expert, token)."""
    torch.manual_seed(0)
    options = dict(device=device())
    logits = torch.randn(num_tokens, shape.experts, **options)
    live = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, logits.topk(shape.top_k).indices, True)
    rows, covered = rows_of_tokens(live, live, shape.top_k, num_tokens * shape.top_k)
    z, incoming = (torch.randn(num_tokens * shape.top_k, shape.ffn, dtype=dtype, **options) for _ in range(2))
    cosines, inverse, squares = row_kernels.row_cosines(z, rows)
    mixing = mixing_of_squares(unpacked(cosines, shape.top_k))
    (mass, _), mass_incoming = mass_kernels.routed_mass(logits, live, shape.score_function), torch.randn_like(logits)
    of_logits = (logits, live, shape.score_function)
    return [
        Operation("cosines", row_kernels.row_cosines, eager_cosines, (z, rows), (cosines, inverse, squares)),
        Operation(
            "cosines gradient",
            row_kernels.add_mixed,
            eager_mix,
            (z, rows, covered, mixing, inverse, WEIGHT, incoming),
            (z,),
        ),
        Operation("mass", mass_kernels.routed_mass, eager_mass, of_logits, (mass,)),
        Operation(
            "mass gradient",
            mass_gradient,
            eager_mass_gradient,
            (*of_logits, mass, WEIGHT, mass_incoming),
            (logits,),
        ),
    ]


def errors(operation: Operation) -> tuple[float, float, float]:
    """Largest errors of kernel and eager against eager in float64, and the magnitude they are to be compared with."""
    in_double = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in operation.inputs]
    results = [f(*x) for f, x in ((operation.kernel, operation.inputs), (operation.eager, operation.inputs))]
    results.append(operation.eager(*in_double))
    kernel, eager, exact = (r[0] if isinstance(r, tuple) else r for r in results)
    worst = [float((x.double() - exact).abs().max()) for x in (kernel, eager)]
    # A cosine is a sum of products that cancel, of vectors of length 1.
    return (*worst, 1.0 if operation.name == "cosines" else float(exact.abs().max()))


def timing(operation: Operation, implementation: str, bandwidth: float, smoke: bool) -> dict:
    function = operation.kernel if implementation == "triton" else operation.eager
    if implementation == "compile":
        torch._dynamo.reset()
        function = torch.compile(function, dynamic=False, backend="eager" if smoke else "inductor")
    run = lambda: function(*operation.inputs)  # noqa: E731
    took = milliseconds(run, 1 if smoke else 20)
    rate = operation.least_bytes / took / 1e6
    return {
        "implementation": implementation,
        "ms": round(took, 4),
        "least_MB": round(operation.least_bytes / 1e6, 2),
        "GB_per_s": round(rate, 1),
        "percent_of_copy": round(100 * rate / bandwidth, 1),
        "peak_MB": round(peak_bytes(run) / 1e6, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768], help="of a micro-batch (%(default)s)")
    parser.add_argument("--implementations", default="triton,eager,compile", help="(%(default)s)")
    parser.add_argument("--name", default="kernels", help="of the file with the times (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on CPU in Triton's interpreter")
    arguments = parser.parse_args()
    smoke = arguments.smoke
    check_tokens, all_tokens = (20, [20]) if smoke else (512, arguments.tokens)
    bandwidth = copy_gigabytes_per_second(2**20 if smoke else 2**30)
    print(f"copy: {bandwidth:.0f} GB/s", flush=True)
    checks: list[dict] = []
    results = Results(arguments.output, arguments.name, copy_GB_per_s=round(bandwidth, 1), checks=checks)
    for model, shape in (SMOKE if smoke else MODELS).items():
        right = set()
        for operation in operations(shape, check_tokens):
            kernel, eager, scale = errors(operation)
            if kernel <= eager + 2e-5 * scale:
                right.add(operation.name)
            else:
                print(f"WRONG {model} {operation.name}: error {kernel:.2e}, eager {eager:.2e}", flush=True)
            row = {"model": model, "tokens": check_tokens, "operation": operation.name, "kernel_error": kernel}
            checks.append({**row, "eager_error": eager, "magnitude": scale, "right": operation.name in right})
        for num_tokens in all_tokens:
            for operation in operations(shape, num_tokens):
                for implementation in arguments.implementations.split(",") if operation.name in right else ():
                    row = {"model": model, "tokens": num_tokens, "operation": operation.name}
                    try:
                        results.add({**row, **timing(operation, implementation, bandwidth, smoke)})
                    except torch.OutOfMemoryError as error:
                        print(f"SKIPPED {row} {implementation}: {str(error).splitlines()[0]}", flush=True)
    return int(not all(row["right"] for row in checks))


if __name__ == "__main__":
    sys.exit(main())
