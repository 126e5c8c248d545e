"""Compiles the kernels, as they are shipped, for GPUs that need not be there, and reads what the compiler made of them.

    python benchmarks/offline.py [--quick] [--json FILE]

The public operations run on CPU tensors of the shapes below; each launch is compiled instead, for every architecture.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from megatron_moe_spec.kernels import cosines as row_kernels
from megatron_moe_spec.kernels import mass as mass_kernels
from megatron_moe_spec.kernels import options as kernel_options
from megatron_moe_spec.kernels import row_indices as row_index_kernels
from megatron_moe_spec.kernels import swiglu as swiglu_kernels

ARCHITECTURES = (80, 90, 100)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# dtype, experts per token, row size: rows that 16-byte loads fit, and one that they do not
ROWS = [
    ("bfloat16", 2, 14336),
    ("bfloat16", 4, 1536),
    ("bfloat16", 6, 1408),
    ("bfloat16", 8, 768),
    ("bfloat16", 16, 768),
    ("bfloat16", 8, 100),
    ("float16", 8, 768),
    ("float32", 8, 768),
]
# dtype, experts, score function
LOGITS = [
    ("float32", 8, "softmax"),
    ("float32", 128, "softmax"),
    ("float32", 256, "sigmoid"),
    ("float32", 512, "sqrtsoftplus"),
    ("bfloat16", 128, "softmax"),
]


class _NoGPU:
    """The part of a driver that Triton asks for in order to compile."""

    def __init__(self, architecture: int):
        self._architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._architecture, 32)

    def get_current_device(self) -> int:
        return self._architecture  # compiled kernels are kept by device

    def get_current_stream(self, device) -> int:
        return 0


def compiled(architecture: int, operation) -> list[tuple]:
    """(name, compiled kernel) of each launch of ``operation()``, which launches nothing."""
    kernels, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernels.append((self.__name__.strip("_"), run(self, *args, grid=grid, warmup=True, **options)))

    driver.set_active(_NoGPU(architecture))
    JITFunction.run, here = compile_only, kernel_options.capability
    kernel_options.capability = lambda: f"{architecture // 10}.{architecture % 10}"
    kernel_options.options.cache_clear()
    try:
        operation()
    finally:
        JITFunction.run, kernel_options.capability = run, here
        kernel_options.options.cache_clear()
    return kernels


def _cuobjdump(kernel, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        run = subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


def resources(kernel) -> dict:
    """Registers per thread, bytes per thread in local memory (spills), bytes of shared memory per program."""
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", _cuobjdump(kernel, "-res-usage"))
    registers, stack, local = map(int, found.groups())
    return dict(registers=registers, spilled_bytes=stack + local, shared_bytes=kernel.metadata.shared)


def longest_loop(kernel) -> dict:
    """Of the longest loop: its instructions, and how many are special functions, barriers and asynchronous copies."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?;)", _cuobjdump(kernel, "-sass"), re.MULTILINE)
    addresses, code = [int(address, 16) for address, _ in lines], [text for _, text in lines]
    longest: list[str] = []
    for end, text in enumerate(code):
        branch = re.search(r"\bBRA\b.* 0x([0-9a-f]+) ;", text)
        if branch and int(branch[1], 16) < addresses[end]:
            loop = code[addresses.index(int(branch[1], 16)) : end + 1]
            longest = max(longest, loop, key=len)
    kinds = {"special_functions": "MUFU", "barriers": "BAR.SYNC", "async_copies": "LDGSTS"}
    counts = {name: sum(mnemonic in text for text in longest) for name, mnemonic in kinds.items()}
    return dict(loop_instructions=len(longest), **counts)


def offset_products(kernel) -> dict:
    """Counts the products (row number times row size, token times experts) in 64 and in 32 bits."""
    types = re.findall(r"arith\.muli .*: (?:tensor<\d+x)?(i\d+)", kernel.asm["ttir"])
    return {"products_64_bit": types.count("i64"), "products_32_bit": types.count("i32")}


def _row_operations(dtype: str, k: int, F: int) -> list:
    z = torch.zeros(16 * k, F, dtype=getattr(torch, dtype))
    rows, covered = torch.arange(16 * k, dtype=torch.int32).view(16, k), torch.ones(16 * k, dtype=torch.bool)
    mixing, cosines, lengths = torch.zeros(16, k, k), torch.zeros(16, k * (k - 1) // 2), torch.zeros(16, k)
    weight, y, probs = torch.ones(()), torch.zeros(16 * k, 2 * F, dtype=z.dtype), torch.ones(16 * k)
    return [
        lambda: row_kernels.row_cosines(z, rows),
        lambda: row_kernels.add_mixed(z, rows, covered, mixing, lengths, weight, z),
        lambda: row_kernels.add_squares_gradient(z, rows, covered, cosines, lengths, weight, z),
        lambda: swiglu_kernels.swiglu_gradient(y, probs, rows, covered, cosines, lengths, weight, z),
        lambda: swiglu_kernels.swiglu_gradient_of_sum(y, probs, z, z, rows.view(-1)),
    ]


def _logits_operations(dtype: str, experts: int, function: str) -> list:
    logits = torch.zeros(16, experts, dtype=getattr(torch, dtype))
    live = logits > 0
    return [
        lambda: mass_kernels.routed_mass(logits, live, function, torch.zeros(16)),
        lambda: row_index_kernels.rows_of_tokens(live, live, min(experts, 8), 16 * experts),
        lambda: row_index_kernels.rows_by_source(torch.zeros(experts // 2, 2, dtype=torch.int64), 16),
        lambda: mass_kernels.add_mass_gradient(logits, live, function, 2 * [torch.zeros(16)], torch.ones(1), logits),
    ]


def report(rows=ROWS, logits=LOGITS) -> list[dict]:
    """One entry for each kernel, case and architecture."""
    entries = []
    for architecture in ARCHITECTURES:
        for cases, operations in ((rows, _row_operations), (logits, _logits_operations)):
            for case in cases:
                for operation in operations(*case):
                    for name, kernel in compiled(architecture, operation):
                        entry = dict(kernel=name, case=list(case), architecture=f"sm_{architecture}")
                        entries.append(
                            {**entry, **resources(kernel), **longest_loop(kernel), **offset_products(kernel)}
                        )
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--quick", action="store_true", help="a few of the cases")
    arguments = parser.parse_args()
    entries = report(ROWS[::3], LOGITS[1:4:2]) if arguments.quick else report()
    if arguments.json:
        arguments.json.write_text(json.dumps(entries, indent=1) + "\n")
    print(f"triton {triton.__version__}, compiled offline; the last three columns are of the longest loop")
    print(f"{'kernel':22} {'case':28} arch    registers spilled shared instructions special barriers")
    for e in entries:
        case = " ".join(map(str, e["case"]))
        print(
            f"{e['kernel']:22} {case:28} {e['architecture']:7} {e['registers']:9} {e['spilled_bytes']:7} "
            f"{e['shared_bytes']:6} {e['loop_instructions']:12} {e['special_functions']:7} {e['barriers']:8}"
        )


if __name__ == "__main__":
    main()
