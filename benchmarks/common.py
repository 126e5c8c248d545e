"""Shared by the benchmarks: shapes of real models, timing, and writing of results."""

import functools
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


# The most wanted first: a run that is cut off has them.
MODELS = {
    "Qwen3-30B-A3B": Shape(2048, 768, 128, 8),
    "DeepSeek-V3": Shape(7168, 2048, 256, 8, "sigmoid"),
    "Mixtral-8x7B": Shape(4096, 14336, 8, 2),
    "DeepSeek-V2-Lite": Shape(2048, 1408, 64, 6),
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


@dataclass(frozen=True)
class Times:
    """Median milliseconds of a function: on the device, and on the host until it returns."""

    device: float
    host: float


class CacheFlush:
    """Empties the GPU's second-level cache, by reading more than it holds.

    Lines that a flush had written would be written back while the next kernel is timed.
    """

    def __init__(self):
        holds = torch.cuda.get_device_properties(0).L2_cache_size
        self.buffer = torch.zeros(holds, device=device())  # fp32: four times as many bytes

    def __call__(self) -> None:
        self.buffer.sum()


_cache_flush = functools.cache(CacheFlush)


def timed(run: Callable[[], object], repeats: int = 20, warm_up: int = 3) -> Times:
    """Times of ``run``; without a GPU, both are the host's.

    On a GPU, each timed call begins with an empty second-level cache, and is enqueued while the device sleeps: gaps
    between launches do not count as the device's time.
    """
    for _ in range(warm_up):
        run()
    host = statistics.median(_host_milliseconds(run) for _ in range(min(repeats, 5) if on_gpu() else repeats))
    if not on_gpu():
        return Times(host, host)
    flush, sleep = _cache_flush(), round((1.5 * host + 0.1) * _sleep_cycles_per_millisecond())
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        flush()
        torch.cuda._sleep(sleep)
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return Times(statistics.median(start.elapsed_time(end) for start, end in events), host)


def milliseconds(run: Callable[[], object], repeats: int = 20, warm_up: int = 3) -> float:
    """``timed`` on the device."""
    return timed(run, repeats, warm_up).device


def _host_milliseconds(run: Callable[[], object]) -> float:
    """From a device that has nothing to do until ``run`` returns."""
    if on_gpu():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


@functools.cache
def _sleep_cycles_per_millisecond(cycles: int = 10_000_000) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)  # the first also loads its code
    start.record()
    torch.cuda._sleep(cycles)
    end.record()
    torch.cuda.synchronize()
    return cycles / start.elapsed_time(end)


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


@functools.cache
def transfer_milliseconds(num_bytes: int, only_reads: bool) -> float:
    """Time of a copy that reads and writes so many bytes in all, or of a sum that reads them."""
    size = max(num_bytes // (4 if only_reads else 8), 1)
    source = torch.zeros(size, device=device())
    if only_reads:
        return milliseconds(source.sum)
    target = torch.empty_like(source)
    return milliseconds(lambda: target.copy_(source))


def against_transfer(took: float, num_bytes: int, only_reads: bool) -> dict:
    """Columns of a row: the rate of an operation that took so many milliseconds, and relative to a plain transfer.

    The transfer moves as many bytes: what is small, or fits the cache, has no part in the bandwidth of large tensors.
    """
    transfer = transfer_milliseconds(num_bytes, only_reads)
    return {
        "least_MB": round(num_bytes / 1e6, 2),
        "GB_per_s": round(num_bytes / took / 1e6, 1),
        "transfer": "sum" if only_reads else "copy",
        "transfer_ms": round(transfer, 4),
        "percent_of_transfer": round(100 * transfer / took, 1),
    }


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
