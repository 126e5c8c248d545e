"""Triton's own launches on a machine without a GPU: over a CUDA driver that does nothing.

``libcuda.c`` stands for those functions of the CUDA driver API that Triton's NVIDIA driver calls (``driver.c`` and the
launchers that ``driver.py`` writes, in ``triton/backends/nvidia``): device, context, module, function and launch, with
the signatures of the ``cuda.h`` that Triton ships. Each returns success at once. Kernels are compiled for an H100,
loaded and launched as ever, and compute nothing: what they would have written stays as it was allocated. What is left
is the host time of a launch, without what the true driver takes to queue it. TMA descriptors are not supported.
"""

import atexit
import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

SOURCE = Path(__file__).with_name("libcuda.c")
NAME = "libcuda.so.1"  # what Triton links with, and opens by this name
CAPABILITY = (9, 0)  # as libcuda.c has it
UNSUPPORTED = {"cuTensorMapEncodeTiled", "cuTensorMapEncodeIm2col"}


def install() -> Callable[[], int]:
    """Makes the null driver Triton's, in this process and until it ends.

    Returns:
        A function of no arguments: the number of kernels launched so far.

    Raises:
        RuntimeError: torch or triton is imported already; triton, a C compiler or Python's headers are missing; Triton
            calls functions that ``libcuda.c`` does not have; the process has another CUDA driver.
    """
    # Either may open the machine's own libcuda, which then is the one that Triton gets.
    if imported := {"torch", "triton"} & sys.modules.keys():
        raise RuntimeError(f"null_driver.install() has to come before {' and '.join(sorted(imported))} is imported")
    backend = _nvidia_backend()
    folder = tempfile.mkdtemp(prefix="null_driver_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    library = ctypes.CDLL(str(build(Path(folder), backend / "include")), mode=ctypes.RTLD_GLOBAL)
    if missing := [name for name in functions_of(backend) if not hasattr(library, name)]:
        raise RuntimeError(f"Triton calls functions that {SOURCE} lacks: {', '.join(missing)}")
    if not hasattr(ctypes.CDLL(NAME), "null_driver_launches"):
        raise RuntimeError("this process has loaded another libcuda.so.1 already (LD_PRELOAD?)")
    os.environ["TRITON_LIBCUDA_PATH"] = folder
    os.environ["TRITON_INTERPRET"] = "0"
    # Not the user's own: what is linked with the null driver is not for other programs.
    os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(folder, "cache"))
    _activate()
    library.null_driver_launches.restype = ctypes.c_long
    return library.null_driver_launches


def build(folder: Path, include: Path) -> Path:
    """Compiles ``libcuda.c`` against the ``cuda.h`` in ``include``; returns the library, in ``folder``."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        raise RuntimeError(
            f"no C compiler ({', '.join(names)}), which Triton needs too: install gcc or clang, or set CC to one"
        )
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise RuntimeError(
            f"Triton's launcher needs Python's headers, and {sysconfig.get_path('include')} has no Python.h: install "
            "them (python3-dev, python3-devel), or use a Python that has them"
        )
    library = folder / NAME
    command = [compiler, "-shared", "-fPIC", "-O2", f"-Wl,-soname,{NAME}", f"-I{include}", "-o", library, SOURCE]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{compiler} cannot compile {SOURCE}:\n{run.stderr}")
    library.with_suffix("").symlink_to(NAME)  # libcuda.so, which the linker looks for
    return library


def functions_of(backend: Path) -> list[str]:
    """Those of ``cuda.h`` that Triton's NVIDIA driver names outside comments, in the folder ``backend``."""
    header = (backend / "include" / "cuda.h").read_text(errors="replace")
    declared = set(re.findall(r"^CUresult CUDAAPI (cu\w+)\(", header, re.M))
    source = "".join((backend / name).read_text() for name in ("driver.c", "driver.py"))
    named = set(re.findall(r"\bcu[A-Z]\w+", re.sub(r"//.*|/\*.*?\*/", "", source)))
    return sorted((named & declared) - UNSUPPORTED)


def _nvidia_backend() -> Path:
    spec = importlib.util.find_spec("triton")
    backend = Path(spec.origin).parent / "backends" / "nvidia" if spec and spec.origin else None
    if backend is None or not backend.exists():
        raise RuntimeError("triton with its NVIDIA backend is not installed: pip install triton")
    return backend


def _activate() -> None:
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    active = CudaDriver()
    # Torch's own ask the CUDA runtime, which has no device here.
    active.get_current_device = lambda: 0
    active.set_current_device = lambda device: None
    active.get_current_stream = lambda device: 0
    active.get_device_capability = lambda device=0: CAPABILITY
    driver.set_active(active)
