"""The kernels against eager PyTorch and torch.compile, on the shapes of real MoE layers: time, bandwidth, memory.

    python benchmarks/kernels.py [--check] [--tokens 8192 32768] [--models Qwen3-30B-A3B] [--output FOLDER] [--smoke]

Each output of each operation is first checked against float64; an operation that fails is not timed, and the exit
status is 1. The bytes of an operation are a lower bound: each of its inputs once and each of its outputs once. Its time
is compared with that of a copy that reads and writes as many bytes in all, or of a sum if the operation only reads.
"""

import argparse
import os
import sys
from pathlib import Path

if "--smoke" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from common import MODELS, RESULTS, SMOKE, Results, against_transfer, peak_bytes, timed
from operations import Operation, errors, operations

from megatron_moe_spec.kernels.options import DEFAULTS, options

IMPLEMENTATIONS = ("triton", "eager", "compile")


def check(model: str, shape, num_tokens: int) -> list[dict]:
    """A row an output; one that is wrong is printed."""
    rows = []
    for operation in operations(shape, num_tokens):
        for row in errors(operation):
            rows.append({"model": model, "tokens": num_tokens, **row})
            if not row["right"]:
                print(
                    f"WRONG {model} {row['operation']}, output {row['output']}: error {row['kernel_error']:.2e}, "
                    f"eager {row['eager_error']:.2e}, of {row['magnitude']:.2e}",
                    flush=True,
                )
    return rows


def timing(operation: Operation, implementation: str, smoke: bool) -> dict:
    if implementation == "compile":
        torch._dynamo.reset()
        compiled = torch.compile(operation.eager, dynamic=False, backend="eager" if smoke else "inductor")
        run = lambda: compiled(*operation.inputs, *operation.eager_inputs)  # noqa: E731
    else:
        run = operation.run_kernel if implementation == "triton" else operation.run_eager
    times = timed(run, *((1, 0) if smoke else (20, 3)))
    return {
        "implementation": implementation,
        "ms": round(times.device, 4),
        "host_ms": round(times.host, 4),
        **against_transfer(times.device, operation.least_bytes, operation.only_reads),
        "peak_MB": round(peak_bytes(run) / 1e6, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="time nothing")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768], help="of a micro-batch (%(default)s)")
    parser.add_argument("--models", help="separated by commas; default: all")
    parser.add_argument("--operations", help="that are timed, separated by commas; default: all")
    parser.add_argument("--implementations", default=",".join(IMPLEMENTATIONS), help="(%(default)s)")
    parser.add_argument("--name", default="kernels", help="of the file of results (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on CPU in Triton's interpreter")
    arguments = parser.parse_args()
    smoke, models = arguments.smoke, SMOKE if arguments.smoke else MODELS
    check_tokens, all_tokens = (20, [20]) if smoke else (512, arguments.tokens)
    if arguments.models and not smoke:
        if unknown := set(arguments.models.split(",")) - set(models):
            parser.error(f"--models knows {', '.join(models)}; got {', '.join(sorted(unknown))}")
        models = {name: models[name] for name in arguments.models.split(",")}
    wanted = arguments.operations.split(",") if arguments.operations else None
    checks: list[dict] = []
    results = Results(arguments.output, arguments.name, checks=checks)
    results.facts["options of bf16 rows"] = {kernel: options(kernel, min(DEFAULTS[kernel])) for kernel in DEFAULTS}
    for model, shape in models.items():
        rows = check(model, shape, check_tokens)
        checks += rows
        results.save()
        print(f"{model}: {sum(row['right'] for row in rows)} of {len(rows)} outputs are right", flush=True)
        wrong = {row["operation"].removesuffix(", alone") for row in rows if not row["right"]}
        for num_tokens in () if arguments.check else all_tokens:
            for operation in operations(shape, num_tokens):
                if operation.name in wrong or (wanted and operation.name not in wanted):
                    continue
                for implementation in arguments.implementations.split(","):
                    row = {"model": model, "tokens": num_tokens, "operation": operation.name}
                    try:
                        results.add({**row, **timing(operation, implementation, smoke)})
                    except torch.OutOfMemoryError as error:
                        print(f"SKIPPED {row} {implementation}: {str(error).splitlines()[0]}", flush=True)
    return int(not all(row["right"] for row in checks))


if __name__ == "__main__":
    sys.exit(main())
