"""Shared by the benchmarks: shapes of real models, timing, and writing of results."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Optional

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Shape:
    """An MoE layer: hidden size, an expert's hidden size, routed experts, experts per token."""

    hidden: int
    ffn: int
    experts: int
    top_k: int
    score_function: str = "softmax"


MODELS = {
    "Mixtral-8x7B": Shape(4096, 14336, 8, 2),
    "Qwen3-30B-A3B": Shape(2048, 768, 128, 8),
    "DeepSeek-V2-Lite": Shape(2048, 1408, 64, 6),
    "DeepSeek-V3": Shape(7168, 2048, 256, 8, "sigmoid"),
    # The paper's large models as configs/ reconstructs them.
    "paper, vanilla 7B": Shape(2048, 5504, 8, 2),
    "paper, DeepSeek-style 7B": Shape(2048, 688, 64, 6),
}
SMOKE = {"smoke": Shape(16, 40, 8, 2), "smoke sigmoid": Shape(16, 24, 12, 3, "sigmoid")}


def on_gpu() -> bool:
    """Under this package's CPU backend for Megatron, too, where only tensors tell."""
    return torch.cuda.is_available() and torch.empty(0, device="cuda").is_cuda


def device() -> torch.device:
    return torch.device("cuda" if on_gpu() else "cpu")


def milliseconds(run: Callable[[], object], repeats: int = 20, warm_up: int = 3) -> float:
    """Median time of ``run``; on a GPU its second-level cache is emptied before each, by the device's clock."""
    for _ in range(warm_up):
        run()
    if not on_gpu():
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def peak_bytes(run: Callable[[], object]) -> int:
    """Largest memory that ``run`` allocates beyond what is there before; 0 without a GPU."""
    if not on_gpu():
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_gigabytes_per_second(size: int = 2**30) -> float:
    """Bytes read and written per second by a copy of ``size`` bytes: what a kernel can be measured by."""
    source, target = (torch.empty(size, dtype=torch.uint8, device=device()) for _ in range(2))
    source.zero_()
    return 2 * size / milliseconds(lambda: target.copy_(source)) / 1e6


def command_output(*command: str) -> Optional[str]:
    """What a command prints, on one line; None where there is no such program or it fails."""
    try:
        run = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return "; ".join(run.stdout.split("\n")[:-1]) if run.returncode == 0 else None


def provenance() -> dict:
    """Device, driver, clocks, versions and commit of this run."""

    def of(package):
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    gpu = on_gpu()
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
    packages = ("torch", "triton", "numpy", "megatron-core", "transformer-engine-torch", "transformer-engine-cu13")
    return {
        "device": torch.cuda.get_device_name() if gpu else f"CPU ({platform.machine()})",
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()) if gpu else None,
        "nvidia_smi": command_output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader") if gpu else None,
        "python": platform.python_version(),
        **{package: of(package) for package in packages},
        "cuda": torch.version.cuda,
        "commit": command_output("git", "rev-parse", "HEAD"),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


class Results:
    """NAME.json: the provenance, ``facts``, and rows. Written after every row, so that a run cut off leaves them."""

    def __init__(self, folder: Path, name: str, **facts):
        folder.mkdir(parents=True, exist_ok=True)
        self.rows, self.facts = [], facts
        self._file, self._provenance = folder / f"{name}.json", provenance()

    def add(self, row: dict, show: bool = True) -> None:
        self.rows.append(row)
        self.save()
        if show:
            print("  ".join(map(str, row.values())), flush=True)

    def save(self) -> None:
        record = {**self._provenance, **self.facts, "rows": self.rows}
        unfinished = self._file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(record, indent=1) + "\n")
        unfinished.replace(self._file)
