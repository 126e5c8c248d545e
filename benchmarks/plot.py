"""Draws the kernels' bandwidths, from kernels.json and compile.json, under the roofline: kernels.png.

python benchmarks/plot.py [FOLDER]
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

HERE = Path(__file__).parent


def main(folder: Path) -> None:
    record = json.loads((folder / "kernels.json").read_text())
    rows = record["rows"]
    if (folder / "compile.json").exists():
        rows += json.loads((folder / "compile.json").read_text())["rows"]
    tokens = rows[0]["tokens"]
    rows = [row for row in rows if row["tokens"] == tokens]
    groups = list(dict.fromkeys((row["operation"], row["model"]) for row in rows))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    rate = {(r["operation"], r["model"], r["implementation"]): r["GB_per_s"] for r in rows}
    figure, axes = plt.subplots(figsize=(11, 5), layout="constrained")
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        places = [x + (i - (len(names) - 1) / 2) * width for x in range(len(groups))]
        axes.bar(places, [rate.get((*group, name), 0.0) for group in groups], width, label=name)
    axes.axhline(record["copy_GB_per_s"], color="black", linestyle="--", label="copy (roofline)")
    labels = [f"{operation}\n{model}" for operation, model in groups]
    axes.set_xticks(range(len(groups)), labels, rotation=60, fontsize=8)
    axes.set_ylabel("least bytes to move / time (GB/s)")
    axes.set_title(f"{record['device']}, torch {record['torch']}, triton {record['triton']}, {tokens} tokens")
    axes.legend()
    figure.savefig(folder / "kernels.png", dpi=120)
    print(f"wrote {folder / 'kernels.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results")
