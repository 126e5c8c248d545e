"""Launches of Triton kernels that cost the host little.

Triton's own ``kernel[grid](...)`` binds, specializes and hashes every argument in Python at each launch: 35 us, where
the GPU takes less for most of the kernels here. A kernel that was compiled before is found by what Triton compiles it
for, and handed to the function in C that launches it.
"""

from typing import Any, Optional

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from megatron_moe_spec.kernels import interpreted

_ALIGNMENT = 16  # bytes: Triton compiles another kernel for pointers that are not multiples of it
_INT32 = 2**31  # likewise for numbers from here on
_RELEASE = tuple(map(int, triton.__version__.split(".")[:2]))
_IS_KNOWN = (3, 2) <= _RELEASE <= (3, 9) and not interpreted()


class Launch:
    """A Triton kernel with its constants: ``launch(grid, tensors, numbers, sizes, optional)``.

    Triton's own way is gone at the first launch, and for all that is not known to be the same: pointers that are not
    aligned, large numbers, the interpreter, other releases, torch.compile, and wherever a profiler or a debugger wants
    to be told of launches.

    Args:
        kernel: of ``triton.jit``, with arguments in the order tensors, optional ones, numbers, sizes, constants.
        constants: and options of the compiler.
    """

    def __init__(self, kernel: Any, **constants: Any):
        self._kernel, self._constants = kernel, constants
        self._compiled: dict[tuple, tuple] = {}
        # Releases after 3.2 pass constants, too, to what they have compiled.
        passed = kernel.arg_names if _RELEASE > (3, 2) else ()
        self._passed = tuple(constants[name] for name in passed if name in constants)

    def __call__(
        self,
        grid: int,
        tensors: tuple[Tensor, ...],
        numbers: tuple,
        sizes: tuple[int, ...] = (),
        optional: tuple[Optional[Tensor], ...] = (),
    ) -> None:
        """Launches ``grid`` programs on the current stream.

        Args:
            optional: tensors, too, which follow the others; None where the kernel is to do without one.
            numbers: those that the kernel is not specialized for (``do_not_specialize``): counts, and floats.
            sizes: those that it is specialized for.
        """
        key, arguments = None, (*tensors, *optional, *numbers, *sizes)
        if _IS_KNOWN and not torch.compiler.is_compiling() and not _is_watched(self._kernel):
            active = driver.active
            device = active.get_current_device()
            addresses, found = 0, [device, *sizes]
            for x in (*tensors, *optional):
                if x is None:
                    found.append(None)
                else:
                    found.append(x.dtype)
                    addresses |= x.data_ptr()
            if not addresses % _ALIGNMENT and max(numbers) < _INT32:
                key = tuple(found)
                compiled = self._compiled.get(key)
                if compiled is not None:
                    launch, fixed, in_tuple = compiled
                    arguments += self._passed
                    stream = active.get_current_stream(device)
                    launch(grid, 1, 1, stream, *fixed, *((arguments,) if in_tuple else arguments))
                    return
        kernel = self._kernel[(grid,)](*arguments, **self._constants)
        if key is not None and kernel is not None:
            self._compiled[key] = _launcher_of(kernel)


def _launcher_of(kernel: Any) -> tuple:
    """A function that launches a compiled kernel, its arguments after the stream, and whether it takes a tuple then."""
    run, function, unwatched = kernel.run, kernel.function, (kernel.packed_metadata, None, None, None)
    needs_memory = getattr(run, "global_scratch_size", 1) or getattr(run, "profile_scratch_size", 1)
    if _RELEASE < (3, 5) or needs_memory or getattr(run, "gsan_enabled", False):
        return run, (function, *unwatched), False
    # What ``run`` would do in Python: it has nothing to allocate.
    options, no_memory = (run.launch_cooperative_grid, run.launch_pdl), (None, None)
    if _RELEASE < (3, 7):
        return run.launch, (function, *options, *no_memory, *unwatched), False
    types = run.arg_annotations, run.kernel_signature
    return run.launch, (function, *options, *unwatched, *no_memory, *types), True


try:
    from triton import knobs
except ImportError:  # before 3.4
    from triton.compiler import CompiledKernel

    def _is_watched(kernel: Any) -> Any:
        return kernel.pre_run_hooks or CompiledKernel.launch_enter_hook or CompiledKernel.launch_exit_hook

else:
    _runtime, _compilation = knobs.runtime, knobs.compilation

    def _is_watched(kernel: Any) -> Any:
        """Whether a profiler or a debugger wants to be told of launches, or to have another kernel compiled."""
        enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
        return (
            kernel.pre_run_hooks
            or getattr(enter, "calls", enter)  # a chain of hooks, since 3.5
            or getattr(leave, "calls", leave)
            or getattr(_compilation, "instrumentation_mode", "")
            or getattr(_runtime, "add_stages_inspection_hook", None)
        )
