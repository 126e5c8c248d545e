"""The machine: card, driver, clocks, versions, and the bandwidth of a copy, which kernels are measured by.

python benchmarks/environment.py [--output FOLDER] [--smoke]
"""

import argparse
from pathlib import Path

from common import RESULTS, Results, copy_gigabytes_per_second, provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="copies of 1 MiB")
    arguments = parser.parse_args()
    for name, value in provenance().items():
        print(f"{name}: {value}", flush=True)
    results = Results(arguments.output, "environment")
    for size in (2**20,) if arguments.smoke else (2**26, 2**28, 2**30, 2**32):
        results.add({"copied_MiB": size // 2**20, "GB_per_s": round(copy_gigabytes_per_second(size), 1)})
    # Once more, while the clocks are those of a busy card.
    results.facts.update(provenance())
    results.save()


if __name__ == "__main__":
    main()
