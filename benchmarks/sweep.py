"""Tries options of compilation of each kernel, and writes the fastest to where the kernels read them.

    python benchmarks/sweep.py [--seconds 95] [--tuned FILE] [--output FOLDER] [--smoke]

A candidate's result is compared with float64 before it is timed, on each of a few models. Its rating is the geometric
mean over models of its time relative to the default's. The best one is written, by the compute capability of the GPU,
to ``megatron_moe_spec/kernels/tuned.json``, unless the default is as fast within MARGIN. Candidates that do not
compile, or need more shared memory or registers than there are, are skipped, and named. Candidates near the default
come first, kernels by turns, until the time is over.
"""

import argparse
import itertools
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

if "--smoke" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

from common import MODELS, RESULTS, SMOKE, Results, milliseconds
from operations import Operation, errors, operations

from megatron_moe_spec.kernels.options import DEFAULTS, TUNED, capability, trial, write_tuned

MARGIN = 0.98  # of the default's time: a difference that is more than noise
HOPELESS = 1.2  # of the default's time on one model: not tried on the others
SHAPES = ("Qwen3-30B-A3B", "DeepSeek-V3", "Mixtral-8x7B")
# bf16 rows, fp32 logits, bool maps.
ELEMENT_SIZES = {
    "cosines": 2,
    "mixing": 2,
    "swiglu_gradient": 2,
    "swiglu_gradient_of_sum": 2,
    "mass": 4,
    "row_indices": 1,
}
CHOICES = {
    "cosines": dict(BLOCK_D=(32, 64, 128), num_warps=(1, 2, 4), num_stages=(3, 4, 6, 8)),
    "mixing": dict(BLOCK_D=(64, 128, 256), num_warps=(2, 4, 8), num_stages=(2, 3, 4)),
    "swiglu_gradient": dict(BLOCK_F=(32, 64, 128), num_warps=(2, 4, 8), STAGES=(2, 3, 4)),
    "swiglu_gradient_of_sum": dict(
        ROWS=(1, 2, 4, 8), BLOCK_F=(128, 256, 512), num_warps=(2, 4, 8), STAGES=(1, 2, 3, 4)
    ),
    "mass": dict(ELEMENTS=(1024, 2048, 4096), num_warps=(2, 4, 8)),
    "row_indices": dict(ELEMENTS=(1024, 2048, 4096), MOST_TOKENS=(16, 32, 64), num_warps=(2, 4, 8)),
}


def candidates(kernel: str) -> list[dict[str, int]]:
    """The default, then others, by the number of steps in which they differ from it."""
    default, choices = DEFAULTS[kernel][ELEMENT_SIZES[kernel]], CHOICES[kernel]

    def steps(candidate: dict[str, int]) -> int:
        return sum(abs(choices[o].index(candidate[o]) - choices[o].index(default[o])) for o in choices)

    found = [dict(zip(choices, values)) for values in itertools.product(*choices.values())]
    return sorted(found, key=steps)


def by_turns(kernels) -> Iterator[tuple[str, dict[str, int]]]:
    for round_of_all in itertools.zip_longest(*(candidates(kernel) for kernel in kernels)):
        yield from ((kernel, candidate) for kernel, candidate in zip(kernels, round_of_all) if candidate)


class Case:
    """The operations of a model that launch a kernel, on few tokens to be checked and on many to be timed."""

    def __init__(self, shape, check_tokens: int, num_tokens: int):
        self.checked, self.timed = (operations(shape, number) for number in (check_tokens, num_tokens))

    def measure(self, kernel: str, repeats: int) -> float:
        """Milliseconds of the operations that launch the kernel.

        Raises:
            ArithmeticError: a result is wrong.
            Exception: of Triton or the driver, where the kernel cannot be compiled or launched.
        """
        for operation in _of_kernel(self.checked, kernel):
            for row in errors(operation):
                if not row["right"]:
                    raise ArithmeticError(f"{row['operation']} is wrong: error {row['kernel_error']:.2e}")
        return sum(milliseconds(operation.run_kernel, repeats) for operation in _of_kernel(self.timed, kernel))


def _of_kernel(of_model: list[Operation], kernel: str) -> list[Operation]:
    return [operation for operation in of_model if kernel in operation.tables]


class Sweep:
    """What was measured so far.

    Attributes:
        rows: one a candidate: kernel, options, result, milliseconds of each model, rating (None: not measured on all
            models, or the default was not).
    """

    def __init__(self, cases: dict[str, Case], repeats: int = 20):
        self.rows: list[dict] = []
        self._cases, self._repeats = cases, repeats
        self._defaults: dict[str, dict[str, float]] = {}  # milliseconds of each model, by kernel

    def measure(self, kernel: str, candidate: dict[str, int]) -> dict:
        row: dict = {"kernel": kernel, "options": candidate, "result": "measured", "rating": None}
        took: dict[str, float] = {}
        try:
            with trial(kernel, ELEMENT_SIZES[kernel], candidate):
                for model, case in self._cases.items():
                    took[model] = case.measure(kernel, self._repeats)
                    if took[model] > HOPELESS * self._defaults.get(kernel, took)[model]:
                        row["result"] = "slow"
                        break
        except Exception as error:  # of Triton, ptxas or the driver: their classes differ by release
            first_line = next(iter(str(error).strip().splitlines()), "")
            row["result"] = f"skipped: {type(error).__name__}: {first_line}"
        if row["result"] == "measured" and candidate == DEFAULTS[kernel][ELEMENT_SIZES[kernel]]:
            self._defaults[kernel] = took
        if row["result"] == "measured" and kernel in self._defaults:
            logs = [math.log(ms / self._defaults[kernel][model]) for model, ms in took.items()]
            row["rating"] = round(math.exp(sum(logs) / len(logs)), 4)
        self.rows.append({**row, **{f"ms, {model}": round(ms, 4) for model, ms in took.items()}})
        return self.rows[-1]

    def winners(self) -> dict[str, dict[int, dict[str, int]]]:
        """The options, by kernel and element size, of the kernels whose default is not the fastest."""
        found = {}
        for kernel in self._defaults:
            rated = [row for row in self.rows if row["kernel"] == kernel and row["rating"] is not None]
            best = min(rated, key=lambda row: row["rating"])
            if best["rating"] < MARGIN:
                found[kernel] = {ELEMENT_SIZES[kernel]: best["options"]}
        return found

    def missing_defaults(self) -> list[str]:
        """Kernels whose default was tried and failed: what is faster than it is not known."""
        return sorted({row["kernel"] for row in self.rows} - set(self._defaults))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="of a micro-batch (%(default)s)")
    parser.add_argument("--seconds", type=float, default=95, help="try no candidate after so long (%(default)s)")
    parser.add_argument("--tuned", type=Path, help="what is written; default: where the kernels read it")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument(
        "--smoke", action="store_true", help="tiny shapes, on CPU in Triton's interpreter, few candidates"
    )
    arguments = parser.parse_args()
    deadline, smoke = time.monotonic() + arguments.seconds, arguments.smoke
    file = arguments.tuned or (arguments.output / "tuned.json" if smoke else TUNED)
    results = Results(arguments.output, "sweep", tuned_file=str(file))
    if smoke:
        cases = {"smoke": Case(SMOKE["smoke"], 10, 10)}
    else:
        cases = {model: Case(MODELS[model], 512, arguments.tokens) for model in SHAPES}
    sweep = Sweep(cases, 1 if smoke else 20)
    turns = list(by_turns(DEFAULTS))
    for number, (kernel, candidate) in enumerate(turns[: 2 * len(DEFAULTS)] if smoke else turns):
        if time.monotonic() > deadline:
            results.facts["not tried"] = len(turns) - number
            print(f"{len(turns) - number} candidates were not tried for want of time", flush=True)
            break
        results.add(sweep.measure(kernel, candidate))
    winners = sweep.winners()
    results.facts["winners"] = winners
    results.save()
    # Without a GPU nothing was measured, and no kernel reads this.
    write_tuned(capability() or "interpreted", winners, file)
    print(f"{file}: {winners or 'the defaults are the fastest'}", flush=True)
    if failed := sweep.missing_defaults():
        print(f"WRONG the default of {', '.join(failed)} failed", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
